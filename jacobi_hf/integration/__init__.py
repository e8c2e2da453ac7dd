"""What depends on the internals of transformers, each item pinned by a test."""

from jacobi_hf.integration.releases import check_release

check_release()
