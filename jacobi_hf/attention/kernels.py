"""Kernels for attention over a step's slots.

They take keys and values as the cache holds them. Nothing is repeated for the query heads of a group.

Shapes: queries `(B, heads, Q, head_dim)`, keys and values `(B, key/value heads, K, head_dim)`, output `(B, Q, heads,
head_dim)`.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def grouped_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return the attention of torch's sdpa, with the query heads of a group as further queries of one head.

    With a mask, transformers' own function repeats keys and values for every query head, in every layer and step.
    `enable_gqa` would not, but it is slower on the CPU for a single slot, and on CUDA it has no fused kernel that
    takes a mask.

    Args:
        query: `(B, heads, Q, head_dim)`.
        key: `(B, key/value heads, K, head_dim)`.
        value: `(B, key/value heads, K, head_dim)`.
        mask: additive `(B, 1, groups * Q, K)`, from `grouped_mask` or `mask_from_table`; None for a single slot that
            attends to all columns.
        scaling: factor of the scores; None for the default.
        dropout: probability.
    """
    batch, heads, slots, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=None if mask is None else mask.to(query.dtype), dropout_p=dropout, scale=scaling
    )
    if slots == 1:
        return output.reshape(batch, 1, heads, -1)
    return output.view(batch, heads, slots, -1).transpose(1, 2).contiguous()


def grouped_mask(allowed: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask of `grouped_sdpa`, additive `(B, 1, groups * Q, K)`.

    From a bool mask, sdpa would make an additive one again in every layer.

    Args:
        allowed: bool `(B, 1, Q, K)`, True where attention is allowed.
        groups: query heads for each key/value head.
        dtype: of the result.
    """
    return torch.where(allowed, 0.0, float("-inf")).to(dtype).repeat(1, 1, groups, 1)


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scaling: float | None
) -> torch.Tensor:
    """Return the attention of FlexAttention, which reads only the blocks of key columns that the mask names.

    Args:
        query: `(B, heads, Q, head_dim)`.
        key: `(B, key/value heads, K, head_dim)`.
        value: `(B, key/value heads, K, head_dim)`.
        mask: from `block_mask`.
        scaling: factor of the scores; None for the default.
    """
    # In a step that is not compiled, FlexAttention must be compiled by itself to run as a kernel.
    function = flex_attention if torch.compiler.is_dynamo_compiling() else _compiled_flex_attention()
    output: torch.Tensor = function(
        query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous()


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


@cache
def has_flex() -> bool:
    """Return whether torch's FlexAttention takes masks of any length, and Triton is there to compile it."""
    known = inspect.signature(BlockMask.from_kv_blocks).parameters
    return "seq_lengths" in known and torch.utils._triton.has_triton()


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    filled_B: torch.Tensor,
    sliding_window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """Return the attention of flash-attn over a chain, whose slots are the last of the filled columns of each row.

    Args:
        query: `(B, heads, Q, head_dim)`.
        key: `(B, key/value heads, K, head_dim)`.
        value: `(B, key/value heads, K, head_dim)`.
        filled_B: int32, cached tokens and slots of each row.
        sliding_window: positions that a query may look back, itself included; None for full attention.
        scaling: factor of the scores; None for the default.
    """
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
    # flash-attn takes (B, tokens, heads, head_dim); views will do.
    output: torch.Tensor = flash_attn_with_kvcache()(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=filled_B,
        softmax_scale=scaling,
        causal=True,
        window_size=window,
    )
    return output


def flash_attn_with_kvcache() -> Any:
    """Return the function of the package flash-attn, or None if the package is not installed."""
    try:
        return getattr(import_module("flash_attn"), "flash_attn_with_kvcache", None)
    except ImportError:
        return None
