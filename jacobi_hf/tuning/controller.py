"""Which shape the next step has: the controller of `jacobi_schedule="adaptive"`.

A wide step costs more than a step of one slot, and it pays only if guesses are accepted. Both depend on the machine,
the model and the text, so the controller measures both while a call runs:

- `Costs`: seconds of a step by its slots. They stay with the model, so that later calls begin with them.
- `Survival`: how often guesses are accepted, by source and depth. For the lookup, the length of the n-gram that
  matched (its *order*) says more than anything else, so each order has its own estimate.

The next step has the option with the highest *value*: expected tokens, minus the cost at the *price of time*, which
is the tokens per time of late. Ordinary decoding is the option of one slot alone, and an *account* keeps the call
close to it: what a step costs more than one slot is paid from what earlier steps have gained, from 1 % of the time,
and from a small advance. So a text that nobody can guess costs a few percent at most.

A backbone that is off has to be tried now and then. Such a *trial* takes three steps, because a window restarts from
fillers, so its first step says nothing.

The controller is plain Python on the host: no tensors, no clock and no random numbers of its own. The same
measurements give the same choices.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from jacobi_hf.tuning.acceptance import SourceRates, expected, together
from jacobi_hf.tuning.costs import Costs
from jacobi_hf.tuning.policy import POLICY, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

Orders = tuple[int, int, int, int]  # rows whose match has the order 0, 1 and 2, and all rows


@dataclass(frozen=True)
class Option:
    """A shape that a step may have; all zero is one slot alone.

    Attributes:
        backbone: guesses of the backbone that are verified.
        draft_slots: with a drafter, guesses of the backbone that also go into draft slots.
        lookup: most guesses of the lookup branch.
        others: whether the other branches are sent: those of the pool, and top-k.
    """

    backbone: int = 0
    draft_slots: int = 0
    lookup: int = 0
    others: bool = False


@dataclass(frozen=True)
class RowOutcome:
    """What one step brought one unfinished row.

    Attributes:
        tokens: tokens committed.
        order: length of the n-gram that the lookup had matched for this step; 0 without a match.
        lookup: guesses of the lookup branch that were sent, and how many were accepted, whether or not it won.
        backbone: the same for the backbone.
        others: the same for the best of the other branches.
    """

    tokens: int
    order: int = 0
    lookup: tuple[int, int] = (0, 0)
    backbone: tuple[int, int] = (0, 0)
    others: tuple[int, int] = (0, 0)


def options_for(width: int, lookup: int, *, draft_slots: bool, others: bool, few: bool) -> tuple[Option, ...]:
    """Return the options of a setting, without duplicates; the first is one slot alone.

    Args:
        width: most guesses of the backbone; 0 without one.
        lookup: most guesses of the lookup branch; 0 without one.
        draft_slots: whether the backbone is that of a drafter with draft slots.
        others: whether there are other branches.
        few: at most six options, for steps that are compiled or captured one by one.
    """
    quarters = [max(1, width * quarter // 4) for quarter in (1, 2, 3, 4)] if width else []
    pairs = [(quarter, 0) for quarter in quarters]
    if draft_slots and width:
        pairs = [(quarters[0], quarters[1]), (quarters[1], width), (width, width)]
    lengths = dict.fromkeys((0, lookup // 2, lookup))
    found = [Option(lookup=length) for length in lengths]
    if few:
        found += [Option(*pair) for pair in pairs[:1]]
        found += [Option(*pair, lookup=lookup) for pair in pairs[1:2]]
        found += [Option(*pair, lookup=lookup, others=others) for pair in pairs[-1:]]
    else:
        branches = [(length, other) for other in (False, others) for length in (0, lookup)]
        found += [Option(*pair, lookup=length, others=other) for pair in pairs for length, other in branches]
    return tuple(dict.fromkeys(found))


@dataclass
class Memory:
    """What is kept with a model between calls. One object may serve calls of any shape.

    Attributes:
        costs: by the key that a call gives, which says what its steps have in common: rows, context, device, ...
        greedy: acceptance in greedy calls.
        sampled: acceptance in calls that sample.
        bank: what earlier calls have left for trying, in steps of one slot; below 0 what they have overdrawn.
        calls: calls that have ended.
    """

    costs: defaultdict[Hashable, Costs] = field(default_factory=lambda: defaultdict(Costs))
    greedy: SourceRates = field(default_factory=SourceRates)
    sampled: SourceRates = field(default_factory=SourceRates)
    bank: float = 0.0
    calls: int = 0


class Controller:
    """Chooses the option of each step of a call, and learns from each step.

    Per step: `choose`, then `note` as soon as the outcome is known. `choose` may run ahead of `note` by a step or two,
    where a device reports late.

    Args:
        options: what to choose from; the first is one slot alone. See `options_for`.
        slots_of: returns the most slots of a row in a step of an option.
        memory: what is kept with the model; the call begins with it and adds to it.
        key: what the call's steps have in common. Costs are kept by key.
        sampled: whether the call samples.
        limit: most new tokens of a row.
        policy: constants.

    Attributes:
        counts: steps of each option.
        seconds: what they took, as measured.
        probing_seconds: of the steps of trials, the time beyond that of one slot.
    """

    def __init__(
        self,
        options: Sequence[Option],
        slots_of: Callable[[Option], int],
        memory: Memory,
        *,
        key: Hashable,
        sampled: bool,
        limit: int,
        policy: Policy = POLICY,
    ) -> None:
        self._options = tuple(options)
        self._slots = [slots_of(option) for option in self._options]
        self._memory = memory
        self._costs = memory.costs[key]
        self._rates = memory.sampled if sampled else memory.greedy
        self._policy = policy
        self.counts: Counter[Option] = Counter()
        self.seconds: defaultdict[Option, float] = defaultdict(float)
        self.probing_seconds = 0.0

        # A base is everything but the lookup. It changes rarely, the lookup from step to step.
        bases = [replace(option, lookup=0) for option in self._options]
        self._members = {base: [i for i, other in enumerate(bases) if other == base] for base in bases}
        self._alone = bases[0]
        with_backbone = [base for base in self._members if base.backbone]
        self._trial_base = min(with_backbone, key=lambda base: self._slots[self._members[base][0]], default=None)
        self._base = self._alone

        self._call = min(max(limit, 1), policy.call)
        self._credit = memory.bank + (policy.advance if memory.calls else policy.first_advance) * self._call
        self._earning = (20.0, 20.0)  # tokens per row and time of late; their ratio is the price of time
        self._recent: deque[Orders] = deque(maxlen=policy.renewal)
        self._plan: dict[Orders, int] = {}
        self._rows = 0
        self._left = 0  # steps until the plan is renewed
        self._trial = 0  # steps that are left of a trial
        self._tokens = 0.0  # per row
        self._next_trial = 1.0
        self._gap = policy.gap
        self._steps_on = 0  # steps in a row that sent the backbone
        self._informed = 0
        self._rates.doubt()

    def start(self, prefill_slots: int, prefill_seconds: float) -> None:
        """Take in what the prefill cost, a free sample of what wide steps cost.

        Args:
            prefill_slots: slots of a row in the prefill.
            prefill_seconds: its time.
        """
        self._costs.suppose(prefill_slots, prefill_seconds)

    def choose(self, orders: Sequence[int]) -> Option:
        """Return the option of the next step.

        Args:
            orders: for each unfinished row, the length of the n-gram that the lookup has matched; 0 without a match.
        """
        if len(self._options) == 1 or not self._costs.known or not orders:
            return self._options[0]
        counts = (orders.count(0), orders.count(1), orders.count(2), len(orders))
        self._recent.append(counts)
        self._left -= 1
        if self._left < 0 or len(orders) != self._rows:
            self._renew(len(orders))
        picked = self._plan.get(counts)
        if picked is None:
            picked = self._plan[counts] = self._best(self._base, counts)[1]
        if self._extra[picked] > max(self._credit, 0.0) + self._policy.allowance:
            self._base = self._alone
            self._plan.clear()
            self._trial = 0
            affordable = [i for i in self._members[self._alone] if self._affords(i)]
            picked = max(affordable, key=lambda i: self._value(i, counts))
        return self._options[picked]

    def note(self, option: Option, slots: int, seconds: float, rows: Sequence[RowOutcome]) -> None:
        """Learn from a step.

        Args:
            option: what `choose` returned for the step.
            slots: slots that a row really had.
            seconds: time of the step.
            rows: outcomes of the rows that were unfinished before the step.
        """
        self.counts[option] += 1
        self.seconds[option] += seconds
        self._costs.note(slots, seconds)
        self._steps_on = self._steps_on + 1 if option.backbone else 0
        for row in rows:
            self._rates.note(row, warm=self._steps_on > 1)
            self._informed += self._steps_on > 1 and row.backbone[0] > 0
        if not rows or not self._costs.known:
            return
        one = self._costs(1)
        spent = self._costs(slots) / one
        gained = sum(row.tokens for row in rows) / len(rows)
        self._tokens += gained
        self._credit += gained - (1 - self._policy.accrual) * spent
        tokens, time = self._earning
        self._earning = (self._policy.memory * tokens + gained, self._policy.memory * time + spent)
        if self._trial and option.backbone:
            self._trial -= 1
            self._left = self._left if self._trial else 0
            self.probing_seconds += max(0.0, spent - 1) * one

    def end(self) -> None:
        """Leave to later calls what this one has learnt and earned."""
        policy = self._policy
        self._rates.end(informed=self._informed > 1, first=not self._memory.calls)
        self._memory.bank = self._call * max(-policy.debt, min(policy.bank, self._credit / self._call))
        self._memory.calls += 1

    def _renew(self, rows: int) -> None:
        """Compute all values anew from costs and acceptance, and choose the base."""
        policy = self._policy
        self._rows = rows
        self._left = policy.renewal - 1
        self._plan.clear()
        one = self._costs(1)
        tokens, time = self._earning
        self._price = max(1.0, tokens / time) * rows
        caution = policy.caution * min(1.0, max(0.0, 1 - self._credit / (0.04 * self._call)))
        cost = [self._costs(slots) / one for slots in self._slots]
        self._extra = [max(0.0, each - 1) for each in cost]
        self._charge = [self._price * (each + caution * extra) for each, extra in zip(cost, self._extra, strict=True)]
        self._gain = self._gains(self._rates.backbone.rates)
        if not self._trial:
            self._choose_base(rows)

    def _choose_base(self, rows: int) -> None:
        """Move to another base if it is clearly better, or start a trial if one can pay."""
        least = self._policy.switch * rows
        values = {base: self._mean_value(base) for base in self._members}
        best = max(values, key=lambda base: values[base])
        if values[best] > values[self._base] + least:
            self._base = best
        if self._base.backbone or self._trial_base is None or self._tokens < self._next_trial:
            return
        measured = self._gain
        self._gain = self._gains(self._rates.hope)
        pays = self._mean_value(self._trial_base) > values[self._base] + least
        self._gain = measured
        if pays:
            self._base = self._trial_base
            self._trial = self._policy.trial
            self._next_trial = self._tokens + self._gap
            self._gap = min(2 * self._gap, self._policy.most_gap)

    def _gains(self, backbone: Sequence[float]) -> list[list[float]]:
        """Return the expected tokens of a row by order and option, if the backbone has the given rates."""
        rates = self._rates
        by_width = {width: expected(backbone, width) for width in {option.backbone for option in self._options}}
        others = rates.others.expected(8)
        table = []
        for order in range(len(rates.lookups) + 1):
            lookups = {option.lookup: rates.lookup(order, option.lookup) for option in self._options}
            row = []
            for option in self._options:
                found = together(by_width[option.backbone], lookups[option.lookup])
                row.append(1 + sum(together(found, others) if option.others else found))
            table.append(row)
        return table

    def _value(self, index: int, counts: Orders) -> float:
        """Return the value of an option, given the rows with a match of order 0, 1 and 2, and all rows."""
        none, one, two, rows = counts
        gain = self._gain
        return (
            none * gain[0][index]
            + one * gain[1][index]
            + two * gain[2][index]
            + (rows - none - one - two) * gain[3][index]
            - self._charge[index]
        )

    def _affords(self, index: int) -> bool:
        """Return whether the account has enough for an option, for two steps if it has a backbone."""
        steps = 2 if self._options[index].backbone else 1
        return steps * self._extra[index] <= max(self._credit, 0.0) + steps * self._policy.allowance

    def _best(self, base: Option, counts: Orders) -> tuple[float, int]:
        """Return value and index of the best option of a base that can be paid; minus infinity if there is none."""
        affordable = [i for i in self._members[base] if self._affords(i)]
        if not affordable:
            return float("-inf"), self._members[base][0]
        return max((self._value(i, counts), i) for i in affordable)

    def _mean_value(self, base: Option) -> float:
        """Return the mean value of a base over the orders of the last few steps."""
        seen: Iterable[tuple[Orders, int]] = Counter(self._recent).items()
        return sum(times * self._best(base, counts)[0] for counts, times in seen) / len(self._recent)
