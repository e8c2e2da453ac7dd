"""Documents of measured results: figures, machine and software, and the training of the model."""
