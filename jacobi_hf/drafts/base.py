"""The interface of draft sources: everything that proposes tokens for the model to verify.

In each step the model's forward covers a tree of *slots*. The pending token (the last one chosen, whose keys and
values are not in the cache yet) is slot 0. After it comes the *backbone*, a chain of guesses from one source. Further
sources add *branches*, which start at the pending token or after some guesses of the backbone. The model verifies all
of them in one forward and commits the longest accepted chain, so the text never depends on a source.

A source is called twice in each step: `observe` receives the outcome of the step, then `propose` returns guesses for
the next one. The prefill counts as a step without guesses; after it, `read_prompt` is called for each part of the
prompt. Both methods work on whole batches with tensors of fixed shapes, because a step may run compiled or as a CUDA
graph: no Python value may depend on the contents of a tensor.

A source object and its tensors serve one call at a time. If steps are compiled, later calls use the same object again;
`reset` begins each call.

Shapes: B rows, Q slots of a forward, S segments, N guesses of a segment without the backbone guesses before it, D
depths from the pending token on, W backbone guesses, V vocabulary, L text columns, P prompt columns, F features
(tapped layers times H, hidden).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.decoding.accept import Acceptance
    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.step import StepInputs


@dataclass(frozen=True)
class SourceShape:
    """What a source needs in every step of a call, known on the host before any tensor exists.

    Attributes:
        lengths: the most guesses of each of its segments, without the backbone guesses before it.
        starts: for each segment, the number of backbone guesses that it comes after; 0 for the pending token. Empty if
            all are 0.
        is_backbone: whether its one segment is the backbone. A call has at most one backbone.
        draft_slots: for a backbone, how many of its guesses go into the forward a second time, in draft slots. The
            source drafts there, and nobody verifies them.
        taps: decoder layers whose outputs it reads as features (0-based, before the final norm).
        cache_ahead: if the source has a key/value cache of its own: places in it that one proposal needs after the
            committed tokens.
        ranks: how many of the best tokens at each slot it reads (`Acceptance.ranked_BQR`); 0 for none.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...] = ()
    is_backbone: bool = False
    draft_slots: int = 0
    taps: tuple[int, ...] = ()
    cache_ahead: int = 0
    ranks: int = 0

    def __post_init__(self) -> None:
        if self.starts and len(self.starts) != len(self.lengths):
            raise ValueError(
                f"a source has {len(self.lengths)} segments and {len(self.starts)} starts: give one each."
            )
        if self.is_backbone and (len(self.lengths) != 1 or any(self.starts)):
            raise ValueError("a backbone has one segment, which follows the pending token.")

    @property
    def segment_starts(self) -> tuple[int, ...]:
        """The start of every segment, zeros included."""
        return self.starts or (0,) * len(self.lengths)


@dataclass(frozen=True)
class StepOutcome:
    """What a step did, for the sources, after its tokens were committed.

    The *draft chain* is the pending token and the backbone guesses of this step, at the slots whose choices can become
    the next guesses. These are slot 0 and the draft slots if the backbone has draft slots, else slot 0 and the
    verified slots of the backbone.

    The tensors hold until the step ends. A source that keeps one must copy it.

    Attributes:
        inputs: tokens, valid lengths and layout of the step's slots.
        acceptance: the model's choices and which guesses were accepted.
        before_B: new tokens of each row before the step.
        generated_B: new tokens of each row after the step.
        chain_choice_BD: the token chosen at each slot of the draft chain; D is one more than the guesses in the chain.
        chain_length_B1: valid guesses of the draft chain.
        features_BQF: outputs of the tapped layers at every slot, side by side; None without taps.
    """

    inputs: StepInputs
    acceptance: Acceptance
    before_B: torch.Tensor
    generated_B: torch.Tensor
    chain_choice_BD: torch.Tensor
    chain_length_B1: torch.Tensor
    features_BQF: torch.Tensor | None = None

    @property
    def layout(self) -> Layout:
        """The tree of the step's slots."""
        return self.inputs.layout

    @property
    def chain_slot_D(self) -> torch.Tensor | slice:
        """The slots of the draft chain, for use as an index."""
        return chain_slots(self.layout)

    @property
    def chain_token_BD(self) -> torch.Tensor:
        """The pending token and the backbone guesses, as they went into the forward."""
        return self.inputs.token_BQ[:, self.chain_slot_D]


def chain_slots(layout: Layout) -> torch.Tensor | slice:
    """Return the slots of the draft chain of a layout, see `StepOutcome`."""
    depths = 1 + layout.lengths[layout.draft_segment]
    return layout.path_SD[layout.draft_segment, :depths] if layout.draft_slots else slice(depths)


@dataclass(frozen=True)
class ProposalContext:
    """What a source may look at to propose guesses for the next step.

    Attributes:
        outcome: what the last step did.
        text_BL: prompt and new tokens of each row without pads. The first `text_length_B` columns are in use.
        text_length_B: tokens of each row's text; the last one is the pending token.
        pending_B1: the pending token.
        backbone_BW: guesses of the backbone for the next step; None in the call of the backbone's own `propose`, and
            no columns if there is no backbone.
    """

    outcome: StepOutcome
    text_BL: torch.Tensor
    text_length_B: torch.Tensor
    pending_B1: torch.Tensor
    backbone_BW: torch.Tensor | None = None


