"""Attention over a step's slots, keys and values as the cache holds them: never repeated for the query heads of a group.

Shapes: queries `(B, heads, Q, head_dim)`, keys and values `(B, key/value heads, K, head_dim)`, output `(B, Q, heads, head_dim)`.
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
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Sdpa with the query heads of a group as further queries of one head.

    Transformers' own function repeats keys and values for every query head when there is a mask, in every layer and step; `enable_gqa`
    keeps them too, but is slower on the CPU for a single slot, and on CUDA has no fused kernel that takes a mask.

    Args:
        mask: as `grouped_mask` makes it.
    """
    batch, heads, slots, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask.to(query.dtype), dropout_p=dropout, scale=scaling
    )
    return output.view(batch, heads, slots, -1).transpose(1, 2).contiguous()


def grouped_mask(allowed: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask of `grouped_sdpa`, `(B, 1, groups * Q, K)`, from a bool one `(B, 1, Q, K)`.

    It is additive, which sdpa would otherwise make of it in every layer.
    """
    return torch.where(allowed, 0.0, float("-inf")).to(dtype).repeat(1, 1, groups, 1)


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scaling: float | None
) -> torch.Tensor:
    """FlexAttention, which reads the blocks of columns that the mask names, row by row."""
    # Outside of what is compiled anyway it has to be compiled itself to be a kernel.
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
    """Whether torch's FlexAttention takes masks of any length, and there is a compiler for its kernels."""
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
    """flash-attn over a chain: the step's slots are the last of each row's `filled_B` columns, and see what is before them.

    Args:
        filled_B: int32, cached tokens and slots of each row.
        sliding_window: positions that a query may look back, itself included; None for full attention.
    """
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
    # Its layout is (B, tokens, heads, head_dim); views will do.
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
    """The function of the package flash-attn, None where it is not installed."""
    try:
        return getattr(import_module("flash_attn"), "flash_attn_with_kvcache", None)
    except ImportError:
        return None
