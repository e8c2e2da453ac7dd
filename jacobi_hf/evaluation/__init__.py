"""Ordinary and Jacobi decoding on tasks of lm-evaluation-harness."""
