"""Attention masks of a step: which cached tokens and which slots each slot attends to.

There is one rule, `visibility_rule`, and a form of it for each kernel. All of them take the layout of the step's
slots, the number of cached tokens of each row, and optionally a sliding window. Key column c of a row holds cached
token c if there is one, otherwise the slots of the step, one after the other.

The figures have a line for each query and a mark for each key column. The query attends where the mark is `#`. Labels
are t for a cached token, p for the pending token, w for a guess of the window, b for a guess of a branch, d for a
draft slot, and - for a column after the step's slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.attention.flex_attention import BlockMask

if TYPE_CHECKING:
    from jacobi_hf.decoding.layout import Layout

VisibilityRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FLEX_BLOCK = 128


def visibility_rule(layout: Layout, lengths_B: torch.Tensor, sliding_window: int | None = None) -> VisibilityRule:
    """Return the rule `(row, slot, key column) -> bool` that says whether a slot attends to a key column.

    A slot attends to all cached tokens of its row, to the pending token, to the window's guesses that its segment
    follows, and to its own segment up to itself.

    Figure: a window of 2 guesses, a branch of 2 guesses that follows w1,
    and 2 draft slots, after 2 cached tokens.

              t0 t1  p w1 w2 b1 b2 d1 d2
         p     #  #  #  .  .  .  .  .  .
         w1    #  #  #  #  .  .  .  .  .
         w2    #  #  #  #  #  .  .  .  .
         b1    #  #  #  #  .  #  .  .  .
         b2    #  #  #  #  .  #  #  .  .
         d1    #  #  #  .  .  .  .  #  .
         d2    #  #  #  .  .  .  .  #  #

    Args:
        layout: the step's slots.
        lengths_B: cached tokens of each row.
        sliding_window: positions that a query may look back, itself included; None for full attention.

    Returns:
        a function of three index tensors that broadcast against each other, on the device of `lengths_B`.
    """
    sees_flat = layout.sees_QQ.flatten()  # one index is looked up faster than two

    def of_chain(row: torch.Tensor, slot: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        position = lengths_B[row] + slot
        allowed = column <= position
        return allowed if sliding_window is None else allowed & (column > position - sliding_window)

    def of_tree(row: torch.Tensor, slot: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        seen = column - lengths_B[row]
        inside = seen.clamp(0, layout.slots - 1)
        allowed = (seen < 0) | ((seen < layout.slots) & sees_flat[slot * layout.slots + inside])
        if sliding_window is None:
            return allowed
        seen_depth = torch.where(seen < 0, seen, layout.depth_Q[inside])
        return allowed & (seen_depth > layout.depth_Q[slot] - sliding_window)

    return of_chain if layout.is_chain else of_tree


def attention_mask(
    layout: Layout, lengths_B: torch.Tensor, key_column_K: torch.Tensor, sliding_window: int | None = None
) -> torch.Tensor:
    """Return the rule as a dense mask.

    Figure: a window of 2 guesses and a branch of 2 guesses that follows w1, with a sliding window of 3 positions. The
    first row has 3 cached tokens, the second has 1. Slots w2 and b1 have the same depth, hence the same position.

              t0 t1 t2  p w1 w2 b1 b2
         p     .  #  #  #  .  .  .  .
         w1    .  .  #  #  #  .  .  .
         w2    .  .  .  #  #  #  .  .
         b1    .  .  .  #  #  .  #  .
         b2    .  .  .  .  #  .  #  #

              t0  p w1 w2 b1 b2  -  -
         p     #  #  .  .  .  .  .  .
         w1    #  #  #  .  .  .  .  .
         w2    .  #  #  #  .  .  .  .
         b1    .  #  #  .  #  .  .  .
         b2    .  .  #  .  #  #  .  .

    Args:
        layout: the step's slots.
        lengths_B: cached tokens of each row.
        key_column_K: 0, 1, 2, .., the key columns that attention reads.
        sliding_window: positions that a query may look back, itself included; None for full attention.

    Returns:
        bool `(B, 1, Q, K)`, True where attention is allowed.
    """
    if layout.is_chain:
        position_BQ1 = (lengths_B[:, None] + layout.depth_Q)[..., None]
        allowed_BQK = key_column_K <= position_BQ1
        if sliding_window is not None:
            allowed_BQK &= key_column_K > position_BQ1 - sliding_window
        return allowed_BQK[:, None]
    batch = len(lengths_B)
    slots = layout.slots
    # The rule of a tree looks up each pair of slot and column. Scattering the step's few columns is much less work.
    cached_BQK = (key_column_K < lengths_B[:, None])[:, None].expand(-1, slots, -1)
    sees_QQ = layout.sees_QQ
    if sliding_window is not None:
        depth_Q1 = layout.depth_Q[:, None]
        cached_BQK = cached_BQK & (key_column_K > lengths_B[:, None, None] + depth_Q1 - sliding_window)
        sees_QQ = sees_QQ & (layout.depth_Q > depth_Q1 - sliding_window)
    column_BQ = lengths_B[:, None] + torch.arange(slots, device=key_column_K.device)
    index_BQQ = column_BQ[:, None].expand(-1, slots, -1)
    return cached_BQK.scatter(2, index_BQQ, sees_QQ.expand(batch, -1, -1))[:, None]


def mask_table(layout: Layout, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a table from which `mask_from_table` takes the mask of full attention for any number of cached tokens.

    The table has a column for each slot and one for all columns after them. The column of the pending token also
    stands for the cached tokens, because every slot attends to both. A sliding window has no table: it would need a
    column for each position that it reaches.

    Figure: a window of 2 guesses and a branch of 1 guess that follows the pending token; the table has 0 where the
    mark is `#`, and -inf elsewhere.

               p w1 w2 b1  -
         p     #  .  .  .  .
         w1    #  #  .  .  .
         w2    #  #  #  .  .
         b1    #  .  .  #  .

    Args:
        layout: the step's slots. The table is kept in `layout.tables`.
        groups: query heads for each key/value head.
        dtype: of the table.

    Returns:
        additive `(groups * Q, Q + 1)`.
    """
    key = (groups, dtype)
    if key not in layout.tables:
        device = layout.depth_Q.device
        columns = torch.arange(layout.slots + 1, device=device)
        allowed = attention_mask(layout, torch.zeros(1, dtype=torch.long, device=device), columns)[0, 0]
        layout.tables[key] = torch.where(allowed, 0.0, float("-inf")).to(dtype).repeat(groups, 1)
    return layout.tables[key]


