"""How a model answers the prompts of trajectories: special ids, and the call of `generate`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig

from jacobi_hf.integration.compat import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from jacobi_hf.trainer.data.answer_options import AnswerConfig


def write_answers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: AnswerConfig
) -> tuple[list[list[int]], DynamicCache]:
    """Return the answers of ordinary `generate`, and the keys and values of prompts and answers.

    Args:
        model: a causal LM.
        prompts: token ids of each prompt.
        answers: how the model answers.

    Returns:
        The ids of each answer, with its end-of-sequence id but without padding; and the cache, left-padded as the
        prompts.
    """
    clean = DynamicCache()  # without a config, so that layers with sliding attention keep every position too
    with torch.no_grad(), without_own_options(model):
        ids_BL = model.generate(
            **left_padded(model, prompts),
            generation_config=answers.generation_config(model),
            decoding=None,
            **{CACHE: clean},
        )
    ends = end_ids(model)
    width = max(map(len, prompts))
    return [cut_at_end(row[width:].tolist(), ends) for row in ids_BL], clean


@contextmanager
def without_own_options(model: PreTrainedModel) -> Iterator[None]:
    """Keep only end and pad ids in the model's generation config, so that none of its other options apply."""
    own = model.generation_config
    assert own is not None
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    try:
        yield
    finally:
        model.generation_config = own


def left_padded(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` of prompts, padded on the left, on the model's device."""
    width = max(map(len, prompts))
    device = model.device
    pad = pad_id(model)
    ids_BL = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask_BL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids_BL, "attention_mask": mask_BL}


def base_of(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself. The layers of a LoRA stay active in it.

    Raises:
        ValueError: the model has a prompt-learning adapter.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "the model has a prompt-learning adapter, whose prompts are not part of the model inside it. Use a LoRA."
        )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def end_ids(model: PreTrainedModel) -> set[int]:
    """Return the ids that end an answer."""
    return set(special_ids(model.generation_config, "eos_token_id"))


def pad_id(model: PreTrainedModel) -> int:
    """Return the id that fills the slots after an answer: the pad id, or else the lowest end id, or else 0."""
    return next(iter(special_ids(model.generation_config, "pad_token_id")), min(end_ids(model), default=0))


def special_ids(holder: Any, name: str) -> tuple[int, ...]:
    """Return the ids of `eos_token_id` or `pad_token_id` of a generation config or tokenizer: none, one or several."""
    value = getattr(holder, name, None)
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (int(value),)


def cut_at_end(ids: list[int], ends: set[int]) -> list[int]:
    """Return the ids up to the first end id, which is included, or all ids if there is none."""
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: first + 1]
