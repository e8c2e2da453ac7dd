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

A batch ends with its slowest row. So in a batch all of this is about the slow rows alone, a quarter of them.

The controller is plain Python on the host: no tensors, no clock and no random numbers of its own. The same
measurements give the same choices.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from dataclasses import replace
from typing import TYPE_CHECKING

from jacobi_hf.tuning.acceptance import OTHERS_LENGTH, expected, expected_of
from jacobi_hf.tuning.account import Account, slowest
from jacobi_hf.tuning.policy import POLICY, Policy
from jacobi_hf.tuning.trials import TrialTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from jacobi_hf.tuning.memory import Memory
    from jacobi_hf.tuning.options import Option, RowOutcome

ORDERS = 3  # the longest n-gram that a lookup matches
Orders = tuple[int, int, int, int]  # slow rows whose match has the order 0, 1 and 2, and all slow rows


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
        self._bases = [replace(option, lookup=0) for option in self._options]
        self._members = {base: [i for i, other in enumerate(self._bases) if other == base] for base in self._bases}
        self._alone = self._bases[0]
        by_slots = sorted(range(len(self._options)), key=self._slots.__getitem__)
        self._backbones = [i for i in by_slots if self._options[i].backbone]
        self._lookups = [i for i in by_slots if self._options[i].lookup and not self._options[i].backbone]
        self._base = self._alone

        self._call = min(max(limit, 1), policy.call)
        advance = (policy.advance if memory.calls else policy.first_advance) * self._call
        lag = policy.first_lag * self._call if memory.lag is None else min(policy.lag * self._call, memory.lag)
        self._account = Account(memory.bank + advance, self._costs, lag, policy, grows=memory.lag is None)
        self._tokens_of_late = self._time = 0.0  # per row, and in steps of one slot; their ratio is the price of time
        self._recent: deque[Orders] = deque(maxlen=policy.renewal)
        self._plan: dict[Orders, int] = {}
        self._rows = self._rows_at_most = 0
        self._due: set[int] = set()  # orders at which the lookup is to be tried
        self._left = 0  # steps until the plan is renewed
        self._trial = 0  # steps that are left of a trial of the backbone
        self._excluded: frozenset[Option] = frozenset()
        self._schedule = [TrialTimes(policy) for _ in range(1 + len(self._rates.lookups))]  # backbone, then orders
        self._since_one = 0  # steps since the last one of one slot
        self._steps_on = 0  # steps in a row that sent the backbone
        self._rates.begin()

    def start(self, prefill_slots: int, prefill_seconds: float) -> None:
        """Take in what the prefill cost, a free sample of what wide steps cost.

        Args:
            prefill_slots: slots of a row in the prefill.
            prefill_seconds: its time.
        """
        self._costs.suppose(prefill_slots, prefill_seconds)

    def choose(self, rows: Sequence[tuple[int, int]]) -> Option:
        """Return the option of the next step.

        Args:
            rows: for each unfinished row, its new tokens, and the length of the n-gram that the lookup has matched; 0
                without a match.
        """
        orders = [order for _, order in slowest(rows, self._policy.slow)]
        self._since_one += 1
        if len(self._options) == 1 or not self._costs.known or not orders or self._measures_one():
            self._since_one = 0
            return self._options[0]
        counts = (orders.count(0), orders.count(1), orders.count(2), len(orders))
        if len(orders) != self._rows:  # matches of other rows say nothing of what these gain
            self._recent.clear()
            self._left = 0
        self._recent.append(counts)
        self._left -= 1
        if self._left < 0:
            self._renew(len(orders))
        picked = self._plan.get(counts)
        if picked is None:
            picked = self._plan[counts] = self._best(self._base, self._values(counts))
        budget = max(self._account.credit + self._policy.overdraft * self._call, 0.0) + self._policy.allowance
        if self._extra[picked] > budget and not self._trial:
            self._base = self._alone
            self._left = 0
            picked = 0
        if not picked:
            self._since_one = 0
        return self._options[picked]

    def exclude(self, options: Iterable[Option]) -> None:
        """Choose none of these options from now on; one slot alone can be chosen always."""
        self._excluded = frozenset(options) - {self._options[0]}
        self._left = 0
        if all(self._options[index] in self._excluded for index in self._members[self._base]):
            self._base = self._alone
            self._trial = 0

    def note(self, option: Option, slots: int, seconds: float, rows: Sequence[RowOutcome]) -> None:
        """Learn from a step.

        Args:
            option: what `choose` returned for the step.
            slots: slots that a row really had.
            seconds: time of the step; NaN if it says nothing of other such steps.
            rows: outcomes of the rows that were unfinished before the step.
        """
        self.counts[option] += 1
        if not math.isnan(seconds):
            self.seconds[option] += seconds
        self._costs.note(slots, seconds)
        self._steps_on = self._steps_on + 1 if option.backbone else 0
        for _, row in slowest(((row.total - row.tokens, row) for row in rows), self._policy.slow):
            self._rates.note(row, warm=self._steps_on > 1)
        self._rows_at_most = max(self._rows_at_most, len(rows))
        if not rows or not self._costs.known:
            return
        gained, spent = self._account.note(slots, rows)
        self._tokens_of_late = self._policy.memory * self._tokens_of_late + gained
        self._time = self._policy.memory * self._time + spent
        if spent - gained > self._policy.loss and not self._trial:
            self._left = 0
        if self._ends_trial(option, rows):
            self.probing_seconds += max(0.0, spent - 1) * self._costs(1)

    def end(self) -> None:
        """Leave to later calls what this one has learnt and earned. A call too short for either changes nothing."""
        if not self._account.spent:
            return
        policy = self._policy
        self._rates.end(first=not self._memory.calls)
        most = max(policy.bank * self._call, self._memory.bank)  # a short call leaves what a long one has banked
        least = min(-policy.debt * self._call, self._memory.bank)
        self._memory.bank = max(least, min(most, self._account.credit))
        self._memory.calls += 1
        if self._rows_at_most > 1:
            self._memory.lag = min(policy.lag * self._call, self._account.lag_left)

    def _measures_one(self) -> bool:
        """Return whether the next step has one slot because its cost, to which all others are compared, is old.

        The less there is to win by wide steps, the more often: then the cost decides, and the step costs little.
        """
        price = max(1.0, self._tokens_of_late / self._time) if self._time else 1.0
        return not self._trial and self._since_one > self._policy.remeasure * price**2

    def _ends_trial(self, option: Option, rows: Sequence[RowOutcome]) -> bool:
        """Return whether a step belonged to a trial, and have the plan renewed if the trial is over."""
        if self._trial and option.backbone:
            self._trial -= 1
            if not self._trial:
                self._left = 0
            return True
        if option.backbone or not option.lookup:
            return False
        tried = self._due & {min(row.order, ORDERS) for row in rows}
        for order in tried:
            self._postpone(order)
            self._left = 0
        self._due -= tried
        return bool(tried)

    def _postpone(self, source: int) -> None:
        """Note that a source is tried: 0 for the backbone, or the order of a lookup."""
        self._schedule[source].postpone(self._account.tokens)
        self._rates.note_trial(source)

    def _renew(self, rows: int) -> None:
        """Compute all values anew from costs and acceptance, and choose the base."""
        self._rows = rows
        self._left = self._policy.renewal - 1
        self._plan.clear()
        one = self._costs(1)
        self._account.settle()
        self._extra = [self._extra_of(slots, one) for slots in self._slots]
        self._due = set()
        self._gain = self._gains(self._rates.backbone.rates)
        if not self._time:
            self._begin_price()
        self._set_charges(self._policy.overdraft)
        if not self._trial:
            self._choose_base()

    def _extra_of(self, slots: int, one: float) -> float:
        """Return what a step costs more than one slot.

        An account that is rich tries widths that were never measured: it takes a low estimate for them if it can also
        pay the usual estimate.
        """
        extra = max(0.0, self._costs(slots) / one - 1)
        if self._policy.rich * self._call < self._account.credit >= extra:
            return max(0.0, self._costs(slots, hopeful=True) / one - 1)
        return extra

    def _begin_price(self) -> None:
        """Set the price of time at the start of a call to the best rate of tokens that is expected."""
        self._tokens_of_late = self._time = self._policy.start
        for _ in range(3):
            self._set_charges(self._policy.overdraft)
            values = self._mean_values()
            best = max(values, key=lambda base: values[base])
            gain = cost = 0.0
            for counts, times in Counter(self._recent).items():
                index = self._best(best, self._values(counts))
                cost += times * (1 + self._extra[index])
                gain += times * (self._values(counts)[index] + self._charge[index]) / self._rows
            self._tokens_of_late = self._time * gain / cost

    def _set_charges(self, overdraft: float) -> None:
        """Compute the charge of each option in tokens; infinite where the account has too little.

        Args:
            overdraft: how far the account may go below 0, as a share of the call.
        """
        policy = self._policy
        price = max(1.0, self._tokens_of_late / self._time) * self._rows
        credit = max(self._account.credit + overdraft * self._call, 0.0)
        caution = policy.caution * min(1.0, max(0.0, 1 - self._account.credit / (0.04 * self._call)))
        self._charge = []
        for option, extra in zip(self._options, self._extra, strict=True):
            steps = 2 if option.backbone and not self._base.backbone else 1
            affordable = steps * (extra - policy.allowance) <= credit and option not in self._excluded
            self._charge.append(price * (1 + (1 + caution) * extra) if affordable else math.inf)

    def _choose_base(self) -> None:
        """Move to another base if it is clearly better, or start a trial of the backbone if it can pay."""
        least = self._policy.switch * self._rows
        values = self._mean_values()
        best = max(values, key=lambda base: values[base])
        if values[best] > values[self._base] + least:
            if best.backbone and not self._base.backbone:
                self._trial = self._policy.trial
            self._base = best
        if not self._base.backbone:
            self._begin_trial()

    def _begin_trial(self) -> None:
        """Begin a trial of the backbone, or have the lookup sent once after matches of some orders.

        The source that was tried least recently is first. If the account has too little for it, the account saves up,
        and no other source is tried.
        """
        for _, cost, source in sorted(self._worth_a_trial()):
            if cost > self._account.credit:
                break
            if not source:
                self._due = set()
                self._base = self._bases[self._allowed(self._backbones)[0]]
                self._trial = self._policy.trial
                self._postpone(0)
                break
            self._due.add(source)
        if self._due:
            self._gain = self._gains(self._rates.backbone.rates)

    def _worth_a_trial(self) -> list[tuple[int, float, int]]:
        """Return the sources whose trial can pay: number of the last trial, cost, source (0 or order of a lookup).

        A trial can pay if the source would gain at its best rates, and if an account can have as much as it costs.
        """
        price = max(1.0, self._tokens_of_late / self._time)
        found = []
        for source, times in enumerate(self._schedule):
            indices = self._allowed(self._lookups if source else self._backbones)
            if times.at > self._account.tokens or not indices:
                continue
            option, extra = self._options[indices[0]], self._extra[indices[0]]
            rates = self._rates.source(source)
            needed = price * (1 + extra) - 1 + self._policy.switch

            def gain(rates: Sequence[float], length: int = option.lookup or option.backbone) -> float:
                return sum(expected(rates, length))

            cost = extra if source else 2 * extra
            is_known = source and gain(rates.rates) > needed
            if gain(rates.hope) > needed and not is_known and cost <= self._policy.bank * self._call:
                found.append((rates.tried, cost, source))
        return found

    def _allowed(self, indices: Sequence[int]) -> list[int]:
        """Return the indices of options that are not excluded."""
        return [index for index in indices if self._options[index] not in self._excluded]

    def _gains(self, backbone: Sequence[float]) -> list[list[float]]:
        """Return the expected tokens of a row by order of the match and by option, if the backbone has these rates."""
        lengths = {option.lookup for option in self._options}
        widths = {option.backbone for option in self._options}
        looked_up = []
        for order, source in enumerate(self._rates.lookups, 1):
            rates = source.hope if order in self._due else source.rates
            looked_up.append(expected_of(rates, lengths))
        windows = expected_of(backbone, widths)
        others = expected(self._rates.others.rates, OTHERS_LENGTH)
        branched = {width: self._rates.guessed.union(window, others) for width, window in windows.items()}
        table: list[list[float]] = [[] for _ in range(1 + len(looked_up))]
        for option in self._options:
            guessed = branched[option.backbone] if option.others else windows[option.backbone]
            total = 1 + sum(guessed)
            table[0].append(total)
            for gains, by_length in zip(table[1:], looked_up, strict=True):
                lookup = by_length[option.lookup]
                gains.append(total + sum(lookup) - self._rates.looked_up(guessed, lookup))
        return table

    def _values(self, counts: Orders) -> list[float]:
        """Return the value of each option, given the rows with a match of order 0, 1 and 2, and all rows."""
        none, one, two, rows = counts
        more = rows - none - one - two
        each = zip(*self._gain, self._charge, strict=True)
        return [none * g0 + one * g1 + two * g2 + more * g3 - charge for g0, g1, g2, g3, charge in each]

    def _best(self, base: Option, values: Sequence[float]) -> int:
        """Return the index of the best option of a base."""
        return max(self._members[base], key=values.__getitem__)

    def _mean_values(self) -> dict[Option, float]:
        """Return the value of each base, as a mean over the last few steps, each with its best lookup."""
        means = dict.fromkeys(self._members, 0.0)
        for counts, times in Counter(self._recent).items():
            values = self._values(counts)
            for base, members in self._members.items():
                means[base] += times * max(values[i] for i in members)
        return {base: total / len(self._recent) for base, total in means.items()}
