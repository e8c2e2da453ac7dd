"""Which guesses of a step the model accepts, if all slots can be scored at once.

Shapes: B rows, Q slots of a forward, S segments, N guesses of a segment, D depths (D = 1 + N), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jacobi_hf.decoding.selection import accepted_prefixes

if TYPE_CHECKING:
    from jacobi_hf.decoding.choice import Choice
    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.state import DecodingState
    from jacobi_hf.decoding.step import StepInputs


@dataclass(frozen=True)
class Acceptance:
    """What the model chose in a step, and which guesses it accepted.

    Attributes:
        choice_BQ: the token chosen at every slot: by the model, in draft slots by the drafter; a pad in rows that had
            halted before the step.
        agrees_BSN: whether each guess of each segment equals the choice at the slot that comes before it in the text;
            also filled in for guesses that are not valid.
        accepted_BS: how many valid guesses of each segment agree, up to the first that does not; for a branch, the
            backbone guesses before it count too.
        best_B: the segment that won in each row: of the verified ones, the one with the most accepted guesses.
        path_BD: the slots of that segment by depth; `(1, D)` if there is only one verified segment.
        run_BD: the choices along that path, of which the first `count_B` are committed.
        count_B: tokens to commit.
        halted_B: whether each row has met an end token, before this step or in the last of these tokens. A row that
            has all its tokens by the limit alone is not halted.
        broken_B: 1 where a committed token was sampled from scores that are no distribution (NaN), else 0; None in
            greedy decoding.
        ranked_BQR: the best tokens of each slot, the best one first, as many as the draft sources read
            (`SourceShape.ranks`); None if they read none.
    """

    choice_BQ: torch.Tensor
    agrees_BSN: torch.Tensor
    accepted_BS: torch.Tensor
    best_B: torch.Tensor
    path_BD: torch.Tensor
    run_BD: torch.Tensor
    count_B: torch.Tensor
    halted_B: torch.Tensor
    broken_B: torch.Tensor | None = None
    ranked_BQR: torch.Tensor | None = None


def accept(state: DecodingState, inputs: StepInputs, choice: Choice, *, may_be_over: bool = True) -> Acceptance:
    """Find the segment with the longest accepted prefix.

    On ties the backbone wins, because its keys and values need no move, and then the branch that comes first.

    Args:
        state: the rows; they are only read.
        inputs: the tokens of the step.
        choice: what the model chooses at every slot.
        may_be_over: as in `advance`.
    """
    layout = inputs.layout
    choice_BQ = choice.token_BQ
    if may_be_over:
        choice_BQ = torch.where(state.halted_B[:, None], state.pad, choice_BQ)
    if layout.slots == 1 and not may_be_over:
        return _of_one_slot(state, layout, choice)
    agrees_BSN, accepted_BS = accepted_prefixes(layout, inputs.token_BQ, choice_BQ, inputs.length_BS)
    if layout.verified_segments == 1:
        best_B = state.zeros_B
        accepted_B = accepted_BS[:, 0]
        path_BD = layout.path_SD if layout.is_chain else layout.path_SD[:1]
        run_BD = choice_BQ if layout.is_chain else choice_BQ[:, layout.path_SD[0]]
    else:
        rank_S = layout.rank_S[: layout.verified_segments]
        best_B = (accepted_BS[:, : layout.verified_segments] * len(rank_S) - rank_S).max(1).indices
        path_BD = layout.path_SD[best_B]
        run_BD = choice_BQ.gather(1, path_BD)
        accepted_B = accepted_BS.gather(1, best_B[:, None])[:, 0]
    count_B, halted_B = _cut(state, run_BD, accepted_B + 1, layout.offset_D, may_be_over=may_be_over)
    broken_B = None
    if choice.broken_BQ is not None:
        broken_BD = choice.broken_BQ.gather(1, path_BD.expand_as(run_BD)) & (layout.offset_D < count_B[:, None])
        broken_B = broken_BD.long().amax(1)
    ranked_BQR = choice.ranked_BQR
    return Acceptance(
        choice_BQ, agrees_BSN, accepted_BS, best_B, path_BD, run_BD, count_B, halted_B, broken_B, ranked_BQR
    )


def _of_one_slot(state: DecodingState, layout: Layout, choice: Choice) -> Acceptance:
    """Return what a step without guesses accepts where no row has ended: the choice after the pending token."""
    halted_B = state.halted_B
    if state.eos_E.numel():
        halted_B = _is_one_of(choice.token_BQ, state.eos_E)[:, 0]
    broken_B = None if choice.broken_BQ is None else choice.broken_BQ[:, 0].long()
    return Acceptance(
        choice_BQ=choice.token_BQ,
        agrees_BSN=state.nothing_B10,
        accepted_BS=state.zeros_B1,
        best_B=state.zeros_B,
        path_BD=layout.path_SD[:1],
        run_BD=choice.token_BQ,
        count_B=state.ones_B,
        halted_B=halted_B,
        broken_B=broken_B,
        ranked_BQR=choice.ranked_BQR,
    )


def _is_one_of(token: torch.Tensor, ids_E: torch.Tensor) -> torch.Tensor:
    first, *others = ids_E.unbind()
    is_one = token == first
    for other in others:
        is_one = is_one | (token == other)
    return is_one


def _cut(
    state: DecodingState, run_BD: torch.Tensor, count_B: torch.Tensor, offset_D: torch.Tensor, *, may_be_over: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many tokens of each run are committed, and which rows have halted then.

    A run is cut after its first end token or at the limit, whichever comes first. A row that had halted before commits
    nothing, unless such rows go on as pads (`state.fills`).
    """
    if may_be_over:  # otherwise `DecodingState.clip` has cut the guesses to the limit
        count_B = state.limited(count_B)
    halted_B = state.halted_B
    if state.eos_E.numel():
        is_end_BD = _is_one_of(run_BD, state.eos_E)
        # A reduction of integers: inductor writes C++ that does not compile for reductions of bools (torch 2.13).
        first_B = torch.where(is_end_BD, offset_D, offset_D.shape[0]).amin(1)
        ends_B = first_B < count_B
        if may_be_over:
            ends_B = ends_B & ~state.halted_B
        count_B = torch.where(ends_B, first_B + 1, count_B)
        halted_B = halted_B | ends_B
    if may_be_over and not state.fills:
        count_B = count_B.masked_fill(state.halted_B, 0)
    return count_B, halted_B
