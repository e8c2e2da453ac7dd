"""Masks of our own as a model's attention implementation wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

LAYER_TYPES = {"full_attention", "sliding_attention"}
# Implementations that take a mask of ours.
TAKES_MASK = ("sdpa", "eager")


def attention_of(config: Any) -> str:
    """The attention implementation that a model with this config runs."""
    return str(config._attn_implementation)


def layer_types(config: Any) -> list[str]:
    """The kind of attention of each layer."""
    declared = getattr(config, "layer_types", None)
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return list(declared) if declared else [kind] * config.num_hidden_layers


class MaskBuilder:
    """Builds the `attention_mask` argument of a model's forward from bool masks, one per kind of layer.

    Args:
        config: the model's config.
        dtype: of the model.

    Attributes:
        windows: the sliding window of each kind of layer, None for full attention.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        text_config = config.get_text_config(decoder=True)
        self._dtype = dtype
        self._is_eager = attention_of(text_config) == "eager"
        self.windows = {
            kind: text_config.sliding_window if kind == "sliding_attention" else None for kind in sorted(set(layer_types(text_config)))
        }

    def __call__(self, mask: Callable[[int | None], torch.Tensor], device: torch.device) -> torch.Tensor | dict[str, torch.Tensor]:
        """The argument for one forward.

        Args:
            mask: gives the bool mask `(B, 1, Q, S)`, True where attention is allowed, for a sliding window or None.
            device: where the model takes it.
        """
        masks = {kind: self._prepared(mask(window)).to(device) for kind, window in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _prepared(self, allowed: torch.Tensor) -> torch.Tensor:
        if not self._is_eager:
            return allowed
        # A bool mask is added to the scores by eager attention, silently.
        return torch.where(allowed, 0.0, torch.finfo(self._dtype).min).to(self._dtype)
