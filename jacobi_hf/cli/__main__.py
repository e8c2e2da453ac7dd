"""`python -m jacobi_hf.cli`, for launchers of several processes."""

import sys

from jacobi_hf.cli import app

sys.argv[0] = "jacobi-hf"  # as records of a run have it
app(prog_name="jacobi-hf")
