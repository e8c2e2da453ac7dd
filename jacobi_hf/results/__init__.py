"""Documents of results: what was measured, and on what machine."""
