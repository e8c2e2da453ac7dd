"""The OpenAI-compatible server of transformers with Jacobi decoding."""
