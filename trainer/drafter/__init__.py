"""Training a LoRA drafter for a model that stays as it is."""
