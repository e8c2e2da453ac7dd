"""One decoding step: slots -> forward -> accept -> commit -> propose.

All of it is tensor operations over buffers that keep their address from step to step. Shapes depend only on `StepShape`,
which the host chooses, and nothing is read by the host in between. So the same step can run eagerly, compiled, or as a CUDA
graph (`jacobi_hf.execution`).

Shapes: B rows, Q slots of a forward, S segments, N guesses of a segment, D depths (D = 1 + N), V vocabulary, K key columns,
H hidden, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from jacobi_hf.decoding.layout import build_layout
from jacobi_hf.decoding.selection import accepted_prefixes, pick
from jacobi_hf.drafts.base import ProposalContext, StepOutcome, chain_slots

if TYPE_CHECKING:
    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.selection import Selector
    from jacobi_hf.decoding.state import DecodingState


@dataclass(frozen=True)
class StepShape:
    """The sizes of a step, chosen by the host.

    Attributes:
        backbone: guesses of the backbone that the model verifies.
        branches: tokens of each branch that the model verifies; a branch of 0 is left out.
        draft_slots: guesses of the backbone that also go into draft slots; 0 without such slots.
        starts: for each branch, the number of backbone guesses that it follows; empty: all 0.
    """

    backbone: int
    branches: tuple[int, ...]
    draft_slots: int = 0
    starts: tuple[int, ...] = ()

    def layout(self, device: torch.device) -> Layout:
        """Return the tree of slots of a step of this shape."""
        starts = tuple(start for start, used in zip(self.starts, self.branches, strict=False) if used)
        lengths = (self.backbone, *filter(None, self.branches))
        return build_layout(lengths, device, self.draft_slots, starts if any(starts) else ())


@dataclass(frozen=True)
class StepInputs:
    """The tokens of a step.

    Attributes:
        layout: where each slot sits.
        token_BQ: the pending token, the guesses of the backbone, those of the branches, and those in draft slots.
        length_BS: valid guesses of each segment.
    """

    layout: Layout
    token_BQ: torch.Tensor
    length_BS: torch.Tensor


@dataclass(frozen=True)
class ForwardInputs:
    """What a forward of the model is given.

    Attributes:
        layout: where each slot sits.
        key_column_K: 0, 1, 2, .., the columns of the cache that are read.
        token_BQ: a token for each slot; None when embeddings are given.
        embeds_BQH: an embedding for each slot, or None.
        keep_BN: the slots whose logits are wanted; None for all.
    """

    layout: Layout
    key_column_K: torch.Tensor
    token_BQ: torch.Tensor | None = None
    embeds_BQH: torch.Tensor | None = None
    keep_BN: torch.Tensor | None = None


@dataclass(frozen=True)
class ForwardOutput:
    """What a forward of the model returns.

    Attributes:
        logits_BQV: of every slot, or `(B, N, V)` of the slots `keep_BN`.
        features_BQF: outputs of the tapped layers at every slot, side by side; None without taps.
    """

    logits_BQV: torch.Tensor
    features_BQF: torch.Tensor | None = None


class Forward(Protocol):
    """A forward of the model over the slots of a layout, after the tokens that the cache holds."""

    def __call__(self, inputs: ForwardInputs) -> ForwardOutput:
        """Return logits and features; keys and values of the slots are written to the cache."""

    def needs_mask(self, slots: int, *, without_past: bool) -> bool:
        """Return whether a chain of `slots` slots needs a mask, which has the size `slots * slots`."""


@dataclass(frozen=True)
class Acceptance:
    """What the model chose in a step, and which guesses it accepted.

    Attributes:
        choice_BQ: the model's token at every slot (in draft slots the drafter's).
        agrees_BSN: whether each guess of each segment equals the choice one slot before it, valid or not.
        accepted_BS: accepted guesses of each segment, the longest prefix that agrees.
        best_B: the segment that won in each row, the one with the most accepted guesses.
        path_BD: the slots of that segment by depth.
        run_BD: the choices along that path, of which the first `count_B` are committed.
        count_B: tokens to commit.
        at_eos_B: whether the last of them ends the row.
        merit_BQV: the numbers of which each choice is the greatest: scores, or probabilities over sampling noise.
        broken_B: whether a committed token was sampled from what is no distribution; None for greedy decoding.
    """

    choice_BQ: torch.Tensor
    agrees_BSN: torch.Tensor
    accepted_BS: torch.Tensor
    best_B: torch.Tensor
    path_BD: torch.Tensor
    run_BD: torch.Tensor
    count_B: torch.Tensor
    at_eos_B: torch.Tensor
    merit_BQV: torch.Tensor
    broken_B: torch.Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What a caller may want of a step beside its tokens.

    Attributes:
        acceptance: what the model chose and accepted.
        logits_BQV: the model's logits at every slot.
        scores_BQV: the logits after the processors.
    """

    acceptance: Acceptance
    logits_BQV: torch.Tensor
    scores_BQV: torch.Tensor


