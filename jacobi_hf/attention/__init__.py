"""Attention over the slots of a step: masks, kernels, and how a model is switched to them."""
