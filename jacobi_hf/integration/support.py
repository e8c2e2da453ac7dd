"""What Jacobi decoding does not do: told before a call decodes, and by `jacobi-hf info` before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation import GenerationMode

from jacobi_hf.attention.interface import LAYER_TYPES, cannot_attend, layer_types
from jacobi_hf.integration.compat import is_checkpointing

if TYPE_CHECKING:
    from transformers import GenerationConfig


def contradiction_in(model: Any, mode: GenerationMode, generation_config: GenerationConfig) -> str | None:
    """What in the call asks for something that Jacobi decoding cannot be or give; None for nothing.

    A call that names a `decoding` is refused for it; where the decoding comes from a saved generation config it is decoded ordinarily.
    """
    config = model.config.get_text_config(decoder=True)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{mode.value.replace('_', ' ')} (num_beams, assistant_model, prompt_lookup_num_tokens and the like)"
    if generation_config.cache_implementation not in (None, "static", "dynamic"):
        return f"cache_implementation={generation_config.cache_implementation!r} (only 'static', 'dynamic' or none)"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "output_attentions or output_hidden_states"
    if reason := cannot_attend(config):
        return reason
    unknown = set(layer_types(config)) - LAYER_TYPES
    return f"layers of type {', '.join(sorted(unknown))}" if unknown else None


def unserved_in(model: Any, generation_config: GenerationConfig, *, own_positions: bool = False) -> str | None:
    """What sends a call back to ordinary decoding; None for nothing. `own_positions`: whether it has position ids."""
    if generation_config.use_cache is False:
        return "use_cache=False"
    if generation_config.guidance_scale is not None and generation_config.guidance_scale != 1:
        return "guidance_scale"
    if own_positions:
        return "position_ids given by the caller"
    if generation_config.prefill_chunk_size is not None:
        return "prefill_chunk_size"
    if _frequencies_depend_on_length(model.config.get_text_config(decoder=True)):
        return "rotary embeddings whose frequencies depend on the length (rope_type 'dynamic' and 'longrope')"
    if model.training and is_checkpointing(model):
        return "a model that is being trained with gradient checkpointing (which drops the cache)"
    if "prepare_inputs_for_generation" in vars(model):
        return "a prompt-learning adapter (PEFT replaced prepare_inputs_for_generation)"
    return None


def _frequencies_depend_on_length(config: Any) -> bool:
    """Whether a forward over drafts would rotate the tokens before them differently."""
    declared = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [declared, *(value for value in declared.values() if isinstance(value, dict))]
    return any(one.get("rope_type", one.get("type")) in ("dynamic", "longrope") for one in nested)
