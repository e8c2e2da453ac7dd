"""From measured results to a Hub repository: model cards, `custom_generate`, and the push of both."""
