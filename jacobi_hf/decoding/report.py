"""What the host knows of the steps that it has launched."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from jacobi_hf.decoding.step import StepShape
    from jacobi_hf.streaming import Candidate


@dataclass(frozen=True)
class StepReport:
    """What the host knows after a step, from one copy off the device. Every list has one entry for each row.

    Attributes:
        generated: new tokens.
        widths: valid guesses of the backbone for the next step.
        ended: whether the last token ends the row.
        best: the segment that won.
        accepted: guesses accepted in the backbone.
        orders: length of the n-gram that the lookup matched for the next step; 0 without a match.
        branches: for each branch of the next step, its valid tokens.
        branch_accepted: for each branch of the step, accepted guesses.
    """

    generated: list[int]
    widths: list[int]
    ended: list[bool]
    best: list[int]
    accepted: list[int]
    orders: list[int]
    branches: list[list[int]]
    branch_accepted: list[list[int]]

    @classmethod
    def before_the_prefill(cls, rows: int, branches: int) -> StepReport:
        """Return the report of a call that has no token yet."""
        nothing = [0] * rows
        return cls(nothing, nothing, [False] * rows, nothing, nothing, nothing, [nothing] * branches, [])

    @classmethod
    def of(cls, numbers: list[int], rows: int) -> tuple[StepReport, bool]:
        """Return the report in `DecodingState.report_N`, and whether sampling met what is no distribution."""
        kinds = [numbers[first : first + rows] for first in range(0, len(numbers), rows)]
        generated, widths, ended, best, accepted, broken, orders, *branches = kinds
        half = len(branches) // 2
        report = cls(
            generated, widths, [bool(end) for end in ended], best, accepted, orders, branches[:half], branches[half:]
        )
        return report, any(broken)

    def of_text_alone(self, reads_text_alone: list[bool]) -> StepReport:
        """Return the report of a step after which only sources that read the text alone have guesses.

        What the state holds of other sources is left from an earlier step, and no step sends it.

        Args:
            reads_text_alone: for each branch, whether its source is such a source.
        """
        nothing = [0] * len(self.widths)
        pairs = zip(self.branches, reads_text_alone, strict=True)
        return replace(self, widths=nothing, branches=[lengths if reads else nothing for lengths, reads in pairs])

    def sent(self, shape: StepShape, row: int) -> tuple[int, list[int]]:
        """Return how many valid guesses of a row the next step verifies if it has the given shape.

        Returns:
            those of the backbone, and those of each branch without the backbone guesses before it.
        """
        starts = shape.starts or (0,) * len(shape.branches)
        branches = [
            max(0, min(lengths[row] - start, used))
            for lengths, start, used in zip(self.branches, starts, shape.branches, strict=True)
        ]
        return min(self.widths[row], shape.backbone), branches


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device was given and whose report the host has not read.

    Attributes:
        names: the source of each of its verified segments; empty for the prefill.
        shape: its shape.
        label: its shape in words; empty for the prefill.
        slots: slots of its forward.
        tokens: the most tokens that it adds to a row.
        report: waits for the step and returns `DecodingState.report_N` as it was after the step.
        candidates: what it verifies, if a streamer follows the steps.
        is_new: whether it was compiled or recorded when it was launched.
        widths: if the backbone restarted for it, waits for the valid guesses of the backbone and returns them.
    """

    names: list[str]
    shape: StepShape
    label: str
    slots: int
    tokens: int
    report: Callable[[], torch.Tensor]
    candidates: tuple[Candidate, ...] = ()
    is_new: bool = False
    widths: Callable[[], torch.Tensor] | None = None


class CopiedReport:
    """A copy of a report that arrives at the host while the device works on.

    Args:
        report_N: the report on the device.
    """

    def __init__(self, report_N: torch.Tensor) -> None:
        self.arrived: Any = None
        if report_N.device.type != "cuda":
            self._copied_N = report_N.to("cpu", copy=True)
            return
        self._copied_N = report_N.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event(enable_timing=True)
        self.arrived.record(torch.cuda.current_stream(report_N.device))

    def __call__(self) -> torch.Tensor:
        """Wait for the copy and return it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self._copied_N


class StepClock:
    """Time from the end of one step to the end of the next.

    The host reads late what a device has done, so there the device's own events are asked. They have passed when the
    report has arrived: nobody waits for them.
    """

    def __init__(self) -> None:
        self._read_at = time.perf_counter()
        self._event: Any = None

    def seconds_since_last(self, report: object) -> float:
        """Return the seconds since the step before; to be called when the report of a step was read.

        Args:
            report: the report as it was launched, see `LaunchedStep.report`.
        """
        now = time.perf_counter()
        seconds = now - self._read_at
        self._read_at = now
        before = self._event
        self._event = getattr(report, "arrived", None)
        if before is not None and self._event is not None:
            return float(before.elapsed_time(self._event)) / 1e3
        return seconds
