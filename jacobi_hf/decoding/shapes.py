"""Which shape each step has: how many guesses of the backbone and of each branch go into its forward."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jacobi_hf.decoding.step import StepShape

if TYPE_CHECKING:
    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.decoding.report import StepReport
    from jacobi_hf.drafts.sources import Sources


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


class ShapeChooser:
    """Chooses the shape of each step of a call.

    Args:
        sources: the draft sources of the call.
        config: its knobs.
        limit: the most new tokens.
    """

    def __init__(self, sources: Sources, config: JacobiConfig, limit: int) -> None:
        self._sources = sources
        self._limit = limit
        self._verify_width = VerifyWidth(config)

    def smallest(self, report: StepReport, rows: list[int]) -> StepShape:
        """Return the smallest shape that holds all valid guesses of the given rows."""
        starts = self._sources.branch_starts
        used = tuple(
            max(0, max(lengths[row] for row in rows) - start)
            for lengths, start in zip(report.branches, starts, strict=True)
        )
        return self._shape(max(report.widths[row] for row in rows), used)

    def greatest(self) -> StepShape:
        """Return the shape that holds all guesses that a row may have, for a host that does not know its rows."""
        branches = tuple(min(self._limit, length) for length in self._sources.branch_lengths)
        return self._shape(min(self._limit, self._sources.width), branches)

    def note(self, accepted: int) -> None:
        """Take in how many guesses of the backbone a row accepted in a step."""
        self._verify_width.note(accepted)

    def names(self, shape: StepShape) -> list[str]:
        """Return the name of the source of each verified segment of a step, the backbone first."""
        backbone = self._sources.backbone
        branches = zip(self._sources.branch_names, shape.branches, strict=True)
        return ["" if backbone is None else backbone.name, *(name for name, used in branches if used)]

    def _shape(self, backbone: int, branches: tuple[int, ...]) -> StepShape:
        """Return the shape of a step with so many guesses; with draft slots, fewer of them may be verified."""
        starts = self._sources.branch_starts
        branches = tuple(used if start <= backbone else 0 for start, used in zip(starts, branches, strict=True))
        if not self._sources.draft_slots:
            return StepShape(backbone, branches, starts=starts)
        followed = max((start for start, used in zip(starts, branches, strict=True) if used), default=0)
        verified = min(backbone, max(self._verify_width.width, followed))
        return StepShape(verified, branches, backbone, starts)
