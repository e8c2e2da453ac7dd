"""How many guesses of a draft source are accepted, estimated depth by depth. Plain Python on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from operator import mul
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jacobi_hf.tuning.options import RowOutcome

ENDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 1 << 20)  # depths 1, 2, 3-4, 5-8, .. each share an estimate
RATES = 6  # depths from 17 on share one rate
CLASSES = tuple(pairwise(ENDS))
SHARES = tuple(1 / (end - before) for before, end in CLASSES)
FADE = 0.015  # share of what is known that fades with each measurement
Rates = tuple[float, ...]
KEPT = 0.9  # share of its hope that a source keeps after a call
FIRST_KEPT = 0.5  # the same after the first call
WEIGHTS = (6.0, 4.0, 3.0, 3.0, 3.0, 3.0)  # measurements that a prior is worth, by depth
BACKBONE_WEIGHT = 0.33  # of the weights above: a backbone is on or off by text, so two steps of a trial must be enough
OTHERS_LENGTH = 8  # guesses of one of the other branches, about
CHAIN = 3.0  # measurements that the rate of the depth before is worth


class Survival:
    """Rates at which the guesses of one source are accepted.

    A rate is the share of guesses at a depth that are accepted, among those where all guesses before them were. So a
    step that sends few guesses teaches something about each that the model looked at, and nothing about deeper ones.

    Args:
        prior: the rates before anything is measured, for the depths 1, 2, 3-4, 5-8, 9-16, and 17 and more.
        hope: the highest rates to reckon with, for the same depths.
        weight: how much the prior weighs, relative to the usual.

    Attributes:
        hope: rates of the source in its best call of late. They decide whether trying the source can pay.
        tried: number of its last trial; 0 before the first one.
    """

    def __init__(self, prior: Rates, hope: Rates, weight: float = 1.0) -> None:
        self.hope = hope
        self.tried = 0
        self._seen = [weight * seen for seen in WEIGHTS]
        self._accepted = list(map(mul, self._seen, prior))
        self._news = 0

    @property
    def rates(self) -> Rates:
        """The current estimates, for the depths of `prior`.

        Where little was measured, the rate of the depth before counts, too, if it is higher: a source whose first
        guesses are right is likely to go on.
        """
        found: list[float] = []
        before = 0.0
        for seen, accepted in zip(self._seen, self._accepted, strict=True):
            before = max(accepted / seen, (accepted + CHAIN * before) / (seen + CHAIN))
            found.append(before)
        return tuple(found)

    def note(self, sent: int, accepted: int) -> None:
        """Take in that a step sent so many guesses, of which the first `accepted` were right."""
        self._news += 1
        judged = min(sent, accepted + 1)
        for number in range(RATES):
            before = ENDS[number]
            if judged <= before:
                break
            end = ENDS[number + 1] if number < RATES - 1 else judged
            self._seen[number] += min(judged, end) - before - FADE * self._seen[number]
            self._accepted[number] += max(0, min(accepted, end) - before) - FADE * self._accepted[number]

    def begin(self, most: float) -> None:
        """Begin a call: let nothing weigh more than so many measurements, because another text follows."""
        self._news = 0
        for number, seen in enumerate(self._seen):
            share = min(1.0, most / seen)
            self._seen[number] *= share
            self._accepted[number] *= share

    def end(self, *, first: bool) -> None:
        """End a call: let `hope` fall slowly towards what the call has seen, or rise to it at once.

        Args:
            first: whether it was the first call of a model, after which the initial hope counts less.
        """
        if self._news > 1:
            kept = FIRST_KEPT if first else KEPT
            self.hope = tuple(max(rate, kept * hope) for rate, hope in zip(self.rates, self.hope, strict=True))


def expected(rates: Sequence[float], length: int) -> list[float]:
    """Return how many guesses are accepted in each class of depths at the given rates.

    Args:
        rates: for the depths 1, 2, 3-4, 5-8, 9-16, and 17 and more.
        length: guesses that are sent.
    """
    found = []
    reached = 1.0  # the probability that all guesses before this class are accepted
    for number, (before, end) in enumerate(CLASSES):
        if length <= before:
            break
        rate = rates[min(number, RATES - 1)]
        depths = min(end, length) - before
        survived = rate**depths
        found.append(reached * (rate * (1 - survived) / (1 - rate) if rate < 1 else float(depths)))
        reached *= survived
    return found


def expected_of(rates: Sequence[float], lengths: Iterable[int]) -> dict[int, list[float]]:
    """Return `expected` for each of several lengths."""
    longest = expected(rates, max(lengths, default=0))
    return {length: longest[: ENDS.index(length)] if length in ENDS else expected(rates, length) for length in lengths}


class Overlap:
    """How many accepted guesses two sources have in common if a step sends both.

    Two sources may err independently. Or the worse one is right only where the better one is, as in a text that
    repeats itself: then sending both gains nothing. The truth is between these extremes, and steps that send both show
    where.
    """

    KEPT = 0.97  # share of what is known that is left after a measurement
    WEIGHT = 2.0  # guesses that it takes to learn that two sources do not err independently

    def __init__(self) -> None:
        self._above = 0.0  # common guesses, beyond those of independent sources
        self._most = self.WEIGHT  # what that would be if the worse source were right only where the better one is

    @property
    def share(self) -> float:
        """Where the truth is: 0 if the sources err independently, 1 at the other extreme."""
        return min(1.0, max(0.0, self._above / self._most))

    def __call__(self, first: Sequence[float], second: Sequence[float]) -> float:
        """Return how many accepted guesses are common.

        Args:
            first, second: guesses of each source that are accepted in each class of depths.
        """
        return sum(self._by_class(first, second))

    def _by_class(self, first: Sequence[float], second: Sequence[float]) -> list[float]:
        share = self.share
        return [
            (1 - share) * one * two * part + share * min(one, two)
            for one, two, part in zip(first, second, SHARES, strict=False)
        ]

    def union(self, first: Sequence[float], second: Sequence[float]) -> list[float]:
        """Return what at least one of two sources accepts in each class of depths; arguments as in `__call__`."""
        triples = zip_longest(first, second, self._by_class(first, second), fillvalue=0.0)
        return [one + two - common for one, two, common in triples]

    def note(self, first: Sequence[float], second: Sequence[float], common: int) -> None:
        """Take in how many guesses a step accepted from both sources.

        Args:
            first, second: what was expected, as in `__call__`.
            common: what was found.
        """
        least = sum(map(mul, map(mul, first, second), SHARES))
        most = sum(map(min, first, second))
        self._above = self.KEPT * self._above + common - least
        self._most = self.KEPT * self._most + most - least


# By order of the match from 1 on: what is expected, and what to reckon with.
LOOKUPS = (
    ((0.22, 0.55, 0.6, 0.7, 0.8, 0.8), (0.5, 0.7, 0.75, 0.8, 0.85, 0.85)),
    ((0.6, 0.65, 0.6, 0.7, 0.8, 0.8), (0.8, 0.8, 0.8, 0.85, 0.9, 0.9)),
    ((0.75, 0.75, 0.8, 0.8, 0.85, 0.85), (0.9, 0.9, 0.9, 0.9, 0.9, 0.9)),
)
BACKBONE = ((0.06, 0.3, 0.5, 0.6, 0.6, 0.6), (0.8, 0.85, 0.9, 0.9, 0.9, 0.9))
OTHERS = ((0.4, 0.2, 0.4, 0.5, 0.5, 0.5), (0.6, 0.5, 0.5, 0.5, 0.5, 0.5))


@dataclass
class SourceRates:
    """What is known of all sources in one kind of call, greedy or sampled.

    Attributes:
        lookups: the lookup, by order of the match from 1 on; longer matches count as the last one.
        backbone: the backbone, without its first step after a pause.
        others: the best of the other branches.
        guessed: what the backbone and the other branches have in common.
        looked_up: what these and the lookup have in common.
    """

    lookups: list[Survival] = field(default_factory=lambda: [Survival(*rates) for rates in LOOKUPS])
    backbone: Survival = field(default_factory=lambda: Survival(*BACKBONE, weight=BACKBONE_WEIGHT))
    others: Survival = field(default_factory=lambda: Survival(*OTHERS))
    guessed: Overlap = field(default_factory=Overlap)
    looked_up: Overlap = field(default_factory=Overlap)

    def begin(self) -> None:
        """Begin a call."""
        for lookup in self.lookups:
            lookup.begin(8)
        self.backbone.begin(2)
        self.others.begin(4)

    def note(self, row: RowOutcome, *, warm: bool) -> None:
        """Learn from what a step brought a row; `warm` says whether the step before it sent the backbone, too."""
        if row.backbone[0] and warm:
            self._note_common(row)
        if row.order and row.lookup[0]:
            self.lookups[min(row.order, len(self.lookups)) - 1].note(*row.lookup)
        if row.backbone[0] and warm:
            self.backbone.note(*row.backbone)
        if row.others[0]:
            self.others.note(*row.others)

    def _note_common(self, row: RowOutcome) -> None:
        """Learn from a step that sent the backbone what sources have in common."""
        guessed = expected(self.backbone.rates, row.backbone[0])
        if row.others[0]:
            others = expected(self.others.rates, OTHERS_LENGTH)
            self.guessed.note(guessed, others, min(row.backbone[1], row.others[1]))
            guessed = self.guessed.union(guessed, others)
        if row.order and row.lookup[0]:
            rates = self.lookups[min(row.order, len(self.lookups)) - 1].rates
            looked_up = expected(rates, row.lookup[0])
            self.looked_up.note(guessed, looked_up, min(row.lookup[1], max(row.backbone[1], row.others[1])))

    def source(self, number: int) -> Survival:
        """Return the backbone for 0, else the lookup after a match of this order."""
        return self.lookups[number - 1] if number else self.backbone

    def note_trial(self, number: int) -> None:
        """Note that a source is tried; see `source`."""
        self.source(number).tried = 1 + max(self.backbone.tried, *(lookup.tried for lookup in self.lookups))

    def end(self, *, first: bool) -> None:
        """End a call; see `Survival.end`."""
        for source in (*self.lookups, self.backbone, self.others):
            source.end(first=first)
