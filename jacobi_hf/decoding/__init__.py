"""The decoding of one call of `generate`: rows, steps, stopping, and the loop around them."""
