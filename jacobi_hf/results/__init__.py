"""Documents of measured results: what was measured, on what machine and software, with what training."""
