"""The slots of one forward: the pending token, the window behind it, and candidate branches, as a tree.

A *segment* is a run of guesses for the tokens that follow the pending one. Segment 0 is the window; every other segment is a
branch. Segments hang on the pending token (slot 0), or on one of the window's first guesses, so a slot is told by its segment and its
*depth*, the number of tokens between it and the pending one.

Under a drafter there are two *streams*: the clean one, of all these, runs with the model's weights and verifies; the noisy one, a last
segment that repeats the window, runs with the drafter's and drafts. To the mask it is one more branch, which no other segment sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch


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
        draft_slots: slots of the noisy stream, the last ones; 0 without a drafter.
        without_past: whether the host knows that no row has a token in the cache, so that column c is slot c.
        tables: of `mask_table`, kept here so that they live as long as a recorded step that reads them.
    """

    lengths: tuple[int, ...]
    depth_Q: torch.Tensor
    sees_QQ: torch.Tensor
    path_SD: torch.Tensor
    offset_D: torch.Tensor
    rank_S: torch.Tensor
    draft_slots: int = 0
    without_past: bool = False
    tables: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def verified_segments(self) -> int:
        """Segments that the model verifies: all but the noisy stream."""
        return len(self.lengths) - (self.draft_slots > 0)

    @property
    def draft_segment(self) -> int:
        """The segment whose choices are the next guesses of the window."""
        return len(self.lengths) - 1 if self.draft_slots else 0

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
    lengths: tuple[int, ...], device: torch.device, draft_slots: int = 0, starts: tuple[int, ...] = ()
) -> Layout:
    """The layout of a window of `lengths[0]` guesses and branches of `lengths[1:]`.

    Args:
        draft_slots: under a drafter, guesses of its stream.
        starts: for each branch, the guesses of the window that it follows, at most `lengths[0]`; none by default.
    """
    lengths = (*lengths, draft_slots) if draft_slots else lengths
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
    return Layout(lengths, depth_Q, sees_QQ, path_SD, offset_D, rank_S, draft_slots)


def chain_layout(length: int, device: torch.device, *, without_past: bool = False) -> Layout:
    """A plain causal chain of `length` slots, as a prefill is; its `sees_QQ` is never needed and stays empty."""
    depth_Q, sees_QQ = torch.arange(length, device=device), torch.empty(0, 0, dtype=torch.bool, device=device)
    return Layout((length - 1,), depth_Q, sees_QQ, depth_Q[None], depth_Q, depth_Q[:1], without_past=without_past)
