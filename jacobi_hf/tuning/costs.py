"""What a step costs, by its number of slots: measured where steps ran, estimated in between.

Python's numbers on the host only; times are in seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque

SAMPLES = 9  # measurements of a number of slots that count
GROWTH = 0.7  # beyond everything known, the cost is taken to grow as slots ** GROWTH


class Costs:
    """Seconds of a step by its number of slots, for steps that differ in nothing else.

    A cost is the low median of the last few measurements: a suspended machine, a compilation or a clock that jumps
    cannot move it. The first measurement of a number of slots competes with the estimate from its neighbours, so even
    that one is believed only if it is the lower of the two, until there is a second one.

    The prefill is a measurement for nothing. It is used as long as no step with as many slots was measured.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._supposed: dict[int, float] = {}
        self._slots: list[int] = []
        self._seconds: list[float] = []

    @property
    def known(self) -> bool:
        """Whether a step of one slot was measured, which all decisions are relative to."""
        return 1 in self._samples

    def suppose(self, slots: int, seconds: float) -> None:
        """Take in what some other forward cost, such as a prefill. The lowest of several counts.

        Args:
            slots: slots of the forward.
            seconds: its time. Values that are no time, such as nan or a negative one, are ignored.
        """
        if slots > 1 and _is_time(seconds):
            self._supposed[slots] = min(seconds, self._supposed.get(slots, math.inf))
            self._renew()

    def note(self, slots: int, seconds: float) -> None:
        """Take in what a step cost; arguments as in `suppose`."""
        if not _is_time(seconds):
            return
        if slots not in self._samples:
            estimate = [self(slots)] if slots > 1 and self._slots else []
            self._samples[slots] = deque(estimate, maxlen=SAMPLES)
        self._samples[slots].append(seconds)
        self._renew()

    def __call__(self, slots: int) -> float:
        """Return the cost of a step: measured, between its neighbours, or extrapolated; nan if nothing is known.

        A step is never estimated to cost less than a narrower one.
        """
        if not self._slots:
            return math.nan
        at = bisect_left(self._slots, slots)
        if at == len(self._slots):
            return self._seconds[-1] * (slots / self._slots[-1]) ** GROWTH
        high = self._slots[at]
        if high == slots or at == 0:
            return self._seconds[at]
        low = self._slots[at - 1]
        share = (slots - low) / (high - low)
        return self._seconds[at - 1] + share * (self._seconds[at] - self._seconds[at - 1])

    def _renew(self) -> None:
        """Recompute the known points: measured ones, and supposed ones of more slots than any measured one."""
        points = {slots: sorted(samples)[(len(samples) - 1) // 2] for slots, samples in self._samples.items()}
        widest = max(points, default=0)
        points |= {slots: seconds for slots, seconds in self._supposed.items() if slots > widest}
        self._slots = sorted(points)
        self._seconds = []
        for slots in self._slots:
            self._seconds.append(max(points[slots], self._seconds[-1]) if self._seconds else points[slots])


def _is_time(seconds: float) -> bool:
    """Return whether a number can be a duration."""
    return 0 < seconds < math.inf
