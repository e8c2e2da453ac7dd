"""What a step costs, by its number of slots: measured where steps ran, estimated in between.

Plain Python on the host; times are in seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque

SAMPLES = 15  # measurements of a number of slots that count
SUPPOSED = 16  # other forwards that count, the narrowest ones
GROWTH = 0.6  # beyond everything known, the cost is taken to grow as slots ** GROWTH


class Costs:
    """Seconds of a step by its number of slots, for steps that differ in nothing else.

    A cost is the low median of the last few measurements: a suspended machine, a compilation or a clock that jumps
    cannot move it. The first measurement of a number of slots competes with the estimate from its neighbours, so even
    that one is believed only if it is the lower of the two, until there is a second one.

    The prefill is a measurement for nothing. It counts as long as no step of as many slots was measured.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._measured: dict[int, float] = {}
        self._supposed: dict[int, float] = {}
        self._points: list[tuple[int, float]] = []  # of what is measured, and of wider forwards that are supposed

    @property
    def known(self) -> bool:
        """Whether steps of one slot were measured, twice because all decisions are relative to them."""
        return len(self._samples.get(1, ())) > 1

    def suppose(self, slots: int, seconds: float) -> None:
        """Take in what some other forward cost, such as a prefill.

        A forward costs at most what a wider one costs. So one that took as long as a wider one does not count: it was
        disturbed, or the model's first.

        Args:
            slots: slots of the forward.
            seconds: its time. Values that are no time, such as nan or a negative one, are ignored.
        """
        if slots < 2 or not _is_time(seconds):
            return
        costs: dict[int, float] = {}
        for wide, cost in sorted([*self._supposed.items(), (slots, seconds)], key=lambda point: (-point[0], point[1])):
            if cost < min(costs.values(), default=math.inf):
                costs[wide] = cost
        self._supposed = dict([*costs.items()][-SUPPOSED:])
        self._points = []

    def note(self, slots: int, seconds: float) -> None:
        """Take in what a step cost; arguments as in `suppose`."""
        if not _is_time(seconds):
            return
        samples = self._samples.get(slots)
        if samples is None:
            estimate = [self(slots)] if slots > 1 and self._measured else []
            samples = self._samples[slots] = deque(estimate, maxlen=SAMPLES)
        samples.append(seconds)
        self._measured[slots] = sorted(samples)[(len(samples) - 1) // 2]
        self._points = []

    def __call__(self, slots: int, *, hopeful: bool = False) -> float:
        """Return the cost of a step: measured, between its neighbours, or extrapolated; nan if nothing is known.

        A step that was not measured is never estimated to cost less than a narrower one.

        Args:
            slots: slots of the step.
            hopeful: whether a step that was not measured is estimated to cost little more than a narrower one, as
                where slots are free up to some number. Otherwise costs lie on straight lines.
        """
        if slots in self._measured:
            return self._measured[slots]
        points = self._points = self._points or self._known_points()
        if not points:
            return math.nan
        at = bisect_left(points, (slots, 0.0))
        if at == len(points):
            low, seconds = points[-1]
            return seconds * (slots / low) ** GROWTH
        high, seconds = points[at]
        if at == 0:
            return seconds
        low, below = points[at - 1]
        share = (slots - low) / (high - low)
        return below + max(0.0, seconds - below) * (share**2 if hopeful else share)

    def _known_points(self) -> list[tuple[int, float]]:
        """Return slots and seconds of what is measured, and of wider forwards that are supposed, in order."""
        widest = max(self._measured, default=0)
        beyond = ((slots, seconds) for slots, seconds in self._supposed.items() if slots > widest)
        return sorted([*self._measured.items(), *beyond])


def _is_time(seconds: float) -> bool:
    """Return whether a number can be a duration."""
    return 0 < seconds < math.inf
