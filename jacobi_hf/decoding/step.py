"""One decoding step: build the slots, run the forward, accept guesses, commit tokens, propose new guesses.

A *slot* is one place of the forward. Slot 0 holds the pending token: the last token of the text, whose keys and values
are not in the cache yet. The other slots hold guesses in *segments*: the backbone, which follows the pending token,
and branches, which follow it or some guesses of the backbone. *Draft slots* hold the guesses of the backbone a second
time; a LoRA drafter acts on them, and nobody verifies them. `docs/glossary.md` has all words.

A step is tensor operations over buffers that keep their address from step to step, until they grow. The host chooses
the shapes (`StepShape` and the columns that are read) and, unless `host_may_read` is set, reads no value in between.
So the same step can run eagerly, compiled, or as a CUDA graph (`jacobi_hf.execution`).

Shapes: B rows, Q slots of a forward, S segments, N guesses of a segment, D depths (D = 1 + N), V vocabulary, K key
columns, H hidden, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from jacobi_hf.decoding.accept import Acceptance, accept
from jacobi_hf.decoding.layout import build_layout
from jacobi_hf.drafts.base import ProposalContext, StepOutcome, chain_slots

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.selection import Selector
    from jacobi_hf.decoding.state import DecodingState

    Record = Callable[["StepInputs", Acceptance, torch.Tensor], None]


@dataclass(frozen=True)
class StepShape:
    """The sizes of a step, chosen by the host.

    Attributes:
        backbone: guesses of the backbone that the model verifies.
        branches: guesses of each branch that the model verifies, without the backbone guesses before it; a branch of 0
            is left out.
        draft_slots: guesses of the backbone that also go into draft slots; 0 without such slots.
        starts: for each branch, the number of backbone guesses that it comes after; empty if all start at the pending
            token.
        drafts: whether all sources observe this step and propose guesses for the next one. If not, only those sources
            propose that read nothing but the text (`DraftSource.reads_text_alone`).
    """

    backbone: int
    branches: tuple[int, ...]
    draft_slots: int = 0
    starts: tuple[int, ...] = ()
    drafts: bool = True

    def layout(self, device: torch.device) -> Layout:
        """Return the tree of slots of a step of this shape."""
        starts = tuple(start for start, used in zip(self.starts, self.branches, strict=False) if used)
        lengths = (self.backbone, *filter(None, self.branches))
        return build_layout(lengths, device, self.draft_slots, starts if any(starts) else ())


@dataclass(frozen=True)
class StepPlan:
    """What the host has decided about a step before it runs.

    Attributes:
        shape: the sizes of the step.
        layout: `shape.layout(...)`.
        key_column_K: the columns of the cache that are read. No more columns of the text are in use after the step.
        may_be_over: what the host knows of the rows, see `advance`. The default is right for any rows.
        record: as in `finish_step`.
        past: as in `ForwardInputs`.
    """

    shape: StepShape
    layout: Layout
    key_column_K: torch.Tensor
    may_be_over: bool = True
    past: int | None = None
    record: Record | None = None


@dataclass(frozen=True)
class StepInputs:
    """The tokens of a step.

    Attributes:
        layout: where each slot sits.
        token_BQ: the pending token, the guesses of the backbone, those of the branches, and those in draft slots.
        length_BS: valid guesses of each segment that are in the step; for a branch, the backbone guesses before it
            count too.
    """

    layout: Layout
    token_BQ: torch.Tensor
    length_BS: torch.Tensor


@dataclass(frozen=True)
class ForwardInputs:
    """What a forward of the model is given.

    Attributes:
        layout: where each slot sits.
        key_column_K: 0, 1, 2, .., the columns of the cache that are read, those of the slots included.
        token_BQ: a token for each slot; None in the prefill of a prompt that was given as embeddings.
        embeds_BQH: an embedding for each slot in such a prefill, else None.
        keep_BN: the slots whose logits are wanted; None for all.
        past: cached tokens of every row, if the host knows that all have as many; else None.
    """

    layout: Layout
    key_column_K: torch.Tensor
    token_BQ: torch.Tensor | None = None
    embeds_BQH: torch.Tensor | None = None
    keep_BN: torch.Tensor | None = None
    past: int | None = None


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
        """Return whether the prefill of a chain of slots needs a mask, which has a row and a column for each slot.

        Args:
            slots: length of the chain.
            without_past: whether nothing is cached before it.
        """


def run_step(
    state: DecodingState, forward: Forward, selector: Selector, plan: StepPlan, *, host_may_read: bool = False
) -> None:
    """Run a whole step. The call's processors must be such that all slots can be scored at once.

    Calls with other processors decode token by token, see `jacobi_hf.decoding.one_by_one`.

    Args:
        state: the rows; the step changes them.
        forward: the model.
        selector: logits processors, and sampling noise for every index of a new token that a slot may choose.
        plan: what the host has decided about the step.
        host_may_read: as in `advance`.
    """
    inputs = state.inputs(plan.shape, plan.layout)
    output = forward(ForwardInputs(plan.layout, plan.key_column_K, inputs.token_BQ, past=plan.past))
    finish_step(
        state,
        selector,
        inputs,
        output,
        text_columns=plan.key_column_K.shape[0],
        drafts=plan.shape.drafts,
        may_be_over=plan.may_be_over,
        host_may_read=host_may_read,
        record=plan.record,
    )


def finish_step(
    state: DecodingState,
    selector: Selector,
    inputs: StepInputs,
    output: ForwardOutput,
    *,
    text_columns: int | None = None,
    drafts: bool = True,
    may_be_over: bool = True,
    host_may_read: bool = False,
    record: Record | None = None,
) -> None:
    """Do everything that comes after the forward of a step: choose, accept, commit and propose.

    Args:
        state: the rows; the step changes them.
        selector: logits processors and sampling noise.
        inputs: the tokens of the step.
        output: what the model returned for them.
        text_columns, drafts, may_be_over, host_may_read: as in `advance`.
        record: called with the inputs, what the model accepted and its logits `(B, Q, V)`, before the tokens are
            committed.
    """
    layout = inputs.layout
    index_BQ = None if selector.noise is None else state.generated_B[:, None] + layout.depth_Q
    choice = selector.choose(output.logits_BQV, layout, inputs.token_BQ, index_BQ, state.sources.ranks)
    acceptance = accept(state, inputs, choice, may_be_over=may_be_over)
    if record is not None:
        record(inputs, acceptance, output.logits_BQV)
    advance(
        state,
        inputs,
        acceptance,
        output.features_BQF,
        text_columns,
        drafts=drafts,
        may_be_over=may_be_over,
        host_may_read=host_may_read,
    )
    selector.commit(acceptance.run_BD, acceptance.count_B)


def advance(
    state: DecodingState,
    inputs: StepInputs,
    acceptance: Acceptance,
    features_BQF: torch.Tensor | None = None,
    text_columns: int | None = None,
    *,
    drafts: bool = True,
    may_be_over: bool = True,
    host_may_read: bool = False,
) -> None:
    """Commit the accepted tokens, get the guesses of the next step, and write the report for the host.

    Args:
        state: the rows; the step changes them.
        inputs: the tokens of the step.
        acceptance: what the model accepted of them.
        features_BQF: outputs of the tapped layers, if any source reads some.
        text_columns: how many columns of the text may be in use after the step; all of them by default.
        drafts: whether all sources get guesses for the next step, or only those that read nothing but the text.
        may_be_over: False if the host knows that, before this step, no row had halted and no row had all its tokens.
            Some operations are left out then.
        host_may_read: whether the host may read a value in between. On a CPU this costs nothing and can save the move
            of keys and values. On other devices the host would wait for the device.
    """
    count_B = acceptance.count_B
    moves = inputs.layout.verified_segments > 1
    if moves and host_may_read:
        moves = bool(((acceptance.best_B > 0) & (count_B > 1)).any())
    state.commit(acceptance, inputs.layout, moves=moves)
    proposes = drafts or state.sources.any_reads_text_alone
    width_B = state.zeros_B
    if proposes:
        generated_B = state.generated_B + count_B
        outcome = outcome_of(state, inputs, acceptance, generated_B, features_BQF)
        width_B = propose(state, outcome, text_columns, drafts=drafts)
        state.generated_B.copy_(generated_B)
    else:
        state.generated_B += count_B
    if acceptance.halted_B is not state.halted_B:
        state.halted_B.copy_(acceptance.halted_B)
    if proposes:
        state.clip(width_B, may_be_over=may_be_over)
    state.report(acceptance, inputs.layout, proposes=proposes)


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


def propose(
    state: DecodingState, outcome: StepOutcome, text_columns: int | None, *, drafts: bool = True
) -> torch.Tensor:
    """Let every source observe a step, then write what each proposes for the next one into the state.

    Args:
        state: the rows.
        outcome: what the step did.
        text_columns, drafts: as in `advance`.

    Returns:
        The valid guesses of the backbone, `(B,)`, which are not cut to the limit yet.
    """
    sources = state.sources
    for source in sources.all if drafts else ():
        source.observe(outcome)
    text_BL = state.text_BL if text_columns is None else state.text_BL[:, :text_columns]
    context = ProposalContext(outcome, text_BL, state.length_B, state.pending_B1)
    width_B = state.zeros_B
    if drafts and sources.backbone is not None:
        token_BSN, length_BS = sources.backbone.propose(context)
        state.backbone_BW.copy_(token_BSN[:, 0])
        width_B = length_BS[:, 0]
    context = ProposalContext(outcome, text_BL, state.length_B, state.pending_B1, state.backbone_BW)
    for source, (token_BSN, length_BS) in zip(sources.branching, state.branches, strict=True):
        if source.is_on_host or not (drafts or source.reads_text_alone):
            continue
        proposed_BSN, valid_BS = source.propose(context)
        token_BSN.copy_(proposed_BSN)
        length_BS.copy_(valid_BS)
    return width_B