class DraftSource:
    """Something that proposes tokens; the base class of all draft sources.

    A subclass sets `name` and `shape` and defines `for_call` and `propose`. It defines the other methods only if it
    needs them; here they do nothing. `jacobi_hf.drafts.sources.SOURCES` lists the classes that a call may use.

    Attributes:
        name: short name, shown in statistics and to streamers.
        shape: what the source needs in every step.
        reads_text_alone: whether `propose` reads nothing of the last step but the text. Such a source goes on
            proposing in steps from which the others get no guesses.
        is_on_host: whether the host finds the guesses and writes them into the state; `propose` is not called then.
        order_B: for a source that copies from the text, a buffer with the length of the n-gram that it matched last,
            0 without a match. The report carries it to the host. None for other sources.
    """

    name: str
    shape: SourceShape
    reads_text_alone: bool = False
    is_on_host: bool = False
    order_B: torch.Tensor | None = None

    @classmethod
    def for_call(cls, config: JacobiConfig, model: Any) -> Self | None:
        """Return the source for a call with these knobs and this model, or None if the call does not use it.

        This must be cheap: it is called in every call of `generate`, also where buffers of an earlier call are used
        again and the new object is dropped. Tensors are made in `allocate`.
        """
        raise NotImplementedError

    def allocate(self, rows: int, columns: int, capacity: int, device: torch.device) -> None:
        """Make the buffers; their addresses must not change afterwards, except in `grow`.

        Args:
            rows: B.
            columns: the most tokens of a row's text, prompt included, until `grow` is called.
            capacity: places of a row in the model's cache, until `grow` is called: the text and the slots of one step.
            device: where the tokens are.
        """

    def grow(self, columns: int, capacity: int) -> None:
        """Replace the buffers whose size follows from the lengths by larger ones; what they hold stays.

        A call begins with room for its prompt and one step. When the text needs more, this is called between two
        steps. A source whose buffers have a fixed size has nothing to do.

        Args:
            columns: as in `allocate`, larger than before.
            capacity: as in `allocate`, larger than before.
        """

    def sized_by_length(self) -> list[tuple[torch.Tensor, int]]:
        """Return the buffers whose size follows from `columns` or `capacity`, each with the dimension that does.

        The compiler treats these dimensions as variable, so that longer texts compile nothing again.
        """
        return []

    def reset(self) -> None:
        """Forget everything about earlier texts; called before each call of `generate`."""

    def during_call(self, model: Any) -> AbstractContextManager[None]:
        """Return a context that is open while a call decodes, for example to attach hooks to the model.

        Calls in several threads may overlap on the same model, each with a source object of its own; a hook must act
        on the forwards of its own thread alone.
        """
        return contextlib.nullcontext()

    def during_forward(self, layout: Layout, rows: int) -> AbstractContextManager[None]:
        """Return a context that is open during a forward with draft slots, for example to switch a LoRA on in them.

        Args:
            layout: where the slots of the forward sit; the draft slots are the last ones.
            rows: B.
        """
        return contextlib.nullcontext()

    def read_prompt(self, place_B: torch.Tensor, next_BP: torch.Tensor, features_BPF: torch.Tensor | None) -> None:
        """Read a part of the prompt; called for each part after the prefill, when the first new token is known.

        Args:
            place_B: the place in each row's text of the first token of this part.
            next_BP: for each token of the part, the token after it; after the last token of the prompt comes the first
                new token. Columns after a row's prompt hold nothing of use.
            features_BPF: outputs of the tapped layers at each token of the part; None without taps.
        """

    def observe(self, outcome: StepOutcome) -> None:
        """Learn from a step; called after its tokens were committed and before `propose`.

        Not called after steps in which no source takes part but those that read the text alone. A source that must
        observe every step has `taps` or `cache_ahead` in its shape.
        """

    def restart(
        self, generated_B: torch.Tensor, text_BL: torch.Tensor, length_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return guesses for a step after steps in which the source took no part.

        Only a backbone is asked. One that does not define this takes part in every step.

        Args:
            generated_B: new tokens of each row.
            text_BL: prompt and new tokens of each row without pads.
            length_B: tokens of each row in `text_BL`.

        Returns:
            as `propose`.
        """
        raise NotImplementedError

    def propose(self, context: ProposalContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return guesses for the next step.

        Returns: token_BSN: the guesses of each segment, without the backbone guesses before it. length_BS: how far the
            valid guesses of each segment reach, counted from the pending token: a segment that comes after 2 backbone
            guesses and has 3 valid guesses of its own has the length 5. A length up to the start, such as 0, proposes
            nothing. A source need not look at how many backbone guesses are valid: a segment that comes after more of
            them is left out.
        """
        raise NotImplementedError
