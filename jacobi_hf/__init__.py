"""Parallel decoding for Hugging Face transformers without a draft model.

Importing this package gives Qwen2 and Qwen3 models `generate(..., decoding="jacobi_multiblock")`.
"""

from jacobi_hf._version import __version__
from jacobi_hf.config import JacobiConfig
from jacobi_hf.mixin import JacobiGenerationMixin, register, register_defaults, unregister
from jacobi_hf.output import JacobiDecoderOnlyOutput, JacobiStats

__all__ = ["JacobiConfig", "JacobiDecoderOnlyOutput", "JacobiGenerationMixin", "JacobiStats", "__version__", "register", "unregister"]

register_defaults()
