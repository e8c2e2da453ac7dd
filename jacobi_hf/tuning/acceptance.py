"""How many guesses of a draft source are accepted, estimated depth by depth. Plain Python on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jacobi_hf.tuning.controller import RowOutcome

ENDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 1 << 20)  # depths 1, 2, 3-4, 5-8, .. each share an estimate
RATES = 5  # depths from 9 on share one rate
CLASSES = tuple(pairwise(ENDS))
FADE = 0.015  # weight of a prior that enters with each measurement, so that old ones fade
HOPE = 1.2  # what fades gives way to a prior that is this much better: a source that became good is tried again
WEIGHT = 6.0  # measurements that a prior is worth at the start
FADED = 3.0  # and after everything else has faded


class Survival:
    """Rates at which the guesses of one source are accepted.

    A rate is the share of guesses at a depth that are accepted, among those where all guesses before them were. So a
    step that sends few guesses teaches something about each that the model looked at, and nothing about deeper ones.

    Args:
        prior: the rates before anything is measured, for the depths 1, 2, 3-4, 5-8, and 9 and more.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self._prior = tuple(prior)
        self._seen = [WEIGHT] * RATES
        self._accepted = [WEIGHT * rate for rate in prior]

    @property
    def rates(self) -> tuple[float, ...]:
        """The current estimates, for the depths of `prior`."""
        return tuple(accepted / seen for accepted, seen in zip(self._accepted, self._seen, strict=True))

    def note(self, sent: int, accepted: int) -> None:
        """Take in that a step sent so many guesses, of which the first `accepted` were right."""
        judged = min(sent, accepted + 1)
        for number, prior in enumerate(self._prior):
            before = ENDS[number]
            end = ENDS[number + 1] if number < RATES - 1 else ENDS[-1]
            trials = min(max(judged - before, 0), end - before)
            hits = min(max(accepted - before, 0), end - before)
            self._seen[number] += FADE * (FADED - self._seen[number]) + trials
            self._accepted[number] += FADE * (FADED * min(1.0, HOPE * prior) - self._accepted[number]) + hits

    def doubt(self, most: float) -> None:
        """Let nothing weigh more than so many measurements: another text begins."""
        shares = [min(1.0, most / seen) for seen in self._seen]
        self._seen = [seen * share for seen, share in zip(self._seen, shares, strict=True)]
        self._accepted = [accepted * share for accepted, share in zip(self._accepted, shares, strict=True)]

    def expected(self, length: int) -> list[float]:
        """Return how many guesses are expected to be accepted in each class of depths, if `length` are sent."""
        return expected(self.rates, length)


def expected(rates: Sequence[float], length: int) -> list[float]:
    """Return how many guesses are accepted in each class of depths at the given rates; see `Survival.expected`.

    Args:
        rates: for the depths 1, 2, 3-4, 5-8, and 9 and more.
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


def together(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return what is accepted, by class of depths, if two sources are sent in one step and err independently."""
    if len(first) < len(second):
        first, second = second, first
    found = list(first)
    for number, more in enumerate(second):
        before, end = CLASSES[number]
        found[number] += more * (1 - first[number] / (end - before))
    return found


LOOKUP_PRIORS = ((0.18, 0.6, 0.7, 0.8, 0.85), (0.45, 0.7, 0.75, 0.8, 0.85), (0.6, 0.75, 0.8, 0.85, 0.9))
BACKBONE_PRIOR = (0.06, 0.3, 0.5, 0.6, 0.6)
BACKBONE_HOPE = (0.5, 0.7, 0.75, 0.8, 0.8)
OTHERS_PRIOR = (0.15, 0.4, 0.5, 0.5, 0.5)


@dataclass
class SourceRates:
    """What is known of all sources in one kind of call, greedy or sampled.

    Attributes:
        lookups: the lookup, by order of the match from 1 on; longer matches count as the last one.
        backbone: the backbone, without its first step after a pause.
        others: the best of the other branches.
        hope: rates of the backbone in its best call of late. They decide whether a trial of the backbone can pay.
    """

    lookups: list[Survival] = field(default_factory=lambda: [Survival(prior) for prior in LOOKUP_PRIORS])
    backbone: Survival = field(default_factory=lambda: Survival(BACKBONE_PRIOR))
    others: Survival = field(default_factory=lambda: Survival(OTHERS_PRIOR))
    hope: tuple[float, ...] = BACKBONE_HOPE

    def doubt(self) -> None:
        """Trust everything less, because another text begins."""
        for lookup in self.lookups:
            lookup.doubt(8)
        self.backbone.doubt(4)
        self.others.doubt(4)

    def note(self, row: RowOutcome, *, warm: bool) -> None:
        """Learn from what a step brought a row; `warm` says whether the step before it sent the backbone, too."""
        if row.order and row.lookup[0]:
            self.lookups[min(row.order, len(self.lookups)) - 1].note(*row.lookup)
        if row.backbone[0] and warm:
            self.backbone.note(*row.backbone)
        if row.others[0]:
            self.others.note(*row.others)

    def lookup(self, order: int, length: int) -> list[float]:
        """Return what a lookup of this length and order is expected to have accepted, by class of depths."""
        return self.lookups[min(order, len(self.lookups)) - 1].expected(length) if order else []

    def end(self, *, informed: bool, first: bool) -> None:
        """Renew `hope` after a call: it falls slowly towards what the call has seen, and rises at once.

        Args:
            informed: whether the call has sent the backbone often enough.
            first: whether it was the first call, after which the prior counts less.
        """
        if informed:
            kept = 0.5 if first else 0.9
            self.hope = tuple(
                max(rate, kept * hope) for rate, hope in zip(self.backbone.rates, self.hope, strict=True)
            )
