"""The demo: ordinary and Jacobi decoding side by side, in a terminal and on a page."""
