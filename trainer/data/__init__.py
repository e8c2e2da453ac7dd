"""Training data: trajectories, packed records, and the tensors made from them."""