def run_step(
    state: DecodingState,
    forward: Forward,
    selector: Selector,
    shape: StepShape,
    layout: Layout,
    key_column_K: torch.Tensor,
    text_columns: int | None = None,
    *,
    some_over: bool = True,
    may_look: bool = False,
) -> StepResult:
    """Run a whole step for a call whose processors can score all slots at once.

    Args:
        state: the rows; they are moved on.
        forward: the model.
        selector: processors, and the sampling noise of every slot's new-token index.
        shape: the sizes of the step.
        layout: `shape.layout(...)`.
        key_column_K: the columns of the cache that are read.
        text_columns, some_over, may_look: as in `advance`.
    """
    inputs = state.inputs(shape, layout)
    output = forward(ForwardInputs(layout, key_column_K, inputs.token_BQ))
    return finish_step(
        state, selector, inputs, output, text_columns=text_columns, some_over=some_over, may_look=may_look
    )


def finish_step(
    state: DecodingState,
    selector: Selector,
    inputs: StepInputs,
    output: ForwardOutput,
    *,
    text_columns: int | None = None,
    some_over: bool = True,
    may_look: bool = False,
) -> StepResult:
    """Do everything that comes after the forward of a step; arguments as in `run_step`."""
    scores_BQV = output.logits_BQV
    if selector.processors:
        scores_BQV = selector.scores(scores_BQV, inputs.layout, inputs.token_BQ)
    noise_BQV = None
    if selector.noise is not None:
        noise_BQV = selector.noise.at(state.generated_B[:, None] + inputs.layout.depth_Q)
    acceptance = accept(state, inputs, scores_BQV, noise_BQV, some_over=some_over)
    advance(state, inputs, acceptance, output.features_BQF, text_columns, some_over=some_over, may_look=may_look)
    selector.commit(acceptance.run_BD, acceptance.count_B)
    return StepResult(acceptance, output.logits_BQV, scores_BQV)


def accept(
    state: DecodingState,
    inputs: StepInputs,
    scores_BQV: torch.Tensor,
    noise_BQV: torch.Tensor | None,
    *,
    some_over: bool = True,
) -> Acceptance:
    """Choose a token at every slot and find the segment with the longest accepted prefix.

    On ties the backbone wins, because its keys and values need no move.

    Args:
        state: the rows; they are only read.
        inputs: the tokens of the step.
        scores_BQV: the logits after the processors.
        noise_BQV: sampling noise of each slot's new-token index; None for greedy decoding.
        some_over: as in `advance`.
    """
    layout = inputs.layout
    choice_BQ, broken_BQ, merit_BQV = pick(scores_BQV, noise_BQV)
    if some_over:
        choice_BQ = torch.where(state.halted_B[:, None], state.pad, choice_BQ)
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
    count_B, at_eos_B = _cut(state, run_BD, accepted_B + 1, layout.offset_D, some_over=some_over)
    broken_B = None
    if broken_BQ is not None:
        broken_BD = broken_BQ.gather(1, path_BD.expand_as(run_BD)) & (layout.offset_D < count_B[:, None])
        broken_B = broken_BD.long().amax(1)
    return Acceptance(
        choice_BQ, agrees_BSN, accepted_BS, best_B, path_BD, run_BD, count_B, at_eos_B, merit_BQV, broken_B
    )


