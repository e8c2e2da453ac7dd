"""What a step costs, by its number of slots: measured where steps ran, estimated in between.

Plain Python on the host; times are in seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SAMPLES = 15  # measurements of a number of slots that count
SETTLED = 8  # measurements after which another one says more about the load than about the cost
LOADS = 7  # steps of which the median is the load
SLACK = 0.93  # a wide step is found to cost less than a narrow one only if it costs less than this share
SUPPOSED = 16  # other forwards that count, the narrowest ones
GROWTH = 0.6  # beyond everything known, the cost is taken to grow as slots ** GROWTH


class Costs:
    """Seconds of a step by its number of slots, for steps that differ in nothing else.

    A cost is the low median of the last few measurements: a suspended machine, a compilation or a clock that jumps
    cannot move it. The first measurement of a number of slots competes with the estimate from its neighbours, so even
    that one is believed only if it is the lower of the two, until there is a second one.

    Other programs slow down steps of all widths. So what is kept is divided by a *load*: how much longer the last few
    steps took than what was known of steps of their width. It is learnt from widths that run often, and holds for all.

    The prefill is a measurement for nothing. It counts as long as no step of as many slots was measured.
    """

    def __init__(self) -> None:
        self._load = 1.0
        self._loads: deque[float] = deque([1.0] * LOADS, maxlen=LOADS)
        self._samples: dict[int, deque[float]] = {}  # these and the following are divided by the load
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
        known = [*self._supposed.items(), (slots, seconds / self._load)]
        for wide, cost in sorted(known, key=lambda point: (-point[0], point[1])):
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
            estimate = [self(slots) / self._load] if slots > 1 and self._measured else []
            samples = self._samples[slots] = deque(estimate, maxlen=SAMPLES)
        self._follow_load(slots, seconds)
        samples.append(seconds / self._load)
        self._measured[slots] = _low_median(samples)
        self._points = []

    def _follow_load(self, slots: int, seconds: float) -> None:
        """Measure the load by a step.

        A step costs at least what a narrower one costs. So a step that was faster than that shows that the load has
        fallen, even if its width was hardly measured before.
        """
        known = (width for width in self._samples if width <= slots and self._is_settled(width))
        least = SLACK * max((self._measured[width] for width in known), default=0.0)
        if self._is_settled(slots):
            cost = max(least, self._measured[slots])
        elif seconds < self._load * least:
            cost = least
        else:
            return
        self._loads.append(seconds / cost)
        self._load = _low_median(self._loads)

    def __call__(self, slots: int, *, hopeful: bool = False) -> float:
        """Return the cost of a step: measured, between its neighbours, or extrapolated; nan if nothing is known.

        A step that was not measured is never estimated to cost less than a narrower one.

        Args:
            slots: slots of the step.
            hopeful: whether a step that was not measured is estimated to cost little more than a narrower one, as
                where slots are free up to some number. Otherwise costs lie on straight lines.
        """
        points = self._points = self._points or self._known_points()
        return self._load * _between(points, slots, hopeful=hopeful) if points else math.nan

    def _known_points(self) -> list[tuple[int, float]]:
        """Return slots, in order, and their cost at a load of 1: measured, and beyond that supposed."""
        widest = max(self._measured, default=0)
        most = math.inf
        points: list[tuple[int, float]] = []
        for slots, cost in sorted(self._measured.items(), reverse=True):
            if self._is_settled(slots):
                most = min(most, cost)  # if a wider step costs less, it was measured later
            points.append((slots, min(cost, most / SLACK)))
        points.reverse()
        return points + sorted((slots, cost) for slots, cost in self._supposed.items() if slots > widest)

    def _is_settled(self, slots: int) -> bool:
        """Return whether a width was measured often enough."""
        return len(self._samples.get(slots, ())) >= SETTLED


def _low_median(samples: Iterable[float]) -> float:
    """Return the median; of an even number of samples, the lower one of the two in the middle."""
    ordered = sorted(samples)
    return ordered[(len(ordered) - 1) // 2]


def _between(points: Sequence[tuple[int, float]], slots: int, *, hopeful: bool) -> float:
    """Return the cost of so many slots, given that of others in order; see `Costs.__call__`."""
    at = bisect_left(points, (slots, 0.0))
    if at == len(points):
        low, cost = points[-1]
        return cost * (slots / low) ** GROWTH
    high, cost = points[at]
    if at == 0:
        return cost
    low, below = points[at - 1]
    share = (slots - low) / (high - low)
    return below + max(0.0, cost - below) * (share**2 if hopeful else share)


def _is_time(seconds: float) -> bool:
    """Return whether a number can be a duration."""
    return 0 < seconds < math.inf
