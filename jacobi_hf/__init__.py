"""Parallel decoding for Hugging Face transformers without a draft model.

Importing this package gives Qwen2 and Qwen3 models `generate(..., decoding="jacobi_multiblock")`.
"""

import sys as _sys
from pathlib import Path as _Path

from jacobi_hf._version import __version__

# `jacobi-hf --help` lists the verbs without torch and transformers, which take seconds to import.
_LISTS_VERBS = [_Path(word).name for word in getattr(_sys, "argv", [])] in (["jacobi-hf"], ["jacobi-hf", "--help"])

if not _LISTS_VERBS:
    # First, because it refuses releases of transformers that are too old.
    import jacobi_hf.integration  # noqa: F401  # isort: skip
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

if not _LISTS_VERBS:
    register_defaults()
