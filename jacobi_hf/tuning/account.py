"""What a call has gained over ordinary decoding. Plain Python on the host; amounts are in steps of one slot."""

from __future__ import annotations

import math
from collections import Counter
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jacobi_hf.tuning.costs import Costs
    from jacobi_hf.tuning.options import RowOutcome
    from jacobi_hf.tuning.policy import Policy

T = TypeVar("T")


class Account:
    """The tokens of a call, minus what its steps cost. What is left may be spent on wide steps.

    A batch ends with its slowest row, and a row that has no luck with guesses only pays for those of others. So the
    tokens are a mean over the slow rows (`slowest`), and the account has at most what the very slowest row has gained,
    plus a *lag*: for a while, that row may have so many tokens less than with ordinary decoding. What it lacks at the
    end of the call is taken from the lag of the next call, and what it has more is added.

    Args:
        credit: what may be spent before anything is gained.
        costs: what steps cost.
        lag: tokens that the slowest row may lack.
        policy: constants.
        grows: whether the lag is at first a share of the tokens so far (`Policy.first_lag`), for a call that may be
            short.

    Attributes:
        spent: cost of all steps.
        tokens: new tokens of a slow row, in the mean.
    """

    def __init__(self, credit: float, costs: Costs, lag: float, policy: Policy, *, grows: bool = False) -> None:
        self._costs = costs
        self._price = 1 - policy.accrual  # the rest of the time is for trying
        self._lag = lag
        self._slow = policy.slow
        self._share = policy.first_lag if grows else math.inf
        self._mean = self._slowest = self._start = credit
        self._least: int | None = None  # new tokens of the slowest row
        self._steps_of: Counter[int] = Counter()  # by slots
        self.spent = 0.0
        self.tokens = 0.0

    @property
    def credit(self) -> float:
        """What may be spent."""
        lag = min(self._lag, self._share * self._least) if self._least else 0.0
        return min(self._mean, self._slowest + lag)

    @property
    def lag_left(self) -> float:
        """Tokens that the slowest row of the next call may lack, by how this one went."""
        return max(0.0, self._lag + self._slowest - self._start)

    def note(self, slots: int, rows: Sequence[RowOutcome]) -> tuple[float, float]:
        """Take in a step of so many slots; return its tokens of a slow row, in the mean, and its cost."""
        spent = self._costs(slots) / self._costs(1)
        slow = slowest(((row.total - row.tokens, row.tokens) for row in rows), self._slow)
        gained = sum(tokens for _, tokens in slow) / len(slow)
        before = min(row.total - row.tokens for row in rows) if self._least is None else self._least
        self._least = min(row.total for row in rows)
        self._mean += gained - self._price * spent
        self._slowest += self._least - before - self._price * spent
        self._steps_of[slots] += 1
        self.spent += spent
        self.tokens += gained
        return gained, spent

    def settle(self) -> None:
        """Compute anew what all steps have cost: earlier estimates were not exact."""
        spent = sum(steps * self._costs(slots) for slots, steps in self._steps_of.items()) / self._costs(1)
        self._mean += self._price * (self.spent - spent)
        self._slowest += self._price * (self.spent - spent)
        self.spent = spent


def slowest(rows: Iterable[tuple[int, T]], share: float) -> list[tuple[int, T]]:
    """Return the rows with the fewest new tokens, at least one.

    Args:
        rows: for each unfinished row, its new tokens and something else.
        share: of the rows that are returned.
    """
    ordered = sorted(rows, key=itemgetter(0))
    return ordered[: math.ceil(share * len(ordered))]
