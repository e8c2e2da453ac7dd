"""The controller of adaptive steps, without a model: costs and acceptance are made up."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.tuning.acceptance import LOOKUPS, Overlap, SourceRates, Survival, expected
from jacobi_hf.tuning.account import Account
from jacobi_hf.tuning.controller import Controller
from jacobi_hf.tuning.costs import SAMPLES, Costs
from jacobi_hf.tuning.memory import Memory
from jacobi_hf.tuning.options import Option, RowOutcome, options_for
from jacobi_hf.tuning.policy import POLICY
from tests.helpers.properties import at_most

TOKENS = 128
ALL = options_for(32, 16, draft_slots=False, others=True, few=False)
ALONE = Option()


def slots_of(option: Option) -> int:
    return 1 + option.backbone + option.draft_slots + option.lookup + 16 * option.others


class World:
    """Steps of a made-up model on a made-up machine: each source accepts its next guess with a fixed probability.

    Args:
        cost: seconds of a step by its slots.
        lookup: acceptance of the lookup by order of the match, from 1 on.
        backbone: acceptance of the backbone, after its first step.
        noise: standard deviation of the logarithm of a measured time.
        outliers: share of the times that a clock measures wrongly.
    """

    def __init__(
        self,
        cost: Callable[[int], float],
        lookup: Sequence[float] = (0.0, 0.0, 0.0),
        backbone: float = 0.0,
        noise: float = 0.0,
        outliers: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.cost = cost
        self.lookup = lookup
        self.backbone = backbone
        self.noise = noise
        self.outliers = outliers
        self.random = random.Random(seed)

    def accepted(self, sent: int, rate: float) -> int:
        return next((n for n in range(sent) if self.random.random() >= rate), sent)

    def measured(self, slots: int) -> float:
        if self.random.random() < self.outliers:
            return self.random.choice((1e4 * self.cost(slots), 0.0, -5.0, math.nan, math.inf, 1e-9))
        return self.cost(slots) * math.exp(self.random.gauss(0, self.noise))

    def outcome(self, option: Option, order: int, done: int, *, warm: bool) -> RowOutcome:
        lookup = option.lookup if order else 0
        found = self.accepted(lookup, self.lookup[order - 1])
        window = self.accepted(option.backbone, self.backbone) if warm else 0
        pool = (8 * option.others, 0)
        tokens = 1 + max(found, window)
        return RowOutcome(tokens, done + tokens, order, (lookup, found), (option.backbone, window), pool)

    def call(
        self, memory: Memory, rows: int = 1, options: tuple[Option, ...] = ALL, tokens: int = TOKENS
    ) -> tuple[float, list[Option]]:
        """Return the true time of a call, and the option of each step."""
        controller = Controller(options, slots_of, memory, key=rows, sampled=False, limit=tokens)
        controller.start(96, self.measured(96))
        left = [tokens] * rows
        seconds = measured = 0.0
        chosen: list[Option] = []
        while left:
            orders = [self.random.randrange(4) for _ in left]
            option = controller.choose(
                [(tokens - missing, order) for missing, order in zip(left, orders, strict=True)]
            )
            assert option in options
            slots = slots_of(option) - (0 if any(orders) else option.lookup)
            warm = bool(chosen) and chosen[-1].backbone > 0
            pairs = zip(orders, left, strict=True)
            outcomes = [self.outcome(option, order, tokens - missing, warm=warm) for order, missing in pairs]
            time = self.measured(slots)
            controller.note(option, slots, time, outcomes)
            left = [n - one.tokens for n, one in zip(left, outcomes, strict=True) if n > one.tokens]
            seconds += self.cost(slots)
            measured += time
            chosen.append(option)
        controller.end()
        assert controller.counts.total() == len(chosen)
        assert math.isnan(measured) or sum(controller.seconds.values()) == pytest.approx(measured, rel=1e-6)
        assert controller.probing_seconds >= 0
        return seconds, chosen

    def fixed(self, option: Option) -> float:
        """Return the time of a call whose steps all have this option."""
        seconds = 0.0
        done = 0
        warm = False
        while done < TOKENS:
            order = self.random.randrange(4)
            seconds += self.cost(slots_of(option) - (0 if order else option.lookup))
            done = self.outcome(option, order, done, warm=warm).total
            warm = option.backbone > 0
        return seconds


@st.composite
def costs(draw) -> Callable[[int], float]:
    """Draw a curve: one slot costs 1, the first guess something, and each further slot something from a place on."""
    first = draw(st.floats(0, 1))
    slope = draw(st.floats(0, 0.5))
    flat = draw(st.sampled_from((1, 8, 16, 64, 128)))
    return lambda slots: 1 + first * (slots > 1) + slope * max(0, slots - flat)


def rates() -> st.SearchStrategy[float]:
    return st.floats(0, 0.95)


@at_most(25)
@given(costs(), st.tuples(rates(), rates(), rates()), rates(), st.integers(0, 99))
def test_calls_are_never_much_slower_than_ordinary_decoding(cost, lookup, backbone, seed):
    world = World(cost, lookup, backbone, noise=0.1, seed=seed)
    memory = Memory()
    first, _ = world.call(memory)
    later = sum(world.call(memory)[0] for _ in range(4)) / 4
    assert first <= TOKENS / 0.9
    assert later <= TOKENS / 0.95


@at_most(15)
@given(costs(), st.tuples(rates(), rates(), rates()), rates(), st.integers(0, 99))
def test_regret_against_the_best_fixed_option_is_bounded(cost, lookup, backbone, seed):
    """The bound is loose, because the account of a short call pays for few trials."""
    world = World(cost, sorted(lookup), backbone, noise=0.1, seed=seed)
    memory = Memory()
    for _ in range(8):
        world.call(memory)
    later = sum(world.call(memory)[0] for _ in range(4)) / 4
    best = min(sum(world.fixed(option) for _ in range(4)) / 4 for option in ALL)
    assert later <= best * 2


@at_most(15)
@given(st.integers(0, 99), st.sampled_from(("lookup", "backbone")))
def test_a_source_that_becomes_good_is_found(seed, source):
    world = World(lambda slots: 1 + 0.02 * (slots - 1), noise=0.1, seed=seed)
    memory = Memory()
    for _ in range(6):
        world.call(memory)
    setattr(world, source, (0.9,) * 3 if source == "lookup" else 0.9)
    times = [world.call(memory)[0] for _ in range(6)]
    assert times[-1] < TOKENS / 2


@at_most(25)
@given(costs(), st.tuples(rates(), rates(), rates()), rates(), st.integers(0, 99))
def test_windows_do_not_oscillate(cost, lookup, backbone, seed):
    world = World(cost, lookup, backbone, noise=0.15, seed=seed)
    memory = Memory()
    world.call(memory)
    bases = [replace(option, lookup=0) for option in world.call(memory, tokens=1000)[1]]
    changes = sum(before != after for before, after in pairwise(bases))
    assert changes <= 3 + 0.2 * len(bases)


@at_most(10)
@given(costs(), rates(), st.integers(0, 99), st.sampled_from((1, 3)))
def test_the_same_measurements_give_the_same_choices(cost, backbone, seed, rows):
    def calls() -> list[list[Option]]:
        world = World(cost, (0.2, 0.5, 0.8), backbone, noise=0.2, seed=seed)
        memory = Memory()
        return [world.call(memory, rows)[1] for _ in range(3)]

    assert calls() == calls()


@at_most(15)
@given(st.integers(0, 99), st.booleans())
def test_a_clock_that_jumps_does_not_poison_the_costs(seed, good):
    world = World(lambda slots: 1 + 0.1 * (slots - 1), (0.0, 0.0, 0.9 * good), outliers=0.05, noise=0.05, seed=seed)
    memory = Memory()
    times = [world.call(memory)[0] for _ in range(5)]
    assert sum(times[1:]) / 4 <= TOKENS / (1.1 if good else 0.95)


@pytest.mark.parametrize("rows", [1, 8])
def test_steps_stay_at_one_slot_where_everything_wide_is_dear(rows):
    """One slot costs 0.2 s and 64 cost 12 s, as in bf16 on a CPU without it."""
    world = World(lambda slots: 0.2 * slots, (0.3, 0.3, 0.3), 0.3, noise=0.1)
    memory = Memory()
    chosen = [option for _ in range(4) for option in world.call(memory, rows)[1]]
    assert max(map(slots_of, chosen)) <= 9
    assert sum(option != ALONE for option in chosen) <= 0.01 * len(chosen) + 4


def test_the_account_limits_what_is_spent_on_guesses_that_are_never_right():
    for cost_of_a_guess in (0.01, 0.1, 1.0):
        world = World(lambda slots: 1 + cost_of_a_guess * (slots - 1))  # noqa: B023
        memory = Memory()
        share = POLICY.overdraft + POLICY.accrual + 0.01
        assert world.call(memory)[0] <= TOKENS * (1 + share + POLICY.first_advance)
        for _ in range(5):
            assert memory.bank <= POLICY.bank * TOKENS
            assert world.call(memory)[0] <= TOKENS * (1 + share + POLICY.advance + POLICY.bank)


def test_free_slots_are_used():
    world = World(lambda slots: 1.0, (0.8,) * 3, 0.9)
    memory = Memory()
    assert [world.call(memory)[0] for _ in range(3)][-1] < TOKENS / 5


def test_the_order_of_the_match_decides_whether_the_lookup_is_sent():
    world = World(lambda slots: 1 + 0.1 * (slots - 1), (0.02, 0.02, 0.95), noise=0.05)
    memory = Memory()
    for _ in range(4):
        world.call(memory)
    controller = Controller(ALL, slots_of, memory, key=1, sampled=False, limit=TOKENS)
    for _ in range(4):
        assert controller.choose([(8, 1)]).lookup == 0
    assert controller.choose([(8, 3)]).lookup > 0


def test_sampled_calls_have_their_own_acceptance():
    memory = Memory()
    before = memory.sampled.lookups[2].rates
    World(lambda slots: 1.0, (0.0,) * 3).call(memory)
    assert memory.sampled.lookups[2].rates == before
    assert memory.greedy.lookups[2].rates < before


def test_one_option_is_returned_whatever_happens():
    for options in ((ALONE,), options_for(0, 0, draft_slots=False, others=False, few=False)):
        seconds, chosen = World(lambda slots: 1.0).call(Memory(), options=options)
        assert set(chosen) == {ALONE}
        assert seconds == TOKENS


@given(st.integers(0, 200), st.integers(0, 64), st.booleans(), st.booleans(), st.booleans())
def test_options_are_within_their_limits(width, lookup, draft_slots, others, few):
    found = options_for(width, lookup, draft_slots=draft_slots, others=others, few=few)
    assert found[0] == ALONE
    assert len(set(found)) == len(found) <= (6 if few else 15)
    for option in found:
        assert option.backbone <= width
        assert option.lookup <= lookup
        assert (
            option.backbone <= option.draft_slots <= width
            if draft_slots and option.backbone
            else not option.draft_slots
        )
        assert option.backbone or not option.others or not width
        assert others or not option.others
    if width:
        assert max(option.backbone for option in found) == width
    if lookup:
        assert max(option.lookup for option in found) == lookup


@at_most(10)
@given(st.integers(0, 64), st.integers(0, 32), st.booleans(), st.booleans(), st.integers(0, 9))
def test_any_setting_decodes(width, lookup, draft_slots, few, seed):
    options = options_for(width, lookup, draft_slots=draft_slots, others=True, few=few)
    world = World(lambda slots: 1 + 0.01 * slots, (0.2, 0.5, 0.8), 0.5, noise=0.1, seed=seed)
    memory = Memory()
    for rows in (1, 4, 1):
        world.call(memory, rows, options, tokens=40)


@given(st.lists(st.tuples(st.integers(1, 100), st.floats(0.01, 1)), min_size=1, max_size=30))
def test_costs_are_finite_and_ignore_what_is_no_time(samples):
    measured = Costs()
    for slots, seconds in samples:
        measured.note(slots, seconds)
    before = [measured(slots) for slots in range(1, 130)]
    assert all(0 < seconds < math.inf for seconds in before)
    for strange in (0.0, -1.0, math.nan, math.inf):
        measured.note(samples[0][0], strange)
        measured.suppose(50, strange)
        assert [measured(slots) for slots in range(1, 130)] == before


@given(st.floats(0.5, 2), st.integers(2, 64), st.integers(2, SAMPLES), st.sampled_from((1e-9, 1e9)))
def test_one_wrong_time_moves_no_cost_far(cost, slots, times, wrong):
    measured = Costs()
    for _ in range(times):
        measured.note(1, cost)
    measured.suppose(slots, 2 * cost)
    if wrong > 1:  # a first time that is too long is not believed
        measured.note(slots, wrong)
        assert measured(slots) == pytest.approx(2 * cost)
    for _ in range(3):
        measured.note(slots, 3 * cost)
    measured.note(slots, wrong)
    assert 1.99 * cost <= measured(slots) <= 3.01 * cost


def test_the_prefill_bounds_the_cost_of_wide_steps_until_they_are_measured():
    measured = Costs()
    measured.note(1, 1.0)
    assert not measured.known
    measured.note(1, 1.0)
    assert measured.known
    assert measured(65) > 8
    measured.suppose(128, 3.0)
    assert 1 < measured(65) < 3
    measured.note(128, 5.0)
    measured.note(128, 5.0)
    assert measured(128) == 5.0


@given(st.tuples(*[st.floats(0, 1)] * 6), st.integers(0, 40))
def test_expected_guesses_are_a_sum_of_products(rate, length):
    reached, total = 1.0, 0.0
    for depth in range(1, length + 1):
        reached *= rate[sum(depth > end for end in (1, 2, 4, 8, 16))]
        total += reached
    assert sum(expected(rate, length)) == pytest.approx(total, abs=1e-9)


@given(
    st.tuples(*[st.floats(0, 1)] * 6),
    st.tuples(*[st.floats(0, 1)] * 6),
    st.integers(0, 40),
    st.integers(0, 40),
    st.lists(st.integers(0, 32), max_size=20),
)
def test_two_sources_accept_no_less_than_the_better_and_no_more_than_their_sum(first, second, one, other, found):
    overlap = Overlap()
    alone = [expected(first, one), expected(second, other)]
    for common in found:
        overlap.note(*alone, common)
    sums = [sum(guesses) for guesses in alone]
    assert overlap(*alone) <= min(sums) + 1e-9
    assert max(sums) - 1e-9 <= sum(overlap.union(*alone)) <= sum(sums) + 1e-9
    assert sum(overlap.union(*alone)) == pytest.approx(sum(sums) - overlap(*alone))


@given(st.floats(0.7, 0.95), st.booleans(), st.integers(0, 99))
def test_what_two_sources_have_in_common_is_learnt(rate, same, seed):
    """Two sources of equal rate err together, or independently."""
    draws = random.Random(seed)
    overlap = Overlap()
    alone = expected([rate] * 6, 8)

    def accepted() -> int:
        return next((n for n in range(8) if draws.random() >= rate), 8)

    shares = []
    for _ in range(400):
        first = accepted()
        overlap.note(alone, alone, first if same else min(first, accepted()))
        shares.append(overlap.share)
    assert statistics.mean(shares) > 0.6 if same else statistics.mean(shares) < 0.45


@at_most(20)
@given(st.floats(0.05, 0.95), st.integers(1, 24), st.integers(0, 99))
def test_rates_converge_to_the_truth(rate, sent, seed):
    source = Survival(*LOOKUPS[0])
    draws = random.Random(seed)
    for _ in range(600):
        source.note(sent, next((n for n in range(sent) if draws.random() >= rate), sent))
    assert source.rates[0] == pytest.approx(rate, abs=0.2)


def test_a_losing_source_is_remembered_as_losing_and_hope_falls_slowly():
    memory = SourceRates()
    hope = memory.backbone.hope
    memory.begin()
    for _ in range(40):
        memory.note(RowOutcome(1, 1, 0, (0, 0), (8, 0)), warm=True)
    memory.end(first=False)
    assert memory.backbone.rates[0] < 0.1
    assert hope[0] / 2 < memory.backbone.hope[0] < hope[0]


def test_a_disturbed_prefill_does_not_count_once_a_longer_one_was_faster():
    """The first call of a model is slow. A cost that follows from its prefill must not stay for good."""
    known = Costs()
    known.note(1, 0.05)
    known.suppose(600, 5.0)
    assert known(65) > 0.5
    known.suppose(700, 1.0)
    assert known(65) < 0.15


@given(st.sampled_from([1, 9]), st.floats(1.5, 4), st.booleans(), st.floats(0, 0.15), st.integers(0, 99))
def test_a_width_that_is_not_measured_follows_the_load_of_the_machine(width, load, falls, noise, seed):
    """Other programs come or go while steps of one width run; steps of the other width would be as slow or as fast."""
    times = {1: 1.0, 9: 2.0}
    draws = random.Random(seed)
    known = Costs()

    def note(slots: int, factor: float) -> None:
        known.note(slots, factor * times[slots] * math.exp(draws.gauss(0, noise)))

    for _ in range(2 * SAMPLES):
        for slots in times:
            note(slots, load if falls else 1.0)
    for _ in range(2 * SAMPLES):
        note(width, 1.0 if falls else load)
    assert known(9) / known(1) == pytest.approx(2.0, rel=3 * noise + 0.01)
    assert known(width) == pytest.approx(times[width] * (1.0 if falls else load), rel=3 * noise + 0.01)


@given(st.integers(2, 8), st.integers(1, 127), st.floats(0, 30), st.booleans())
def test_a_batch_gains_no_more_than_its_slowest_row_and_a_lag(rows, steps, lag, grows):
    costs = Costs()
    for _ in range(2):
        costs.note(1, 1.0)
        costs.note(9, 1.5)
    account = Account(2.0, costs, lag, POLICY, grows=grows)
    for step in range(1, steps + 1):
        lucky = [RowOutcome(4, 4 * step) for _ in range(rows - 1)]
        gained, spent = account.note(9, [RowOutcome(1, step), *lucky])
        assert spent == 1.5
        slow = math.ceil(POLICY.slow * rows)
        assert gained == pytest.approx((1 + 4 * (slow - 1)) / slow)
    lost = steps * (1 - 1.5 * (1 - POLICY.accrual))
    allowed = min(lag, POLICY.first_lag * steps) if grows else lag
    assert account.credit == pytest.approx(min(2 + lost + steps * (gained - 1), 2 + lost + allowed))
    assert account.lag_left == pytest.approx(max(0, lag + lost))
    alone = account.note(1, [RowOutcome(1, steps + 1)])
    assert alone == (1.0, 1.0)


def test_a_batch_whose_slowest_row_has_lost_leaves_less_lag_to_the_next_and_wins_it_back():
    options = options_for(0, 8, draft_slots=False, others=False, few=False)
    memory = Memory()

    def call(tokens: int) -> None:
        controller = Controller(options, slots_of, memory, key="any", sampled=False, limit=TOKENS)
        controller.start(9, 5.0)
        for step in range(1, 41):
            controller.note(options[0], 1, 1.0, [RowOutcome(1, step)] * 2)
        slow = RowOutcome(tokens, 40 + tokens)
        controller.note(options[1], 9, 5.0, [slow, replace(slow, tokens=30, total=70)])
        controller.end()

    call(1)
    assert memory.lag == pytest.approx(POLICY.first_lag * TOKENS + 41 - 0.99 * 45, abs=0.02)
    before = memory.lag
    call(9)
    assert memory.lag == pytest.approx(before + 49 - 0.99 * 45, abs=0.02)
    call(30)
    assert memory.lag == POLICY.lag * TOKENS  # no more than this
    batches = memory.lag
    World(lambda slots: slots).call(memory)  # one row says nothing of batches
    assert memory.lag == batches


@given(st.lists(st.tuples(st.integers(2, 10_000), st.floats(0.01, 100)), min_size=30, max_size=60))
def test_prefills_of_any_length_take_little_memory(prefills):
    known = Costs()
    for slots, seconds in prefills:
        known.suppose(slots, seconds)
    points = known._known_points()
    assert 1 <= len(points) <= 16
    assert points == sorted(points, key=lambda point: point[1])
    assert points[0][1] == min(seconds for _, seconds in prefills)


def test_a_call_without_steps_changes_nothing():
    """A call of one token learns nothing and earns nothing, so it takes nothing from the next call either."""
    memory = Memory(bank=3.0, calls=2)
    options = options_for(32, 16, draft_slots=False, others=False, few=False)
    controller = Controller(options, slots_of, memory, key="any", sampled=False, limit=1)
    controller.start(96, 1.0)
    controller.end()
    assert (memory.bank, memory.calls) == (3.0, 2)


def test_a_short_call_leaves_what_a_long_one_has_banked():
    options = options_for(32, 16, draft_slots=False, others=False, few=False)
    for bank in (6.0, -1.2):
        memory = Memory(bank=bank, calls=2)
        controller = Controller(options, slots_of, memory, key="any", sampled=False, limit=8)
        for total in range(1, 9):
            controller.note(options[0], 1, 1.0, [RowOutcome(1, total)])
        controller.end()
        assert abs(memory.bank - bank) < 0.5


def test_matches_of_rows_that_have_ended_do_not_count():
    """Values are sums over rows, so steps of more rows must not be compared with the cost of steps of fewer."""
    options = options_for(32, 16, draft_slots=False, others=False, few=False)
    controller = Controller(options, slots_of, Memory(), key="any", sampled=False, limit=128)
    for total, rows in enumerate((4, 4, 4, 1), 1):
        option = controller.choose([(total, 3)] * rows)
        controller.note(option, 1, 1.0, [RowOutcome(1, total, 3)] * rows)
    assert {orders[3] for orders in controller._recent} == {1}


def test_seconds_of_a_step_that_was_compiled_are_left_out():
    options = options_for(32, 16, draft_slots=False, others=False, few=True)
    controller = Controller(options, slots_of, Memory(), key="any", sampled=False, limit=128)
    for seconds in (math.nan, 1.0):
        controller.note(options[0], 1, seconds, [RowOutcome(1, 1)])
    assert controller.seconds[options[0]] == 1.0
