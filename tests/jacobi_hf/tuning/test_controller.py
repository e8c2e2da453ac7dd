"""The controller of adaptive steps, without a model: costs and acceptance are made up."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.tuning.controller import Controller, Memory, Option, RowOutcome, options_for
from jacobi_hf.tuning.costs import Costs


def slots_of(option: Option) -> int:
    return 1 + option.backbone + option.draft_slots + option.lookup + 16 * option.others


class World:
    """Draws outcomes of steps: each source accepts its next guess with a fixed probability."""

    def __init__(self, seed: int, cost, *, lookup: float = 0.0, backbone: float = 0.0, noise: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.cost = cost
        self.lookup = lookup
        self.backbone = backbone
        self.noise = noise
        self.was_on = False

    def accepted(self, sent: int, rate: float) -> int:
        return next((n for n in range(sent) if self.random.random() >= rate), sent)

    def step(self, option: Option, order: int) -> tuple[int, float, RowOutcome]:
        lookup = option.lookup if order else 0
        found = self.accepted(lookup, self.lookup)
        window = self.accepted(option.backbone, self.backbone) if self.was_on else 0
        self.was_on = option.backbone > 0
        slots = slots_of(option) - option.lookup + lookup
        seconds = self.cost(slots) * math.exp(self.random.gauss(0, self.noise))
        outcome = RowOutcome(1 + max(found, window), order, (lookup, found), (option.backbone, window))
        return slots, seconds, outcome


def call(world: World, memory: Memory, tokens: int = 128, options=None) -> tuple[float, list[Option]]:
    """Return the time of a call and the options of its steps."""
    options = options or options_for(32, 16, draft_slots=False, others=False, few=False)
    controller = Controller(options, slots_of, memory, key="any", sampled=False, limit=tokens)
    controller.start(96, world.cost(96))
    total = 0.0
    done = 0
    chosen = []
    while done < tokens:
        order = world.random.choice((0, 1, 2, 3))
        option = controller.choose([order])
        assert option in options
        slots, seconds, outcome = world.step(option, order)
        controller.note(option, slots, seconds, [outcome])
        total += seconds
        done += outcome.tokens
        chosen.append(option)
    controller.end()
    assert controller.counts.total() == len(chosen)
    assert sum(controller.seconds.values()) == total or math.isclose(sum(controller.seconds.values()), total)
    return total, chosen


def test_wide_steps_are_used_where_they_are_free_and_never_where_they_cannot_pay():
    memory = Memory()
    flat = World(0, lambda slots: 1.0, lookup=0.8, backbone=0.9)
    times = [call(flat, memory)[0] for _ in range(3)]
    assert times[-1] < 128 / 4
    dear = World(0, lambda slots: 0.2 + 0.06 * (slots - 1), lookup=0.5, backbone=0.3)
    memory = Memory()
    for _ in range(3):
        _, chosen = call(dear, memory)
        assert max(map(slots_of, chosen)) < 64


@given(st.lists(st.tuples(st.integers(1, 100), st.floats(0.01, 1)), min_size=1, max_size=30))
def test_costs_are_finite_and_ignore_what_is_no_time(samples):
    costs = Costs()
    for slots, seconds in samples:
        costs.note(slots, seconds)
    for strange in (0.0, -1.0, math.nan, math.inf):
        before = [costs(slots) for slots in range(1, 130)]
        costs.note(samples[0][0], strange)
        costs.suppose(50, strange)
        assert [costs(slots) for slots in range(1, 130)] == before
    assert all(0 < costs(slots) < math.inf for slots in range(1, 130))


def test_one_option_is_returned_whatever_happens():
    memory = Memory()
    total, chosen = call(World(0, lambda slots: 1.0), memory, options=(Option(),))
    assert set(chosen) == {Option()}
    assert total == 128


def test_a_disturbed_prefill_does_not_count_once_a_longer_one_was_faster():
    """The first call of a model is slow. A cost that follows from its prefill must not stay for good."""
    costs = Costs()
    costs.note(1, 0.05)
    costs.suppose(600, 5.0)
    assert costs(65) > 0.5
    costs.suppose(700, 1.0)
    assert costs(65) < 0.15


@given(st.lists(st.tuples(st.integers(2, 10_000), st.floats(0.01, 100)), min_size=30, max_size=60))
def test_prefills_of_any_length_take_little_memory(prefills):
    costs = Costs()
    for slots, seconds in prefills:
        costs.suppose(slots, seconds)
    points = costs._known_points()
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


def test_matches_of_rows_that_have_ended_do_not_count():
    """Values are sums over rows, so steps of more rows must not be compared with the cost of steps of fewer."""
    options = options_for(32, 16, draft_slots=False, others=False, few=False)
    controller = Controller(options, slots_of, Memory(), key="any", sampled=False, limit=128)
    for rows in (4, 4, 4, 1):
        option = controller.choose([3] * rows)
        controller.note(option, 1, 1.0, [RowOutcome(1, 3)] * rows)
    assert {orders[3] for orders in controller._recent} == {1}


def test_seconds_of_a_step_that_was_compiled_are_left_out():
    options = options_for(32, 16, draft_slots=False, others=False, few=True)
    controller = Controller(options, slots_of, Memory(), key="any", sampled=False, limit=128)
    for seconds in (math.nan, 1.0):
        controller.note(options[0], 1, seconds, [RowOutcome(1)])
    assert controller.seconds[options[0]] == 1.0
