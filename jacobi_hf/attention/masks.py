"""Masks over a step's slots: a rule, a dense mask, a table from which masks are looked up, and a mask of blocks for FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.attention.flex_attention import BlockMask

if TYPE_CHECKING:
    from jacobi_hf.decoding.layout import Layout

Sees = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FLEX_BLOCK = 128


def visibility(layout: Layout, lengths_B: torch.Tensor, sliding_window: int | None = None) -> Sees:
    """Who sees whom when a step's slots are written behind `lengths_B` cached tokens, as a rule `(row, slot, column) -> bool`.

    Column c of row b is cached token c for `c < lengths_B[b]`, and slot `c - lengths_B[b]` of this step from there on. The rule takes
    index tensors that broadcast, on the device of `lengths_B`.

    Args:
        lengths_B: cached tokens per row.
        sliding_window: positions that a query may look back, itself included; None for full attention.
    """
    sees_N = layout.sees_QQ.flatten()  # one index is looked up faster than two

    def of_chain(row: torch.Tensor, slot: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        position = lengths_B[row] + slot
        allowed = column <= position
        return allowed if sliding_window is None else allowed & (column > position - sliding_window)

    def of_tree(row: torch.Tensor, slot: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        seen = column - lengths_B[row]
        inside = seen.clamp(0, layout.slots - 1)
        allowed = (seen < 0) | ((seen < layout.slots) & sees_N[slot * layout.slots + inside])
        if sliding_window is None:
            return allowed
        seen_depth = torch.where(seen < 0, seen, layout.depth_Q[inside])
        return allowed & (seen_depth > layout.depth_Q[slot] - sliding_window)

    return of_chain if layout.is_chain else of_tree


def attention_mask(
    layout: Layout, lengths_B: torch.Tensor, key_column_K: torch.Tensor, sliding_window: int | None = None
) -> torch.Tensor:
    """`visibility` as a dense mask.

    Args:
        lengths_B, sliding_window: as there.
        key_column_K: 0, 1, 2, .., the part of the cache that is read.

    Returns:
        bool `(B, 1, Q, K)`, True where attention is allowed.
    """
    if layout.is_chain:
        position_BQ1 = (lengths_B[:, None] + layout.depth_Q)[..., None]
        allowed_BQK = key_column_K <= position_BQ1
        if sliding_window is not None:
            allowed_BQK &= key_column_K > position_BQ1 - sliding_window
        return allowed_BQK[:, None]
    batch, slots = len(lengths_B), layout.slots
    # The rule of a tree looks each pair of slot and column up; the few columns of the step are scattered instead, which is much less work.
    cached_BQK = (key_column_K < lengths_B[:, None])[:, None].expand(-1, slots, -1)
    sees_QQ = layout.sees_QQ
    if sliding_window is not None:
        depth_Q1 = layout.depth_Q[:, None]
        cached_BQK = cached_BQK & (key_column_K > lengths_B[:, None, None] + depth_Q1 - sliding_window)
        sees_QQ = sees_QQ & (layout.depth_Q > depth_Q1 - sliding_window)
    index_BQQ = (lengths_B[:, None] + torch.arange(slots, device=key_column_K.device))[:, None].expand(-1, slots, -1)
    return cached_BQK.scatter(2, index_BQQ, sees_QQ.expand(batch, -1, -1))[:, None]


def mask_table(layout: Layout, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """What the mask of a step of full attention is made of, whatever the lengths.

    A sliding window would need a column for each position that it reaches, which is much to keep for every layout.

    Args:
        groups: query heads per key/value head.

    Returns:
        additive `(groups * Q, Q + 1)`: one column for each slot, of which the first, that every slot sees, stands for all that are cached
        too, and one for all behind the slots.
    """
    key = (groups, dtype)
    if key not in layout.tables:
        device = layout.depth_Q.device
        columns = torch.arange(layout.slots + 1, device=device)
        allowed_QX = attention_mask(layout, torch.zeros(1, dtype=torch.long, device=device), columns)[0, 0]
        layout.tables[key] = torch.where(allowed_QX, 0.0, float("-inf")).to(dtype).repeat(groups, 1)
    return layout.tables[key]


def mask_from_table(table_QX: torch.Tensor, lengths_B: torch.Tensor, key_column_K: torch.Tensor) -> torch.Tensor:
    """`attention_mask` by looking it up in `mask_table`: additive `(B, 1, groups * Q, K)`."""
    place_BK = (key_column_K - lengths_B[:, None]).clamp_(0, table_QX.shape[1] - 1)
    mask_QN = table_QX.index_select(1, place_BK.view(-1))
    if place_BK.shape[0] == 1:
        return mask_QN.view(1, 1, *mask_QN.shape)
    return mask_QN.view(-1, *place_BK.shape).transpose(0, 1).contiguous()[:, None]


def block_mask(
    layout: Layout, lengths_B: torch.Tensor, key_column_K: torch.Tensor, sliding_window: int | None = None
) -> BlockMask:
    """`visibility` as FlexAttention takes it: every row reads the blocks of columns that it uses, whatever the longest row has.

    Which blocks these are follows from the lengths, so nothing of size `(Q, K)` is made. Arguments as in `attention_mask`.
    """
    device, slots, columns = key_column_K.device, layout.slots, key_column_K.shape[0]
    last_block = -(-columns // FLEX_BLOCK) - 1
    first_X = torch.arange(0, slots, FLEX_BLOCK, device=device)  # slot with which each block of queries begins
    # Slots of a tree see slots of any number, those of a chain none behind their own.
    end_X = (first_X + FLEX_BLOCK).clamp(max=slots) if layout.is_chain else torch.full_like(first_X, slots)
    earliest_X = first_X if layout.is_chain else torch.zeros_like(first_X)
    end_BX = -(-(lengths_B[:, None] + end_X) // FLEX_BLOCK)
    if sliding_window is None:
        start_BX = (lengths_B[:, None] + earliest_X) // FLEX_BLOCK  # every query of the block sees all before it
    else:
        start_BX = (lengths_B[:, None] + earliest_X + 1 - sliding_window).clamp(min=0) // FLEX_BLOCK
    # One more than there are: a compiled step would take a single block for another kind of tensor.
    number_Y = torch.arange(last_block + 2, device=device)
    partial_BXY = (start_BX[..., None] + number_Y).clamp(max=last_block)
    whole_BXY = number_Y.clamp(max=last_block).expand_as(partial_BXY)
    sees = visibility(layout, lengths_B, sliding_window)

    def mask_mod(row: torch.Tensor, head: torch.Tensor, slot: torch.Tensor, column: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        return sees(row, slot, column)

    return BlockMask.from_kv_blocks(
        (end_BX - start_BX)[:, None].int(),
        partial_BXY[:, None].int(),
        start_BX[:, None].int() if sliding_window is None else None,
        whole_BXY[:, None].int().contiguous() if sliding_window is None else None,
        FLEX_BLOCK,
        mask_mod,
        (slots, columns),
    )
