"""Attention over the slots of a step, and masks of our own as a model's attention implementation wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

LAYER_TYPES = {"full_attention", "sliding_attention"}
# Implementations that take a mask of ours.
GROUPED = "jacobi_sdpa"
TAKES_MASK = ("sdpa", "eager", GROUPED)
# Wider forwards are prefills: there the mask, once per query head of a group, would be larger than what it saves.
GROUPED_SLOTS = 512


def attention_of(config: Any) -> str:
    """The attention implementation that a model with this config runs."""
    return str(config._attn_implementation)


def groups_of(config: Any) -> int:
    """Query heads for each key/value head; 1 where a config declares no such groups."""
    heads, shared = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    return heads // shared if heads and shared and heads % shared == 0 else 1


def layer_types(config: Any) -> list[str]:
    """The kind of attention of each layer."""
    declared = getattr(config, "layer_types", None)
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return list(declared) if declared else [kind] * config.num_hidden_layers


def grouped_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Sdpa whose keys and values stay grouped: the query heads of a group go in as further queries of one head.

    Transformers' own function repeats keys and values for every query head when there is a mask, in every layer and step. The result is
    the same. Anything but a mask made for it by `MaskBuilder` is handed on to that function.

    Args:
        query: `(B, heads, Q, head_dim)`; key, value: `(B, key/value heads, S, head_dim)`.
        attention_mask: bool `(B, 1, group * Q, S)`.

    Returns:
        `(B, Q, heads, head_dim)`, and None for the weights.
    """
    batch, heads, slots, width = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or groups == 1 or attention_mask.shape[2] != groups * slots:
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return output, None
    grouped = query.reshape(batch, key.shape[1], groups * slots, width)
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.view(batch, heads, slots, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_sdpa)
AttentionMaskInterface.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


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
        self._groups = groups_of(text_config) if attention_of(text_config) == GROUPED else 1
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
            batch, _, slots, columns = allowed.shape
            if self._groups == 1 or slots > GROUPED_SLOTS:
                return allowed
            return allowed[:, :, None].expand(-1, -1, self._groups, -1, -1).reshape(batch, 1, self._groups * slots, columns)
        # A bool mask is added to the scores by eager attention, silently.
        return torch.where(allowed, 0.0, torch.finfo(self._dtype).min).to(self._dtype)
