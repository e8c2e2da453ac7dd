"""Parallel decoding for Hugging Face transformers without a draft model.

Importing this package gives about a hundred classes of models, such as Qwen3, Llama, Mistral and Gemma,
`generate(..., decoding="jacobi_multiblock")`.
"""

# First, because it refuses releases of transformers that are too old.
import jacobi_hf.integration  # noqa: F401  # isort: skip
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from jacobi_hf._version import __version__
from jacobi_hf.integration.on_load import register_when_loaded

if TYPE_CHECKING:
    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.drafts.loading import load_drafter, set_drafter, unload_drafter
    from jacobi_hf.drafts.lora import LoraDrafter
    from jacobi_hf.drafts.lora_format import DrafterError
    from jacobi_hf.execution.kept import clear_graphs
    from jacobi_hf.integration.mixin import JacobiGenerationMixin
    from jacobi_hf.integration.registry import register, unregister
    from jacobi_hf.output import JacobiDecoderOnlyOutput, JacobiStats
    from jacobi_hf.streaming import Candidate, StepEvent, StepStreamer
    from jacobi_hf.tuning.autotune import Tuning, autotune

# Loaded on first use, because torch and transformers take seconds, which `jacobi-hf --help` need not wait for.
_MODULE_OF = {
    "Candidate": "streaming",
    "DrafterError": "drafts.lora_format",
    "JacobiConfig": "config",
    "JacobiDecoderOnlyOutput": "output",
    "JacobiGenerationMixin": "integration.mixin",
    "JacobiStats": "output",
    "LoraDrafter": "drafts.lora",
    "StepEvent": "streaming",
    "StepStreamer": "streaming",
    "Tuning": "tuning.autotune",
    "autotune": "tuning.autotune",
    "clear_graphs": "execution.kept",
    "load_drafter": "drafts.loading",
    "register": "integration.registry",
    "register_defaults": "integration.registry",
    "set_drafter": "drafts.loading",
    "unload_drafter": "drafts.loading",
    "unregister": "integration.registry",
}

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

register_when_loaded()


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")  # jacobi_hf.config without an import of its own
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
