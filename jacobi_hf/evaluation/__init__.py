"""Measure decoding and quality: on prompts, and on tasks of lm-evaluation-harness."""
