"""The classes that importing jacobi_hf registers. Neither torch nor transformers is imported here."""

from __future__ import annotations

# Class by the module that defines it.
DEFAULTS = {
    "transformers.models.qwen2.modeling_qwen2": "Qwen2ForCausalLM",
    "transformers.models.qwen3.modeling_qwen3": "Qwen3ForCausalLM",
}
