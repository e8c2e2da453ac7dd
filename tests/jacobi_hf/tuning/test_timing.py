"""The search runs on made-up times and the stopwatch on a made-up model, so the fastest strategy is known."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CompileConfig

from jacobi_hf import JacobiConfig
from jacobi_hf.output import JacobiStats
from jacobi_hf.tuning.autotune import COMPILED, Grid, recommend, search
from jacobi_hf.tuning.strategies import ASSISTED, describe, sources_of
from jacobi_hf.tuning.timing import Comparison, Run, Stopwatch
from tests.helpers.drafters import drafting, random_drafter
from tests.helpers.models import fresh_model, tiny_model
from tests.helpers.properties import at_most

CONSTANT = JacobiConfig(jacobi_schedule="constant")
WINDOW = replace(CONSTANT, jacobi_block_size=4, jacobi_max_blocks=1, jacobi_pool_size=0, jacobi_lookup_tokens=0)
ADAPTIVE = JacobiConfig()
BATCH = {"input_ids": torch.tensor([[3, 4, 5]])}


def plain(strategy):
    return sources_of(strategy, tiny_model("qwen3"))


def with_drafter(strategy):
    return tuple("drafter" if name == "window" else name for name in plain(strategy))


class World:
    """A clock that advances by made-up times: each strategy needs a random number of steps of one second for a batch.

    If `varied`, the number differs between batches.
    """

    def __init__(self, seed, batches, budget, *, varied=True, drafted=False, steps=None):
        self.seed = seed
        self.varied = varied
        self.now = 0.0
        self.budget = budget
        self.steps = steps or {}
        self.begun = defaultdict(list)
        self.order = []
        sources = with_drafter if drafted else plain
        self.comparison = Comparison(
            self.measure,
            list(range(batches)),
            lambda: self.now > self.budget,
            sources,
            drafted=drafted,
            left=lambda: self.budget - self.now,
        )

    def seconds(self, strategy, batch):
        drawn = random.Random(f"{self.seed} {strategy} {batch if self.varied else ''}").randint(5, 60)
        return self.steps.get(strategy, drawn)

    def total(self, strategy, batches):
        return sum(self.seconds(strategy, batch) for batch in range(batches))

    def measure(self, strategy, batch):
        self.begun[strategy].append(self.now)
        self.order.append((strategy, batch))
        count = self.seconds(strategy, batch)
        self.now += count
        return Run({1 if strategy is None else 9: [1.0] * count}, 0.0, 60, count)

    def search(self, grid=None):
        return search(self.comparison, [ASSISTED], grid or Grid(), [ADAPTIVE])


@given(seed=st.integers(0, 10**6), batches=st.integers(1, 9), budget=st.integers(0, 4000), drafted=st.booleans())
def test_the_answer_is_the_fastest_on_the_prompts_it_shares_with_any_other(seed, batches, budget, drafted):
    """The time may end in the middle of a round."""
    world = World(seed, batches, budget, drafted=drafted)
    table, untried = world.search()
    best = table[0]
    for other in table:
        assert best.prompts >= other.prompts
        assert world.total(best.strategy, other.prompts) <= world.total(other.strategy, other.prompts)
        assert other.seconds == pytest.approx(world.total(other.strategy, other.prompts))
        assert other.speedup == pytest.approx(world.total(None, other.prompts) / other.seconds)
    # Nothing that was measured is dropped.
    assert Counter(timing.strategy for timing in table) == Counter(world.begun.keys())
    assert not set(untried) & set(world.begun)
    assert None in world.begun
    starts = [start for starts in world.begun.values() for start in starts]
    assert sum(start > budget for start in starts) == 0
    assert set(map(len, world.begun.values())) <= set(range(1, batches + 1))


@at_most(50)
@given(seed=st.integers(0, 10**6), drafted=st.booleans())
def test_the_better_half_goes_on_and_the_best_of_all_wins(seed, drafted):
    world = World(seed, 8, 10**9, varied=False, drafted=drafted)
    table, untried = world.search()
    assert not untried
    assert table[0].seconds / table[0].prompts == min(world.seconds(strategy, 0) for strategy in world.begun)
    assert len(world.begun[ADAPTIVE]) == 8  # as often as ordinary decoding, however slow
    rivals = sorted(set(world.begun) - {None, ADAPTIVE}, key=lambda strategy: world.seconds(strategy, 0))
    for prompts in (4, 8):
        rivals, beaten = rivals[: -(-len(rivals) // 2)], rivals[-(-len(rivals) // 2) :]
        reached = [
            strategy
            for strategy, starts in world.begun.items()
            if strategy not in (None, ADAPTIVE) and len(starts) >= prompts
        ]
        assert len(reached) == len(rivals)
        assert max(world.seconds(strategy, 0) for strategy in reached) <= min(
            world.seconds(strategy, 0) for strategy in beaten
        )


def test_a_round_that_time_cuts_short_does_not_narrow_the_answer():
    """The fastest strategy ran on one prompt, those before it in the list on two."""
    fastest = replace(CONSTANT, jacobi_max_blocks=0, jacobi_pool_size=0, jacobi_lookup_tokens=24)
    one_prompt = World(0, 1, 10**9, steps={fastest: 1})
    one_prompt.search()
    cut = World(0, 2, 10**9, steps={fastest: 1})
    cut.comparison.is_over = lambda: len(cut.order) > len(one_prompt.order) + 3
    table, _ = cut.search()
    assert {len(runs) for runs in cut.comparison.runs.values()} == {1, 2}
    assert table[0].strategy == fastest
    assert {timing.prompts for timing in table} == {1}


def test_little_time_goes_to_few_strategies_on_several_prompts():
    world = World(0, 9, 60 * 22)
    table, untried = world.search()
    on_all = {timing.strategy for timing in table if timing.prompts >= 4}
    assert {None, ADAPTIVE} <= on_all
    assert untried
    assert len(table) + len(untried) == 2 + 1 + len(Grid().apart())
    nearly_none = World(0, 9, 60 * 5)
    table, _ = nearly_none.search()
    assert [timing.strategy for timing in table if timing.prompts > 1] in ([None, ADAPTIVE], [ADAPTIVE, None])


@pytest.mark.parametrize(
    ("window", "adaptive", "answer"),
    [
        ([5, 5, 5, 5], [9, 9, 9, 9], WINDOW),  # surely faster
        ([5, 5, 5, 5], [5.1, 5.0, 5.2, 5.0], ADAPTIVE),  # within the noise
        ([5, 30, 5, 3], [9, 9, 9, 9], ADAPTIVE),  # faster on three of four prompts
        ([20, 20, 20, 20], [12, 12, 12, 12], None),  # the schedule loses to ordinary decoding
    ],
)
def test_what_is_recommended(window, adaptive, answer):
    times = {None: [10.0] * 4, WINDOW: window, ADAPTIVE: adaptive}
    comparison = Comparison(
        lambda strategy, batch: Run({1: [1.0]}, times[strategy][batch] - 1, 10, 9), [0, 1, 2, 3], lambda: False, plain
    )
    comparison.open()
    comparison.run(times, 4)
    assert recommend(comparison, comparison.timings(times)) == answer


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=20))
def test_intervals_hold_the_paired_ratio(times):
    comparison = Comparison(
        lambda strategy, batch: Run({1: [0.5]}, times[batch][strategy is None] - 0.5, 10, 9),
        range(len(times)),
        list,
        plain,
    )
    comparison.run([None, WINDOW], len(times))
    low, high = comparison.interval(WINDOW, None, len(times))
    mean = math.exp(statistics.mean(math.log(theirs / ours) for ours, theirs in times))
    assert low <= mean * (1 + 1e-9)
    assert high >= mean * (1 - 1e-9)
    assert (low, high) == (0, math.inf) if len(times) == 1 else high < math.inf
    there, back = comparison.interval(None, WINDOW, len(times))
    assert len(times) == 1 or (1 / back, 1 / there) == pytest.approx((low, high))


def test_without_time_ordinary_decoding_is_the_answer_and_the_rest_is_listed():
    table, untried = World(0, 3, 0).search()
    assert [timing.strategy for timing in table] == [None]
    assert untried == [ADAPTIVE, ASSISTED, *Grid().apart()]


def test_the_best_windows_are_combined_with_the_best_lookup():
    window = Grid().apart()[5]
    lookup = Grid().apart()[4]
    assert (window.jacobi_max_blocks, lookup.jacobi_max_blocks) == (2, 0)
    world = World(0, 1, 10**9, steps={window: 2, lookup: 3})
    world.search()
    tried = {
        (w.jacobi_lookup_tokens, w.jacobi_pool_size)
        for w in set(world.begun) - {ADAPTIVE}
        if getattr(w, "jacobi_max_blocks", 0) == 2 and w.jacobi_block_size == window.jacobi_block_size
    }
    assert tried == {(0, 0), (lookup.jacobi_lookup_tokens, 0), (0, 2), (lookup.jacobi_lookup_tokens, 2)}


@pytest.mark.parametrize("fastest", [0, 4, 8, 16])
def test_with_a_drafter_the_best_window_is_tried_at_several_verify_widths(fastest):
    window = Grid().apart()[1]
    widths = {width: replace(window, jacobi_verify_width=width) for width in (0, 4, 8, 16)}
    world = World(0, 1, 10**9, drafted=True, steps={window: 2, widths[fastest]: 1})
    table, _ = world.search()
    assert {w.jacobi_verify_width for w in world.begun if w in widths.values()} == {0, 4, 8, 16}
    assert table[0].strategy == widths[fastest]
    assert ("drafter",) in world.comparison.prices()
    assert ("window",) not in world.comparison.prices()
    plain = World(0, 1, 10**9, steps={window: 2})
    plain.search()
    assert not any(getattr(strategy, "jacobi_verify_width", 0) for strategy in plain.begun)


def test_few_strategies_are_tried_where_each_compiles():
    world = World(0, 1, 10**9)
    world.search(COMPILED)
    assert len(world.begun) == 9  # ordinary and assisted decoding and the adaptive schedule among them


def test_prices_are_medians_so_that_a_hiccup_changes_nothing():
    fast = Grid().apart()[1]
    slow = Grid().apart()[3]
    times = {None: [1.0] * 9, slow: [0.5] * 9, fast: [0.5] * 4 + [50.0]}
    comparison = Comparison(
        lambda strategy, _: Run({9: times[strategy]}, 0.1, 10, len(times[strategy])), [0], lambda: False, plain
    )
    comparison.open()
    comparison.run(times, 1)
    assert comparison.ranked(times) == [fast, slow, None]
    assert comparison.prices()[("window",)] == {9: 500.0}


def test_batches_that_end_at_once_are_passed_over():
    comparison = Comparison(
        lambda strategy, batch: Run({1: [1.0]} if batch == 2 else {}, 0.1, 1, 1), [0, 1, 2], lambda: True, plain
    )
    comparison.open()
    assert comparison.batches == [2]
    with pytest.raises(ValueError, match="every prompt ends at its first new token"):
        Comparison(lambda strategy, batch: Run({}, 0.1, 1, 1), [0, 1], lambda: False, plain).open()


class FakeModel:
    """A model that answers with two tokens; `stats` are the `jacobi_stats` of its first calls, in order."""

    device = torch.device("cpu")

    def __init__(self, *stats):
        self.stats = list(stats)
        self.calls = []

    def generate(self, input_ids, **arguments):
        self.calls.append(arguments)
        torch.rand(3)
        sequences = torch.cat([input_ids, torch.ones(len(input_ids), 2, dtype=torch.long)], 1)
        if "streamer" in arguments:
            for tokens in (input_ids, sequences[0, -2:-1], sequences[0, -1:]):
                arguments["streamer"].put(tokens)
        if arguments["decoding"] is None and not arguments.get("return_dict_in_generate"):
            return sequences
        stats = (
            self.stats.pop(0)
            if self.stats
            else JacobiStats(new_tokens=[2], row_forwards=[2], seconds_by_width={5: [1.0]})
        )
        return SimpleNamespace(sequences=sequences, jacobi_stats=stats)


def first_call(**counts):
    slow = JacobiStats(new_tokens=[2], row_forwards=[2], seconds_by_width={5: [1000.0]})
    return SimpleNamespace(**vars(slow) | counts)


def test_calls_that_compile_or_record_do_not_count():
    model = FakeModel(first_call(compiled_steps=2), first_call(compiled_steps=0, cuda_graphs=1))
    assert Stopwatch(model, {}).measure(WINDOW, BATCH).seconds_by_width == {5: [1.0]}
    assert len(model.calls) == 3


@pytest.mark.slow
def test_no_strategy_is_timed_while_it_compiles():
    """This holds for ordinary decoding, and for steps of the same widths under another config."""
    torch.compiler.reset()  # forget what other tests have compiled
    model = fresh_model("qwen3")
    compiled = []
    watch = Stopwatch(
        model,
        {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0},
        compile_config=CompileConfig(backend="eager", mode=None),
    )
    watch._compile_config._compile_all_devices = True
    generate = model.generate

    def noted(*args, **kwargs):
        before = unique_graphs()
        output = generate(*args, **kwargs)
        compiled.append(unique_graphs() > before)
        return output

    model.generate = noted
    alike = replace(WINDOW, jacobi_block_size=2, jacobi_max_blocks=2)
    for strategy in (None, WINDOW, alike):
        compiled.clear()
        watch.measure(strategy, BATCH)
        assert compiled[0]
        assert not compiled[-1]


def unique_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_strategies_are_compared_with_compiled_ordinary_decoding():
    model = FakeModel()
    config = CompileConfig()
    draft = object()
    watch = Stopwatch(model, {"top_k": 5}, draft, config, room=99)
    for strategy in (None, WINDOW, ASSISTED):
        watch.measure(strategy, BATCH)
    ordinary, ours, assisted = model.calls[:3]
    del ordinary["streamer"]
    static = {"cache_implementation": "static", "compile_config": config, "max_cache_len": 99}
    assert ordinary == {"decoding": None, "top_k": 5, **static}
    assert ours == {**WINDOW.to_knobs(), "top_k": 5, "compile_config": config, "return_dict_in_generate": True}
    assert assisted == {"decoding": None, "top_k": 5, "assistant_model": draft}  # transformers does not compile it


def test_assisted_decoding_is_warmed_up_and_its_time_is_a_median(monkeypatch):
    model = FakeModel()
    watch = Stopwatch(model, {}, assistant_model=object())
    watch.warm_up(BATCH)
    assert [call for call in model.calls if "assistant_model" in call]
    seconds = iter([9.0, 1.0, 2.0])
    generate = watch._generate
    monkeypatch.setattr(watch, "_generate", lambda *args: (generate(*args)[0], next(seconds)))
    assert watch.measure(ASSISTED, BATCH) == Run({}, 2.0, 2, 0)


def test_all_calls_draw_the_same_and_the_callers_generator_stands_still():
    model = FakeModel()
    draws = []
    generate = model.generate
    model.generate = lambda **arguments: draws.append(torch.rand(1).item()) or generate(**arguments)
    before = torch.get_rng_state()
    for strategy in (None, WINDOW, WINDOW):
        Stopwatch(model, {}).measure(strategy, BATCH)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(draws)) == 1


@pytest.mark.parametrize("extra", [{}, {"return_dict_in_generate": True}])
@pytest.mark.parametrize("rows", [1, 2])
def test_ordinary_decoding_is_timed_by_steps(extra, rows):
    run = Stopwatch(FakeModel(), extra).measure(None, {"input_ids": torch.ones(rows, 3, dtype=torch.long)})
    assert (run.tokens, run.forwards, {width: len(times) for width, times in run.seconds_by_width.items()}) == (
        2 * rows,
        2 * rows,
        {1: 1},
    )
    assert run.fixed > 0


def test_names():
    both = replace(CONSTANT, jacobi_block_size=8, jacobi_lookup_tokens=4)
    topk = replace(both, jacobi_topk_branches=5)
    assert (describe(topk), plain(topk)) == (
        "n=8 K=2, lookup 4, pool 2x8, topk 5",
        ("window", "lookup", "pool", "topk"),
    )
    assert describe(both) == "n=8 K=2, lookup 4, pool 2x8"
    assert describe(replace(both, jacobi_schedule="adaptive")) == "adaptive: n=8 K=2, lookup 4, pool 2x8"
    assert describe(both, drafted=True) == "n=8 K=2, drafter, lookup 4, pool 2x8"
    assert describe(replace(WINDOW, jacobi_verify_width=3), drafted=True) == "n=4 K=1, drafter verifying 3"
    assert describe(Grid().apart()[0], drafted=True) == "lookup 8"
    assert (describe(None), describe(ASSISTED)) == ("ordinary decoding", "assisted decoding")
    assert plain(both) == ("window", "lookup", "pool")
    assert plain(Grid().apart()[0]) == ("lookup",)
    assert plain(None) == plain(ASSISTED) == ()
    model = fresh_model("qwen3")
    with drafting(model, random_drafter(model, scale=0.3)):
        assert sources_of(both, model) == ("drafter", "lookup", "pool")
        assert sources_of(Grid().apart()[0], model) == ("lookup",)
