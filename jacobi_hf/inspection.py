"""How a model would decode here, without loading weights. For `jacobi-hf info MODEL`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from jacobi_hf.attention.interface import attention_of, field_of, layer_types, usable_kernels
from jacobi_hf.config import KNOBS, JacobiConfig, reject_misspelt
from jacobi_hf.drafts.loading import read_drafter
from jacobi_hf.integration.forward import problem_of
from jacobi_hf.integration.quantisation import shared_scales
from jacobi_hf.integration.registry import check_can_decode, registered
from jacobi_hf.integration.support import fallback_reason, refusal_reason
from jacobi_hf.loading import positions_of, reading

if TYPE_CHECKING:
    from jacobi_hf.drafts.lora import LoraDrafter

RUNS = "runs"
FALLS_BACK = "falls back"
REFUSED = "refused"


@dataclass(frozen=True)
class ModelFacts:
    """How a model would decode here.

    Attributes:
        name: Name or folder of the model.
        model_class: Class that `AutoModelForCausalLM` would build.
        is_registered: Whether the class has `decoding` on import. If not, `jacobi_hf.register` adds it, as commands
            do.
        parameters: Number of weights.
        positions: Number of positions, or None if the config names no limit.
        vocabulary: Size of the vocabulary.
        dtype: dtype that the weights would be loaded in.
        attention: Attention implementation that would be used.
        layers: Number of layers of each type.
        kernels: Optional kernels that its steps would use.
        saved_knobs: Knobs that its generation config sets.
        decoding: `RUNS`, `FALLS_BACK` (ordinary decoding with a warning) or `REFUSED` (an error).
        reason: Why Jacobi decoding does not run, or None.
        inexact: Why its tokens may differ from those of ordinary decoding by more than rounding, or None.
        drafter: Rank, base and number of weights of the drafter, or None.
    """

    name: str
    model_class: str
    is_registered: bool
    parameters: int
    positions: int | None
    vocabulary: int
    dtype: str
    attention: str
    layers: dict[str, int]
    kernels: list[str] = field(default_factory=list)
    saved_knobs: dict[str, Any] = field(default_factory=dict)
    decoding: str = RUNS
    reason: str | None = None
    inexact: str | None = None
    drafter: dict[str, Any] | None = None


def inspect_model(name: str, drafter: str | None = None) -> ModelFacts:
    """Return how a model would decode. Its configuration is read, and it is built without weights.

    Args:
        name: Name or folder of the model.
        drafter: Folder or Hub repository of a drafter.

    Raises:
        ValueError: There is no such model, it is not a causal language model, or the drafter does not exist or fit.
    """
    model, generation_config = _without_weights(name)
    config = model.config.get_text_config(decoder=True)
    dtype = getattr(config, "dtype", None) or torch.float32
    heads = field_of(config, "num_attention_heads")
    head_dim = field_of(config, "head_dim") or (config.hidden_size // heads if heads else 0)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    decoding, reason = _decoding_of(model, generation_config)
    return ModelFacts(
        name=name,
        model_class=type(model).__name__,
        is_registered=any(issubclass(type(model), one) for one in registered()),
        parameters=model.num_parameters(),
        positions=None if math.isinf(positions := positions_of(model)) else int(positions),
        vocabulary=config.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
        attention=attention_of(config),
        layers=dict(Counter(layer_types(config))),
        kernels=sorted(usable_kernels(attention_of(config), device or torch.device("cpu"), dtype, head_dim)),
        saved_knobs={knob: value for knob in KNOBS if (value := getattr(generation_config, knob, None)) is not None},
        decoding=decoding,
        reason=reason,
        inexact=shared_scales(model) if decoding == RUNS else None,
        drafter=None if drafter is None else _about(read_drafter(model, drafter)),
    )


def _without_weights(name: str) -> tuple[Any, GenerationConfig]:
    with reading(name):
        config = AutoConfig.from_pretrained(name)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name} is no causal language model of transformers: its model_type is {config.model_type!r}."
        )
    with reading(name, "built"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    try:
        generation_config = GenerationConfig.from_pretrained(name)
    except OSError:  # it has none, and transformers makes one from the config
        generation_config = model.generation_config
    return model, generation_config


def _decoding_of(model: Any, generation_config: GenerationConfig) -> tuple[str, str | None]:
    """Return how a call without further arguments would decode, and why Jacobi decoding does not run."""
    try:
        check_can_decode(type(model))
        reject_misspelt(vars(generation_config))
        saved = JacobiConfig.from_generation_config(generation_config)
    except (TypeError, ValueError) as error:
        return REFUSED, str(error)
    if reason := refusal_reason(generation_config.get_generation_mode(), generation_config):
        return FALLS_BACK if saved else REFUSED, f"Jacobi decoding does not work with {reason}."
    if reason := fallback_reason(model, generation_config) or problem_of(model):
        return FALLS_BACK, f"Jacobi decoding does not support {reason}."
    return RUNS, None


def _about(drafter: LoraDrafter) -> dict[str, Any]:
    config = drafter.config
    return {
        "base_model": config.base_model,
        "rank": config.r,
        "weights": len(drafter.layers),
        "target_modules": config.target_modules,
    }
