"""The slots of one forward: the pending token, the window behind it, and candidate branches, as a tree.

A *segment* is a run of guesses for the tokens that follow the pending one. Segment 0 is the window; every other segment is a
branch. All segments hang on the pending token (slot 0), so a slot is told by its segment and its *depth*, the number of tokens
between it and the pending one.

Under a drafter there are two *streams*: the clean one, of all these, runs with the model's weights and verifies; the noisy one, a last
segment that repeats the window, runs with the drafter's and drafts. To the mask it is one more branch, which no other segment sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Layout:
    """Where each guess of a step sits and what it may see.

    Attributes:
        lengths: tokens per segment, window first.
        depth_Q: distance of each slot from the pending token.
        sees_QQ: `[q, k]` is True where slot q attends to slot k: the pending token, and its own segment up to itself.
        path_SD: slot of segment s at depth d, `D = 1 + max(lengths)`; beyond a segment's end its last slot is repeated.
        offset_D, rank_S: 0, 1, 2, ..
        noisy: slots of the noisy stream, the last ones; 0 without a drafter.
    """

    lengths: tuple[int, ...]
    depth_Q: torch.Tensor
    sees_QQ: torch.Tensor
    path_SD: torch.Tensor
    offset_D: torch.Tensor
    rank_S: torch.Tensor
    noisy: int = 0

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
def build_layout(lengths: tuple[int, ...], device: torch.device, noisy: int = 0) -> Layout:
    """The layout of a window of `lengths[0]` guesses and branches of `lengths[1:]`, and under a drafter `noisy` guesses of its stream."""
    lengths = (*lengths, noisy) if noisy else lengths
    depths, segments, paths = [0], [-1], []
    for number, length in enumerate(lengths):
        first = len(depths)
        depths += range(1, length + 1)
        segments += [number] * length
        paths.append([0, *range(first, first + length)])
    deepest = max(map(len, paths))
    path_SD = torch.tensor([path + [path[-1]] * (deepest - len(path)) for path in paths], device=device)
    depth_Q, segment_Q = torch.tensor(depths, device=device), torch.tensor(segments, device=device)
    sees_QQ = (segment_Q[:, None] == segment_Q) & (depth_Q[:, None] >= depth_Q)
    sees_QQ[:, 0] = True
    offset_D, rank_S = torch.arange(deepest, device=device), torch.arange(len(lengths), device=device)
    return Layout(lengths, depth_Q, sees_QQ, path_SD, offset_D, rank_S, noisy)


def attention_mask(layout: Layout, lengths_B: torch.Tensor, column_S: torch.Tensor, sliding_window: int | None = None) -> torch.Tensor:
    """Who sees whom when a step's slots are written behind `lengths_B` cached tokens.

    Column c of row b is cached token c for `c < lengths_B[b]`, and slot `c - lengths_B[b]` of this step from there on.

    Args:
        lengths_B: cached tokens per row.
        column_S: 0, 1, 2, .., the part of the cache that is read.
        sliding_window: positions that a query may look back, itself included; None for full attention.

    Returns:
        bool `(B, 1, Q, S)`, True where attention is allowed.
    """
    position_BQ1 = (lengths_B[:, None] + layout.depth_Q)[..., None]
    if layout.is_chain:
        allowed_BQS = column_S <= position_BQ1
        column_position_BS = column_S[None]
    else:
        slot_BS = column_S - lengths_B[:, None]
        safe_BS = slot_BS.clamp(0, layout.slots - 1)
        in_step_BS = (slot_BS >= 0) & (slot_BS < layout.slots)
        allowed_BQS = layout.sees_QQ[:, safe_BS].transpose(0, 1) & in_step_BS[:, None]
        allowed_BQS |= (slot_BS < 0)[:, None]
        column_position_BS = torch.where(slot_BS < 0, column_S, lengths_B[:, None] + layout.depth_Q[safe_BS])
    if sliding_window is not None:
        allowed_BQS &= column_position_BS[:, None] > position_BQ1 - sliding_window
    return allowed_BQS[:, None]


def chain_layout(length: int, device: torch.device) -> Layout:
    """A plain causal chain of `length` slots, as a prefill is; its `sees_QQ` is never needed and stays empty."""
    depth_Q = torch.arange(length, device=device)
    return Layout((length - 1,), depth_Q, torch.empty(0, 0, dtype=torch.bool, device=device), depth_Q[None], depth_Q, depth_Q[:1])
