"""Draft sources: everything that proposes tokens for the model to verify, one file a source."""
