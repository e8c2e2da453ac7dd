"""Differences between the supported releases of transformers and torch, and nothing else.

Each difference is named after the release that brought it. Code elsewhere in the package is written for the newest
release; this module makes older releases look like it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import cache_utils
from transformers.generation import GenerateDecoderOnlyOutput

if TYPE_CHECKING:
    from collections.abc import Callable

# 5.24 renamed the cache in the arguments of forwards and of `generate`, and in the fields of their outputs.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"

# Kinds of layers of a cache that keep keys and values of tokens, or nothing. 5.24 brought the kind that keeps nothing.
_KINDS = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer", "DummyLayer")
CACHE_LAYERS = tuple(getattr(cache_utils, name) for name in _KINDS if hasattr(cache_utils, name))

# torch 2.9 brought Muon; None before.
MUON = getattr(torch.optim, "Muon", None)

# Module of the hooks with which transformers collects hidden states and attentions.
OUTPUT_CAPTURING = "transformers.utils.output_capturing"


def parameters_of(forward: Callable[..., Any]) -> set[str]:
    """Return the names of a forward's parameters, below all decorators (5.24 added a second one)."""
    return set(inspect.signature(inspect.unwrap(forward)).parameters)


def logits_to_keep(keep_BN: torch.Tensor | None, slots: int) -> torch.Tensor | int:
    """Return the `logits_to_keep` with which a forward over `slots` slots computes at least the slots `keep_BN`.

    From 5.21 on the argument may differ from row to row. Before, it is one list for all rows: the slots of all rows
    together, or every slot where that is less work.
    """
    if keep_BN is None:
        return 0
    if TAKES_SLOTS_BY_ROW:
        return keep_BN
    return keep_BN.flatten() if keep_BN.numel() <= slots else 0


def kept_logits(logits: torch.Tensor, keep_BN: torch.Tensor | None, slots: int) -> torch.Tensor:
    """Return the logits `(B, N, V)` of the slots `keep_BN` from a forward that was given `logits_to_keep(...)`."""
    if keep_BN is None or TAKES_SLOTS_BY_ROW:
        return logits
    if keep_BN.numel() > slots:
        return logits.take_along_dim(keep_BN[..., None].to(logits.device), 1)
    # (B, B*N, V): each row has the slots of all rows; its own lie on the diagonal.
    return logits.unflatten(1, keep_BN.shape).diagonal(dim1=0, dim2=1).permute(2, 0, 1)


TAKES_SLOTS_BY_ROW = hasattr(transformers.modeling_utils, "slice_logits_to_keep")


# 5.23 renamed gradient checkpointing to activation checkpointing, in models and in training arguments.
_RENAMED_CHECKPOINTING = hasattr(transformers.PreTrainedModel, "is_activation_checkpointing")


def is_checkpointing(model: Any) -> bool:
    """Return whether a model recomputes activations in training."""
    name = "is_activation_checkpointing" if _RENAMED_CHECKPOINTING else "is_gradient_checkpointing"
    return bool(getattr(model, name, False))


if _RENAMED_CHECKPOINTING:

    class CheckpointingArguments:
        """Base of training arguments; empty, since `TrainingArguments` has `activation_checkpointing` itself."""

else:

    @dataclass
    class CheckpointingArguments:  # type: ignore[no-redef]
        """Base of training arguments that adds `activation_checkpointing` to releases without it."""

        activation_checkpointing: bool | None = None
        activation_checkpointing_kwargs: dict[str, Any] | str | None = None

        def __post_init__(self) -> None:
            """Pass the new names on to the old ones, then continue with the next class."""
            recomputes = self.activation_checkpointing or self.gradient_checkpointing  # type: ignore[has-type]
            self.activation_checkpointing = bool(recomputes)
            self.gradient_checkpointing = bool(recomputes)
            kwargs = self.activation_checkpointing_kwargs
            kwargs = kwargs or self.gradient_checkpointing_kwargs  # type: ignore[has-type]
            self.activation_checkpointing_kwargs = kwargs
            self.gradient_checkpointing_kwargs = kwargs
            super().__post_init__()  # type: ignore[misc]
