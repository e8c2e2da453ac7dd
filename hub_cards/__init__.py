"""What a Hub repository needs so that its model decodes in parallel where this package is not installed: `custom_generate`."""
