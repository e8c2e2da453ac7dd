"""Which strategy is fastest: timing of strategies, and the choice between them."""
