"""Jacobi Forcing: finetuning a causal LM on its own Jacobi trajectories."""
