"""What Jacobi decoding does not do, each with its reason: refused, decoded in the ordinary way, or not compiled.

`generate` asks before it decodes, and `jacobi-hf info` asks before a model is loaded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import GenerationMode

from jacobi_hf.attention.interface import LAYER_TYPES, cannot_attend, layer_types
from jacobi_hf.integration.compat import OUTPUT_CAPTURING, is_checkpointing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import GenerationConfig

# Values of `cache_implementation` that give a StaticCache or DynamicCache; the last four are of older releases.
_CACHES = (None, "static", "dynamic", "dynamic_full", "sliding_window", "hybrid", "hybrid_chunked")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def refusal_reason(mode: GenerationMode, generation_config: GenerationConfig) -> str | None:
    """Return what in a call contradicts Jacobi decoding, or None.

    A call that names a `decoding` is refused for it. If the decoding comes from a saved generation config, the call is
    decoded in the ordinary way.
    """
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{mode.value.replace('_', ' ')} (num_beams, assistant_model, prompt_lookup_num_tokens and the like)"
    if generation_config.cache_implementation not in _CACHES:
        return f"cache_implementation={generation_config.cache_implementation!r} (only 'static', 'dynamic' or none)"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "output_attentions or output_hidden_states"
    return None


def fallback_reason(model: Any, generation_config: GenerationConfig, *, own_positions: bool = False) -> str | None:
    """Return why a call is decoded in the ordinary way, with a warning, or None.

    Args:
        model: the model.
        generation_config: of the call.
        own_positions: whether the caller gave position ids.
    """
    if generation_config.is_assistant:
        return "is_assistant=True (the call is one of assisted generation's)"
    if generation_config.use_cache is False:
        return "use_cache=False"
    if generation_config.guidance_scale is not None and generation_config.guidance_scale != 1:
        return "guidance_scale"
    if own_positions:
        return "position_ids given by the caller"
    if generation_config.prefill_chunk_size is not None:
        return "prefill_chunk_size"
    return reason_of_model(model)


def reason_of_model(model: Any) -> str | None:
    """Return why a model does not decode with our masks and cache, as far as it can be seen without a forward."""
    config = model.config.get_text_config(decoder=True)
    if reason := cannot_attend(config):
        return reason
    if unknown := set(layer_types(config)) - LAYER_TYPES:
        return f"layers of type {', '.join(sorted(unknown))}"
    if getattr(model, "_is_stateful", False):
        return "recurrent layers, whose state would keep guesses that are not accepted"
    if _frequencies_depend_on_length(config):
        return "rotary embeddings whose frequencies depend on the length (rope_type 'dynamic' and 'longrope')"
    if model.training and is_checkpointing(model):
        return "a model that is being trained with gradient checkpointing (which drops the cache)"
    if "prepare_inputs_for_generation" in vars(model):
        return "a prompt-learning adapter (PEFT replaced prepare_inputs_for_generation)"
    return None


def _frequencies_depend_on_length(config: Any) -> bool:
    """Return whether a forward over guesses would rotate the tokens before them differently."""
    declared = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [declared, *(value for value in declared.values() if isinstance(value, dict))]
    return any(one.get("rope_type", one.get("type")) in ("dynamic", "longrope") for one in nested)


def fixed_positions(model: Any, needed: float = math.inf) -> int | None:
    """Return how many positions a model has if it reads them from a table; None if there are enough.

    Rotary embeddings are computed for every position. A table ends: one forward after its end is an error, even if
    nothing reads what it gives.

    Args:
        model: the model.
        needed: positions that a call may need.
    """
    positions: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is None or needed <= positions:
        return None
    has_table = not any(name.endswith("inv_freq") for name, _ in model.named_buffers())
    return positions if has_table else None


def cannot_compile(model: Any) -> str | None:
    """Return why a model cannot be compiled as one graph, or None."""
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    if is_shared_by_processes(model):
        return "the model is split over several processes"
    if any(not _can_be_traced(hook) for hook in _hooks(model)) or any(hasattr(m, "_hf_hook") for m in model.modules()):
        return "a module of the model has hooks"
    if any(_hooks_of_all_modules()):
        return "there are hooks for all modules"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return "its quantisation cannot be compiled"
    return None


def is_shared_by_processes(model: Any) -> bool:
    """Return whether the layers of a model are split over several processes, which run each forward together."""
    return (getattr(model, "tp_size", None) or 1) > 1


def _can_be_traced(hook: Any) -> bool:
    """Return whether a hook is compiled together with the model's forward.

    A drafter's hooks are there while another call drafts. Transformers' own are left on the layers by a forward with
    `output_hidden_states=True` or `output_attentions=True`, and do nothing in other forwards.
    """
    return getattr(hook, "is_drafters", False) or getattr(hook, "__module__", "") == OUTPUT_CAPTURING


def _hooks(model: Any) -> Iterator[Any]:
    for module in model.modules():
        for name in _HOOKS:
            yield from getattr(module, name).values()


def _hooks_of_all_modules() -> Iterator[Any]:
    for name in _HOOKS:
        yield from getattr(torch.nn.modules.module, f"_global{name}", {}).values()
