"""What the host knows of the steps that it has launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

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
        branches: for each branch of the next step, its valid tokens.
    """

    generated: list[int]
    widths: list[int]
    ended: list[bool]
    best: list[int]
    accepted: list[int]
    branches: list[list[int]]

    @classmethod
    def before_the_prefill(cls, rows: int, branches: int) -> StepReport:
        """Return the report of a call that has no token yet."""
        nothing = [0] * rows
        return cls(nothing, nothing, [False] * rows, nothing, nothing, [nothing] * branches)

    @classmethod
    def of(cls, numbers: list[int], rows: int) -> tuple[StepReport, bool]:
        """Return the report in `DecodingState.report_N`, and whether sampling met what is no distribution."""
        kinds = [numbers[first : first + rows] for first in range(0, len(numbers), rows)]
        generated, widths, ended, best, accepted, broken, *branches = kinds
        return cls(generated, widths, [bool(end) for end in ended], best, accepted, branches), any(broken)


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device was given and whose report the host has not read.

    Attributes:
        names: the source of each of its verified segments; empty for the prefill.
        slots: slots of its forward.
        tokens: the most tokens that it adds to a row.
        verified: the most guesses of the backbone that it verifies.
        report: waits for the step and returns `DecodingState.report_N` as it was after the step.
        candidates: what it verifies, if a streamer follows the steps.
    """

    names: list[str]
    slots: int
    tokens: int
    verified: int
    report: Callable[[], torch.Tensor]
    candidates: tuple[Candidate, ...] = ()


def copy_of(report_N: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a report to the host, and return a function that waits for the copy and returns it."""
    if report_N.device.type != "cuda":
        copied = report_N.to("cpu", copy=True)
        return lambda: copied
    pinned = report_N.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(report_N.device))

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return pinned

    return wait
