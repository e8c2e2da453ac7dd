"""The slots of one forward: the pending token, the window behind it, and candidate branches, as a tree.

A *segment* is a run of guesses for the tokens that follow the pending one. Segment 0 is the window; every other segment is a
branch. Segments hang on the pending token (slot 0), or on one of the window's first guesses, so a slot is told by its segment and its
*depth*, the number of tokens between it and the pending one.

Under a drafter there are two *streams*: the clean one, of all these, runs with the model's weights and verifies; the noisy one, a last
segment that repeats the window, runs with the drafter's and drafts. To the mask it is one more branch, which no other segment sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask

Sees = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FLEX_BLOCK = 128


@dataclass(frozen=True)
class Layout:
    """Where each guess of a step sits and what it may see.

    Attributes:
        lengths: tokens per segment, window first.
        depth_Q: distance of each slot from the pending token.
        sees_QQ: `[q, k]` is True where slot q attends to slot k: the pending token, the guesses of the window that its segment hangs on,
            and its own segment up to itself.
        path_SD: slot of segment s at depth d, `D = 1 + max(lengths)`; beyond a segment's end its last slot is repeated.
        offset_D, rank_S: 0, 1, 2, ..
        noisy: slots of the noisy stream, the last ones; 0 without a drafter.
        without_past: whether the host knows that no row has a token in the cache, so that column c is slot c.
        tables: of `mask_table`, kept here so that they live as long as a recorded step that reads them.
    """

    lengths: tuple[int, ...]
    depth_Q: torch.Tensor
    sees_QQ: torch.Tensor
    path_SD: torch.Tensor
    offset_D: torch.Tensor
    rank_S: torch.Tensor
    noisy: int = 0
    without_past: bool = False
    tables: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def contenders(self) -> int:
        """Segments that the model verifies: all but the noisy stream."""
        return len(self.lengths) - (self.noisy > 0)

    @property
    def drafting(self) -> int:
        """The segment whose choices are the next guesses of the window."""
        return len(self.lengths) - 1 if self.noisy else 0

    @property
    def slots(self) -> int:
        """Q, the positions that one forward computes."""
        return 1 + sum(self.lengths)

    @property
    def is_chain(self) -> bool:
        """Whether there is a window alone, so that plain causality is the mask."""
        return len(self.lengths) == 1


@lru_cache(maxsize=256)
def build_layout(
    lengths: tuple[int, ...], device: torch.device, noisy: int = 0, starts: tuple[int, ...] = ()
) -> Layout:
    """The layout of a window of `lengths[0]` guesses and branches of `lengths[1:]`.

    Args:
        noisy: under a drafter, guesses of its stream.
        starts: for each branch, the guesses of the window that it follows, at most `lengths[0]`; none by default.
    """
    lengths = (*lengths, noisy) if noisy else lengths
    depths, segments, paths = [0], [-1], []
    for number, length in enumerate(lengths):
        start = starts[number - 1] if 0 < number <= len(starts) else 0
        first = len(depths)
        depths += range(start + 1, start + length + 1)
        segments += [number] * length
        paths.append([*range(start + 1), *range(first, first + length)])
    deepest = max(map(len, paths))
    path_SD = torch.tensor([path + [path[-1]] * (deepest - len(path)) for path in paths], device=device)
    depth_Q, segment_Q = torch.tensor(depths, device=device), torch.tensor(segments, device=device)
    sees_QQ = (segment_Q[:, None] == segment_Q) & (depth_Q[:, None] >= depth_Q)
    for number, start in enumerate(starts, 1):
        sees_QQ[segment_Q == number, 1 : start + 1] = True
    sees_QQ[:, 0] = True
    offset_D, rank_S = torch.arange(deepest, device=device), torch.arange(len(lengths), device=device)
    return Layout(lengths, depth_Q, sees_QQ, path_SD, offset_D, rank_S, noisy)


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
    layout: Layout, lengths_B: torch.Tensor, column_S: torch.Tensor, sliding_window: int | None = None
) -> torch.Tensor:
    """`visibility` as a dense mask.

    Args:
        lengths_B, sliding_window: as there.
        column_S: 0, 1, 2, .., the part of the cache that is read.

    Returns:
        bool `(B, 1, Q, S)`, True where attention is allowed.
    """
    if layout.is_chain:
        position_BQ1 = (lengths_B[:, None] + layout.depth_Q)[..., None]
        allowed_BQS = column_S <= position_BQ1
        if sliding_window is not None:
            allowed_BQS &= column_S > position_BQ1 - sliding_window
        return allowed_BQS[:, None]
    batch, slots = len(lengths_B), layout.slots
    # The rule of a tree looks each pair of slot and column up; the few columns of the step are scattered instead, which is much less work.
    cached_BQS = (column_S < lengths_B[:, None])[:, None].expand(-1, slots, -1)
    sees_QQ = layout.sees_QQ
    if sliding_window is not None:
        depth_Q1 = layout.depth_Q[:, None]
        cached_BQS = cached_BQS & (column_S > lengths_B[:, None, None] + depth_Q1 - sliding_window)
        sees_QQ = sees_QQ & (layout.depth_Q > depth_Q1 - sliding_window)
    index_BQQ = (lengths_B[:, None] + torch.arange(slots, device=column_S.device))[:, None].expand(-1, slots, -1)
    return cached_BQS.scatter(2, index_BQQ, sees_QQ.expand(batch, -1, -1))[:, None]


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


def mask_from_table(table_QX: torch.Tensor, lengths_B: torch.Tensor, column_S: torch.Tensor) -> torch.Tensor:
    """`attention_mask` by looking it up in `mask_table`: additive `(B, 1, groups * Q, S)`."""
    place_BS = (column_S - lengths_B[:, None]).clamp_(0, table_QX.shape[1] - 1)
    mask_QN = table_QX.index_select(1, place_BS.view(-1))
    if place_BS.shape[0] == 1:
        return mask_QN.view(1, 1, *mask_QN.shape)
    return mask_QN.view(-1, *place_BS.shape).transpose(0, 1).contiguous()[:, None]


def block_mask(
    layout: Layout, lengths_B: torch.Tensor, column_S: torch.Tensor, sliding_window: int | None = None
) -> BlockMask:
    """`visibility` as FlexAttention takes it: every row reads the blocks of columns that it uses, whatever the longest row has.

    Which blocks these are follows from the lengths, so nothing of size `(Q, S)` is made. Arguments as in `attention_mask`.
    """
    device, slots, columns = column_S.device, layout.slots, column_S.shape[0]
    last_block = -(-columns // FLEX_BLOCK) - 1
    first_T = torch.arange(0, slots, FLEX_BLOCK, device=device)  # slot with which each block of queries begins
    # Slots of a tree see slots of any number, those of a chain none behind their own.
    end_T = (first_T + FLEX_BLOCK).clamp(max=slots) if layout.is_chain else torch.full_like(first_T, slots)
    earliest_T = first_T if layout.is_chain else torch.zeros_like(first_T)
    end_BT = -(-(lengths_B[:, None] + end_T) // FLEX_BLOCK)
    if sliding_window is None:
        start_BT = (lengths_B[:, None] + earliest_T) // FLEX_BLOCK  # every query of the block sees all before it
    else:
        start_BT = (lengths_B[:, None] + earliest_T + 1 - sliding_window).clamp(min=0) // FLEX_BLOCK
    # One more than there are: a compiled step would take a single block for another kind of tensor.
    number_K = torch.arange(last_block + 2, device=device)
    partial_BTK = (start_BT[..., None] + number_K).clamp(max=last_block)
    whole_BTK = number_K.clamp(max=last_block).expand_as(partial_BTK)
    sees = visibility(layout, lengths_B, sliding_window)

    def mask_mod(row: torch.Tensor, head: torch.Tensor, slot: torch.Tensor, column: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        return sees(row, slot, column)

    return BlockMask.from_kv_blocks(
        (end_BT - start_BT)[:, None].int(),
        partial_BTK[:, None].int(),
        start_BT[:, None].int() if sliding_window is None else None,
        whole_BTK[:, None].int().contiguous() if sliding_window is None else None,
        FLEX_BLOCK,
        mask_mod,
        (slots, columns),
    )


def chain_layout(length: int, device: torch.device, *, without_past: bool = False) -> Layout:
    """A plain causal chain of `length` slots, as a prefill is; its `sees_QQ` is never needed and stays empty."""
    depth_Q, sees_QQ = torch.arange(length, device=device), torch.empty(0, 0, dtype=torch.bool, device=device)
    return Layout((length - 1,), depth_Q, sees_QQ, depth_Q[None], depth_Q, depth_Q[:1], without_past=without_past)
