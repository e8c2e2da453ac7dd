"""The slots of one forward, arranged as a tree: the pending token, the backbone after it, and branches.

A *segment* is a run of guesses. Segment 0 is the backbone, a chain of guesses that follows the pending token (slot 0).
Each further segment is a branch, which follows the pending token or one of the first guesses of the backbone. So a
slot is identified by its segment and its *depth*, the number of tokens from the pending token to the slot.

With a LoRA drafter there are *draft slots* too: a last segment, which repeats the backbone and runs with the drafter's
weights. The choices at its slots become the next guesses. It is not verified, and no other segment attends to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Layout:
    """The tree of slots of a forward: which segment a slot is in, its depth, and which slots it attends to.

    Attributes:
        lengths: guesses of each segment: the backbone, the branches, then the draft slots if there are any.
        depth_Q: depth of each slot.
        sees_QQ: bool; `[q, k]` is True where slot q attends to slot k. A slot attends to the pending token, to the
            guesses of the backbone that its segment follows, and to its own segment up to itself.
        path_SD: slot of each segment at each depth, from the pending token on. After its end a segment repeats its
            last slot.
        offset_D: 0, 1, 2, ..
        rank_S: 0, 1, 2, ..
        draft_slots: slots of the last segment, which run with a drafter's weights; 0 without such a segment.
        without_past: whether the host knows that no row has a token in the cache, so that key column c is slot c.
        tables: tables of `mask_table`, kept here so that they live as long as a CUDA graph that reads them.
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
        """Number of segments that the model verifies: all but the draft slots."""
        return len(self.lengths) - (self.draft_slots > 0)

    @property
    def draft_segment(self) -> int:
        """The segment whose choices become the next guesses: the draft slots if there are any, else the backbone."""
        return len(self.lengths) - 1 if self.draft_slots else 0

    @property
    def slots(self) -> int:
        """Q, the number of slots."""
        return 1 + sum(self.lengths)

    @property
    def is_chain(self) -> bool:
        """Whether there is a backbone alone, so that the mask is plain causality."""
        return len(self.lengths) == 1


@lru_cache(maxsize=256)
def build_layout(
    lengths: tuple[int, ...], device: torch.device, draft_slots: int = 0, starts: tuple[int, ...] = ()
) -> Layout:
    """Return the layout of a backbone and branches. Equal arguments get the same object.

    Args:
        lengths: guesses of the backbone, then of each branch.
        device: where the tensors of the layout are.
        draft_slots: slots that run with a drafter's weights, in a segment of their own.
        starts: for each branch, the number of backbone guesses that it follows, at most `lengths[0]`. Branches without
            a start follow the pending token.
    """
    lengths = (*lengths, draft_slots) if draft_slots else lengths
    depths = [0]
    segments = [-1]
    paths = []
    for segment, length in enumerate(lengths):
        start = starts[segment - 1] if 0 < segment <= len(starts) else 0
        first = len(depths)
        depths += range(start + 1, start + length + 1)
        segments += [segment] * length
        paths.append([*range(start + 1), *range(first, first + length)])
    deepest = max(map(len, paths))
    return Layout(
        lengths=lengths,
        depth_Q=torch.tensor(depths, device=device),
        sees_QQ=_visible_slots(depths, segments, starts).to(device),
        path_SD=torch.tensor([path + [path[-1]] * (deepest - len(path)) for path in paths], device=device),
        offset_D=torch.arange(deepest, device=device),
        rank_S=torch.arange(len(lengths), device=device),
        draft_slots=draft_slots,
    )


def _visible_slots(depths: list[int], segments: list[int], starts: tuple[int, ...]) -> torch.Tensor:
    """Return `sees_QQ` for slots of these depths and segments; the pending token is in segment -1."""
    depth_Q = torch.tensor(depths)
    segment_Q = torch.tensor(segments)
    sees_QQ = (segment_Q[:, None] == segment_Q) & (depth_Q[:, None] >= depth_Q)
    for branch, start in enumerate(starts, 1):
        sees_QQ[segment_Q == branch, 1 : start + 1] = True
    sees_QQ[:, 0] = True
    return sees_QQ


def chain_layout(length: int, device: torch.device, *, without_past: bool = False) -> Layout:
    """Return the layout of a chain, such as a prefill; its `sees_QQ` is empty, because no chain needs it.

    Args:
        length: slots of the chain.
        device: where the tensors of the layout are.
        without_past: whether no row has a token in the cache.
    """
    number_Q = torch.arange(length, device=device)
    return Layout(
        lengths=(length - 1,),
        depth_Q=number_Q,
        sees_QQ=torch.empty(0, 0, dtype=torch.bool, device=device),
        path_SD=number_Q[None],
        offset_D=number_Q,
        rank_S=number_Q[:1],
        without_past=without_past,
    )
