"""`python -m jacobi_hf.cli`."""

from jacobi_hf.cli import app

app()
