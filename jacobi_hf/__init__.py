"""Parallel decoding for Hugging Face transformers without a draft model.

Importing this package gives Qwen2 and Qwen3 models `generate(..., decoding="jacobi_multiblock")`.
"""

# First, because it refuses releases of transformers that are too old.
import jacobi_hf.integration  # noqa: F401  # isort: skip
from jacobi_hf._version import __version__
from jacobi_hf.config import JacobiConfig
from jacobi_hf.drafts.loading import load_drafter, set_drafter, unload_drafter
from jacobi_hf.drafts.lora import LoraDrafter
from jacobi_hf.drafts.lora_format import DrafterError
from jacobi_hf.execution.kept import clear_graphs
from jacobi_hf.integration.mixin import JacobiGenerationMixin
from jacobi_hf.integration.registry import register, register_defaults, unregister
from jacobi_hf.output import JacobiDecoderOnlyOutput, JacobiStats
from jacobi_hf.streaming import Candidate, StepEvent, StepStreamer
from jacobi_hf.tuning.autotune import Tuning, autotune

__all__ = [
    "Candidate",
    "DrafterError",
    "JacobiConfig",
    "JacobiDecoderOnlyOutput",
    "JacobiGenerationMixin",
    "JacobiStats",
    "LoraDrafter",
    "StepEvent",
    "StepStreamer",
    "Tuning",
    "__version__",
    "autotune",
    "clear_graphs",
    "load_drafter",
    "register",
    "set_drafter",
    "unload_drafter",
    "unregister",
]

register_defaults()