def _cut(
    state: DecodingState, run_BD: torch.Tensor, count_B: torch.Tensor, offset_D: torch.Tensor, *, some_over: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many tokens of each run are committed, and whether the last of them ends the row.

    A run ends with its first end token and at the limit. A halted row commits nothing, unless finished rows go on as pads.
    """
    if some_over:  # otherwise `DecodingState.clip` has cut the guesses to the limit
        count_B = state.limited(count_B)
    at_eos_B = state.halted_B
    if state.eos_E.numel():
        first, *others = state.eos_E.unbind()
        is_end_BD = run_BD == first
        for end in others:
            is_end_BD = is_end_BD | (run_BD == end)
        # A reduction of integers: inductor writes C++ that does not compile for reductions of bools (torch 2.13).
        first_B = torch.where(is_end_BD, offset_D, offset_D.shape[0]).amin(1)
        ends_B = first_B < count_B
        if some_over:
            ends_B = ends_B & ~state.halted_B
        count_B = torch.where(ends_B, first_B + 1, count_B)
        at_eos_B = at_eos_B | ends_B
    if some_over and not state.fills:
        count_B = count_B.masked_fill(state.halted_B, 0)
    return count_B, at_eos_B


def advance(
    state: DecodingState,
    inputs: StepInputs,
    acceptance: Acceptance,
    features_BQF: torch.Tensor | None = None,
    text_columns: int | None = None,
    *,
    some_over: bool = True,
    may_look: bool = False,
) -> None:
    """Commit the accepted tokens, get the guesses of the next step, and write the report for the host.

    Args:
        state: the rows; they are moved on.
        inputs: the tokens of the step.
        acceptance: what the model accepted of them.
        features_BQF: outputs of the tapped layers, if any source reads some.
        text_columns: columns of the text that may be in use; all of them by default.
        some_over: False if the host knows that before this step no row had halted or had all its tokens.
        may_look: whether a value may be read by the host in between, which saves work on a CPU.
    """
    count_B = acceptance.count_B
    moves = inputs.layout.verified_segments > 1
    if moves and may_look:
        moves = bool(((acceptance.best_B > 0) & (count_B > 1)).any())
    state.commit(acceptance, inputs.layout, moves=moves)
    generated_B = state.generated_B + count_B
    propose(state, outcome_of(state, inputs, acceptance, generated_B, features_BQF), text_columns)
    state.generated_B.copy_(generated_B)
    if acceptance.at_eos_B is not state.halted_B:
        state.halted_B.copy_(acceptance.at_eos_B)
    state.clip(some_over=some_over)
    state.report(acceptance)


def outcome_of(
    state: DecodingState,
    inputs: StepInputs,
    acceptance: Acceptance,
    generated_B: torch.Tensor,
    features_BQF: torch.Tensor | None,
) -> StepOutcome:
    """Return the outcome of a step for the sources; `generated_B` counts the new tokens after it."""
    layout = inputs.layout
    segment = layout.draft_segment
    if layout.is_chain:
        choice_BD = acceptance.choice_BQ
        length_B1 = inputs.length_BS
    else:
        choice_BD = acceptance.choice_BQ[:, chain_slots(layout)]
        length_B1 = inputs.length_BS[:, segment : segment + 1]
    return StepOutcome(inputs, acceptance, state.generated_B, generated_B, choice_BD, length_B1, features_BQF)


def propose(state: DecodingState, outcome: StepOutcome, text_columns: int | None) -> None:
    """Let every source observe a step, then write what each proposes for the next one into the state."""
    sources = state.sources
    for source in sources.all:
        source.observe(outcome)
    text_BL = state.text_BL if text_columns is None else state.text_BL[:, :text_columns]
    context = ProposalContext(outcome, text_BL, state.length_B, state.pending_B1)
    if sources.backbone is not None:
        token_BSN, length_BS = sources.backbone.propose(context)
        state.backbone_BW.copy_(token_BSN[:, 0])
        state.width_B.copy_(length_BS[:, 0])
    context = ProposalContext(outcome, text_BL, state.length_B, state.pending_B1, state.backbone_BW)
    for source, (token_BSN, length_BS) in zip(sources.branching, state.branches, strict=True):
        proposed_BSN, valid_BS = source.propose(context)
        token_BSN.copy_(proposed_BSN)
        length_BS.copy_(valid_BS)
