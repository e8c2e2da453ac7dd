"""Find the fastest strategy: timing of strategies, and the choice between them."""
