"""Which shape each step has: how many guesses of the backbone and of each branch go into its forward."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Protocol

from jacobi_hf.decoding.step import StepShape
from jacobi_hf.tuning.controller import Controller
from jacobi_hf.tuning.options import RowOutcome, options_for

if TYPE_CHECKING:
    from collections.abc import Hashable

    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.decoding.report import StepReport
    from jacobi_hf.drafts.sources import Sources
    from jacobi_hf.tuning.memory import Memory
    from jacobi_hf.tuning.options import Option

LOOKUP = "lookup"
_learning = threading.Lock()  # calls in several threads may share what is kept with a model


class VerifyWidth:
    """How many guesses are verified at a time where the backbone has draft slots of its own.

    A fixed number if the config gives one. Otherwise twice the recent average of accepted guesses plus two, which
    begins with half the window.
    """

    def __init__(self, config: JacobiConfig) -> None:
        self._fixed = config.jacobi_verify_width
        self._window = config.window_width
        self._accepted = max(0.0, self._window / 4 - 1)

    @property
    def width(self) -> int:
        """Guesses to verify in the next step."""
        return self._fixed or min(self._window, math.ceil(2 * self._accepted) + 2)

    def note(self, accepted: int) -> None:
        """Take in how many guesses a row accepted in a step."""
        self._accepted += 0.2 * (accepted - self._accepted)


class Schedule(Protocol):
    """What the decoder asks of a way to choose shapes.

    Per step: `decide`, then `shape`, then `note` when the host has read the step's report.

    Attributes:
        drafts_always: whether the sources get guesses from every step, whether or not the next one sends them.
    """

    drafts_always: bool

    @property
    def probing_seconds(self) -> float:
        """Seconds that the call has spent on trying shapes."""

    def start(self, slots: int, seconds: float) -> None:
        """Take in what the prefill cost: its slots of a row, and its time."""

    def decide(self, report: StepReport, rows: list[int]) -> bool:
        """Decide on the next step; return whether it sends guesses of the backbone or of sources that follow it.

        Args:
            report: of the last step that the host has read.
            rows: rows that have not ended.
        """

    def shape(self, report: StepReport | None, rows: list[int]) -> StepShape:
        """Return the shape of the step that was decided on.

        Args:
            report: what the rows have to send; None if the host does not know it.
            rows: rows that the step advances.
        """

    def note(self, before: StepReport, after: StepReport, shape: StepShape, rows: list[int], seconds: float) -> None:
        """Learn from a step.

        Args:
            before: the report of the step before it.
            after: its own report.
            shape: its shape.
            rows: rows that had not ended before it.
            seconds: its time; NaN if it is not that of an ordinary step of this shape, for example because it was
                compiled.
        """

    def end(self) -> None:
        """Take note of the end of the call."""


class _Shapes:
    """How many guesses a step must have room for, so that it holds all guesses of its rows.

    Args:
        sources: the draft sources of the call.
        limit: the most new tokens.
    """

    def __init__(self, sources: Sources, limit: int) -> None:
        self._starts = sources.branch_starts
        self._width = min(limit, sources.width)
        self._lengths = tuple(min(limit, length) for length in sources.branch_lengths)

    def valid(self, report: StepReport | None, rows: list[int]) -> tuple[int, tuple[int, ...]]:
        """Return the most guesses of the backbone and of each branch that a row has, or may have without a report."""
        if report is None:
            return self._width, self._lengths
        branches = tuple(
            max(0, max(lengths[row] for row in rows) - start)
            for lengths, start in zip(report.branches, self._starts, strict=True)
        )
        return max(report.widths[row] for row in rows), branches

    def following(self, backbone: int, branches: tuple[int, ...]) -> tuple[int, ...]:
        """Return the branches without those that follow more guesses of the backbone than there are."""
        return tuple(used if start <= backbone else 0 for start, used in zip(self._starts, branches, strict=True))


class ConstantSchedule:
    """Every step verifies all guesses that there are (`jacobi_schedule="constant"`).

    Args:
        sources: the draft sources of the call.
        config: its knobs.
        limit: the most new tokens.
    """

    drafts_always = True
    probing_seconds = 0.0

    def __init__(self, sources: Sources, config: JacobiConfig, limit: int) -> None:
        self._sources = sources
        self._shapes = _Shapes(sources, limit)
        self._verify_width = VerifyWidth(config)

    def start(self, slots: int, seconds: float) -> None:
        """Do nothing."""

    def decide(self, report: StepReport, rows: list[int]) -> bool:
        """Return True: every step sends what there is."""
        return True

    def shape(self, report: StepReport | None, rows: list[int]) -> StepShape:
        """Return the smallest shape that holds all guesses; with draft slots, fewer of them may be verified."""
        starts = self._sources.branch_starts
        backbone, branches = self._shapes.valid(report, rows)
        branches = self._shapes.following(backbone, branches)
        if not self._sources.draft_slots:
            return StepShape(backbone, branches, starts=starts)
        followed = max((start for start, used in zip(starts, branches, strict=True) if used), default=0)
        verified = min(backbone, max(self._verify_width.width, followed))
        return StepShape(verified, branches, backbone, starts)

    def note(self, before: StepReport, after: StepReport, shape: StepShape, rows: list[int], seconds: float) -> None:
        """Follow how many guesses of a drafter are accepted."""
        for row in rows:
            self._verify_width.note(after.accepted[row])

    def end(self) -> None:
        """Do nothing."""


class AdaptiveSchedule:
    """A controller chooses what each step sends (`jacobi_schedule="adaptive"`).

    Args:
        sources: the draft sources of the call.
        config: its knobs, which are upper limits.
        limit: the most new tokens.
        memory: what earlier calls of the model have learnt.
        key: what the steps of the call have in common; costs are kept by it.
        sampled: whether the call samples.
        few: whether each shape costs time to make, so that there should be few. A call then
            compiles or captures one slot alone and at most one more shape.
    """

    def __init__(
        self,
        sources: Sources,
        config: JacobiConfig,
        limit: int,
        memory: Memory,
        *,
        key: Hashable,
        sampled: bool,
        few: bool,
    ) -> None:
        self._sources = sources
        self._shapes = _Shapes(sources, limit)
        self.drafts_always = sources.observe_every_step
        names = sources.branch_names
        self._lookup = names.index(LOOKUP) if LOOKUP in names else None
        self._verify_width = config.jacobi_verify_width
        lookup = 0 if self._lookup is None else sources.branch_lengths[self._lookup]
        others = len(names) > (self._lookup is not None)
        options = options_for(
            min(limit, sources.width),
            min(limit, lookup),
            draft_slots=sources.draft_slots > 0,
            others=others,
            few=few,
        )
        self._options = options
        self._controller = Controller(options, self._slots, memory, key=(key, few), sampled=sampled, limit=limit)
        self._option = options[0]
        self._made = memory.made[key, config] if few else set(options)
        self._may_make = True
        self._chosen: list[Option] = []  # of steps that were not noted yet

    @property
    def probing_seconds(self) -> float:
        """Time of the call beyond that of one slot, in steps that tried the backbone."""
        return self._controller.probing_seconds

    def start(self, slots: int, seconds: float) -> None:
        """Take in what the prefill cost."""
        with _learning:
            self._controller.start(slots, seconds)

    def decide(self, report: StepReport, rows: list[int]) -> bool:
        """Ask the controller; see `Schedule`. Where only pads are missing, the widest backbone brings most of them."""
        states = [(report.generated[row], report.orders[row]) for row in rows]
        with _learning:
            option = self._controller.choose(states) if rows else max(self._options, key=lambda o: o.backbone)
            self._option = option if self._is_made(option) else self._options[0]
        self._chosen.append(self._option)
        return self._option.backbone > 0 or self._option.others

    def _is_made(self, option: Option) -> bool:
        """Return whether steps of an option exist already, or may be made now."""
        if option in self._made or option == self._options[0]:
            return True
        may_make = self._may_make
        self._may_make = False
        if may_make:
            self._made.add(option)
        self._controller.exclude(other for other in self._options if other not in self._made)
        return may_make

    def shape(self, report: StepReport | None, rows: list[int]) -> StepShape:
        """Return the shape of the option, without guesses that no row has."""
        option = self._option
        valid, lengths = self._shapes.valid(report, rows)
        branches = [length if option.others else 0 for length in lengths]
        if self._lookup is not None:
            branches[self._lookup] = min(option.lookup, lengths[self._lookup])
        backbone = min(option.backbone, valid, self._verify_width or option.backbone)
        return StepShape(
            backbone,
            self._shapes.following(backbone, tuple(branches)),
            min(option.draft_slots, valid),
            self._sources.branch_starts,
            drafts=self.drafts_always or option.backbone > 0 or option.others,
        )

    def note(self, before: StepReport, after: StepReport, shape: StepShape, rows: list[int], seconds: float) -> None:
        """Report the step to the controller; see `Schedule`."""
        slots = 1 + shape.backbone + shape.draft_slots + sum(shape.branches)
        outcome_of = self._outcome if slots > 1 else self._outcome_of_one_slot
        outcomes = [outcome_of(before, after, shape, row) for row in rows]
        with _learning:
            self._controller.note(self._chosen.pop(0), slots, seconds, outcomes)

    def end(self) -> None:
        """Leave what was learnt to later calls."""
        with _learning:
            self._controller.end()

    def _slots(self, option: Option) -> int:
        """Return the most slots of a step of an option."""
        backbone = min(option.backbone, self._verify_width or option.backbone)
        other = sum(length for number, length in enumerate(self._sources.branch_lengths) if number != self._lookup)
        return 1 + backbone + option.draft_slots + option.lookup + (other if option.others else 0)

    @staticmethod
    def _outcome_of_one_slot(before: StepReport, after: StepReport, _: StepShape, row: int) -> RowOutcome:
        generated = after.generated[row]
        return RowOutcome(generated - before.generated[row], generated, before.orders[row])

    def _outcome(self, before: StepReport, after: StepReport, shape: StepShape, row: int) -> RowOutcome:
        """Return what a step brought a row."""
        backbone, branches = before.sent(shape, row)
        in_step = [number for number, used in enumerate(shape.branches) if used]
        found = dict.fromkeys(range(len(branches)), (0, 0))
        for number, accepted in zip(in_step, after.branch_accepted, strict=False):
            start = self._sources.branch_starts[number]
            found[number] = (branches[number], max(0, accepted[row] - start))
        lookup = (0, 0) if self._lookup is None else found.pop(self._lookup)
        return RowOutcome(
            tokens=after.generated[row] - before.generated[row],
            total=after.generated[row],
            order=before.orders[row],
            lookup=lookup,
            backbone=(backbone, after.accepted[row]),
            others=max(found.values(), key=lambda pair: pair[1], default=(0, 0)),
        )