def mask_from_table(table: torch.Tensor, lengths_B: torch.Tensor, key_column_K: torch.Tensor) -> torch.Tensor:
    """Return the mask of full attention, looked up in the table of `mask_table`.

    Figure: the table above, for a row of 2 cached tokens and 8 key columns. The columns t0, t1 and p repeat column p
    of the table; the last two repeat its last one.

              t0 t1  p w1 w2 b1  -  -
         p     #  #  #  .  .  .  .  .
         w1    #  #  #  #  .  .  .  .
         w2    #  #  #  #  #  .  .  .
         b1    #  #  #  .  .  #  .  .

    Args:
        table: as `mask_table` returns it.
        lengths_B: cached tokens of each row.
        key_column_K: 0, 1, 2, .., the key columns that attention reads.

    Returns:
        additive `(B, 1, groups * Q, K)`.
    """
    place_BK = (key_column_K - lengths_B[:, None]).clamp_(0, table.shape[1] - 1)
    mask = table.index_select(1, place_BK.view(-1))  # (groups * Q, B * K)
    if place_BK.shape[0] == 1:
        return mask.view(1, 1, *mask.shape)
    return mask.view(-1, *place_BK.shape).transpose(0, 1).contiguous()[:, None]


def block_mask(
    layout: Layout, lengths_B: torch.Tensor, key_column_K: torch.Tensor, sliding_window: int | None = None
) -> BlockMask:
    """Return the rule as FlexAttention takes it: for each row, the blocks of `FLEX_BLOCK` key columns that are read.

    A row reads its own blocks only, however long the longest row is. The blocks follow from the lengths, so nothing of
    size `(Q, K)` is made. In a whole block (`#`) every query attends to every column; in a partial block (`+`) the
    kernel asks the rule; other blocks (`.`) are not read.

    Figure: a chain of 200 slots after 300 cached tokens, with 640 key columns. Line q0 is the block of slots 0 to 127,
    q1 that of slots 128 to 199; k0 is the block of key columns 0 to 127, and so on.

              k0 k1 k2 k3 k4
         q0    #  #  +  +  .
         q1    #  #  #  +  .

    Args:
        layout: the step's slots.
        lengths_B: cached tokens of each row.
        key_column_K: 0, 1, 2, .., the key columns that may be read.
        sliding_window: positions that a query may look back, itself included; None for full attention. With a sliding
            window all blocks that are read are partial.
    """
    columns = key_column_K.shape[0]
    last_block = -(-columns // FLEX_BLOCK) - 1
    start, end = _partial_blocks(layout, lengths_B, sliding_window)
    # One number more than there are blocks: a compiled step would take an axis of size one for another kind of tensor.
    number = torch.arange(last_block + 2, device=key_column_K.device)
    partial = (start[..., None] + number).clamp(max=last_block)
    whole = number.clamp(max=last_block).expand_as(partial)
    rule = visibility_rule(layout, lengths_B, sliding_window)

    def mask_mod(row: torch.Tensor, _head: torch.Tensor, slot: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return rule(row, slot, column)

    return BlockMask.from_kv_blocks(
        (end - start)[:, None].int(),
        partial[:, None].int(),
        start[:, None].int() if sliding_window is None else None,
        whole[:, None].int().contiguous() if sliding_window is None else None,
        FLEX_BLOCK,
        mask_mod,
        (layout.slots, columns),
    )


def is_step_block_mask(mask: BlockMask) -> bool:
    """Return whether `block_mask` made a mask."""
    return getattr(mask.mask_mod, "__module__", None) == __name__


def _partial_blocks(
    layout: Layout, lengths_B: torch.Tensor, sliding_window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each block of queries, its first partial key block and the end of its key blocks.

    Both are `(B, blocks of queries)`.
    The blocks before the first partial one are whole with full attention, and not read with a sliding window.
    """
    slots = layout.slots
    first_slot = torch.arange(0, slots, FLEX_BLOCK, device=lengths_B.device)
    # A slot of a chain attends to no slot after itself; a slot of a tree may attend to a slot of any number.
    first_seen = first_slot if layout.is_chain else torch.zeros_like(first_slot)
    end_seen = (first_slot + FLEX_BLOCK).clamp(max=slots) if layout.is_chain else torch.full_like(first_slot, slots)
    end = -(-(lengths_B[:, None] + end_seen) // FLEX_BLOCK)
    if sliding_window is None:
        return (lengths_B[:, None] + first_seen) // FLEX_BLOCK, end
    return (lengths_B[:, None] + first_seen + 1 - sliding_window).clamp(min=0) // FLEX_BLOCK, end
