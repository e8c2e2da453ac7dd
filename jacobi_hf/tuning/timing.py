"""Time strategies and compare them.

The cost of a step depends on its slots and on the device, not on the text. The number of tokens that a step yields
depends on the text, not on the device. So the seconds of a step are pooled by width over all strategies, as medians. A
strategy's time is its own count of steps of each width at those prices. The noise of single runs cancels out, and a
handful of prompts separates strategies that differ by a few percent.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import BaseStreamer

from jacobi_hf.config import CONSTANT, JacobiConfig
from jacobi_hf.tuning.strategies import ASSISTED, Strategy, knobs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import CompileConfig, PreTrainedModel

    from jacobi_hf.output import JacobiStats

# Quantile of 95 % of Student's distribution for 1, 2, .. prompts; the last one stands for more.
_STUDENT = (math.inf, 6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81, 1.80)
Prices = dict[tuple[str, ...], dict[int, float]]


@dataclass(frozen=True)
class Timing:
    """Figures of one strategy on the prompts that it was compared on.

    Attributes:
        strategy: a config for Jacobi decoding, `ASSISTED`, or None for ordinary decoding.
        prompts: number of batches of prompts.
        tokens_per_forward: new tokens divided by forwards, prefill included; nan for assisted decoding.
        mean_slots: positions per decoding forward; nan for assisted decoding.
        seconds: time for these prompts.
        speedup: seconds of ordinary decoding for these prompts, divided by `seconds`.
        low, high: 90 % interval of `speedup`, from its spread over the prompts.
    """

    strategy: Strategy
    prompts: int
    tokens_per_forward: float
    mean_slots: float
    seconds: float
    speedup: float
    low: float = 0.0
    high: float = math.inf


@dataclass(frozen=True)
class Run:
    """Measurements of one batch, decoded once with one strategy.

    Attributes:
        seconds_by_width: seconds of every step, by the number of its slots; empty for assisted decoding.
        fixed: seconds of the call that are not part of a step.
        tokens: new tokens of all rows.
        forwards: forwards of all rows; 0 for assisted decoding.
        compiled: whether the call compiled a step or recorded a CUDA graph, which later calls need not do again.
    """

    seconds_by_width: dict[int, list[float]]
    fixed: float
    tokens: int
    forwards: int
    compiled: bool = False

    @property
    def seconds(self) -> float:
        """Seconds of the whole call."""
        return self.fixed + sum(map(sum, self.seconds_by_width.values()))


class _Ticks(BaseStreamer):
    """Streamer that records when ordinary decoding returned each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Record the time; called with the prompt first, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing at the end of the text."""


class Stopwatch:
    """Times calls of `generate` with one model.

    Args:
        model: model to decode with.
        arguments: arguments of `generate` other than the prompts and the knobs.
        assistant_model: draft model for `ASSISTED`.
        compile_config: how to compile all other strategies; None runs them eagerly.
        room: columns of a static cache that holds any of the prompts with its new tokens.
    """

    # One call may compile, the next record a CUDA graph, the next compile again for sizes that turned out to change.
    MOST_CALLS = 4
    ASSISTED_CALLS = 3

    def __init__(
        self,
        model: Any,
        arguments: dict[str, Any],
        assistant_model: PreTrainedModel | None = None,
        compile_config: CompileConfig | None = None,
        room: int | None = None,
    ) -> None:
        self._model = model
        self._arguments = arguments
        self._room = room
        self._assistant_model = assistant_model
        self._compile_config = compile_config

    def warm_up(self, batch: dict[str, torch.Tensor]) -> None:
        """Decode a few tokens with each method, so that no timing includes what is slow only once in a process.

        Compiling is left out: `measure` repeats a call that compiled.

        Raises:
            ValueError: Jacobi decoding does not support calls with these arguments.
        """
        brief = {"max_new_tokens": 4, "disable_compile": True}
        self._generate(None, batch, **brief)
        self._generate_with_stats(JacobiConfig(jacobi_schedule=CONSTANT), batch, **brief)
        if self._assistant_model is not None:
            self._generate(ASSISTED, batch, **brief)

    def measure(self, strategy: Strategy, batch: dict[str, torch.Tensor]) -> Run:
        """Return the measurements of one call; a call that compiled something is repeated."""
        for _ in range(self.MOST_CALLS):
            graphs = _graphs_compiled()
            run = self._once(strategy, batch)
            if not run.compiled and _graphs_compiled() == graphs:
                break
        return run

    def _once(self, strategy: Strategy, batch: dict[str, torch.Tensor]) -> Run:
        if strategy is None:
            return self._ordinary(strategy, batch)
        return self._jacobi(strategy, batch) if isinstance(strategy, JacobiConfig) else self._assisted(strategy, batch)

    def _jacobi(self, strategy: Strategy, batch: dict[str, torch.Tensor]) -> Run:
        stats, seconds = self._generate_with_stats(strategy, batch)
        compiled = bool(stats.compiled_steps or stats.cuda_graphs)
        fixed = seconds - stats.decode_seconds
        return Run(dict(stats.seconds_by_width), fixed, sum(stats.new_tokens), sum(stats.row_forwards), compiled)

    def _ordinary(self, strategy: Strategy, batch: dict[str, torch.Tensor]) -> Run:
        ticks = _Ticks()
        rows = len(batch["input_ids"])
        # A streamer takes one row. The steps of several rows get equal shares of the call.
        output, seconds = self._generate(strategy, batch, **({"streamer": ticks} if rows == 1 else {}))
        new = _new_columns(output, batch)
        gaps = [later - earlier for earlier, later in pairwise(ticks.times[1:])] or [seconds / new] * (new - 1)
        return Run({1: gaps} if gaps else {}, seconds - sum(gaps), new * rows, new * rows)

    def _assisted(self, strategy: Strategy, batch: dict[str, torch.Tensor]) -> Run:
        """Return the median of a few calls, because the steps of one call cannot be timed separately."""
        calls = [self._generate(strategy, batch) for _ in range(self.ASSISTED_CALLS)]
        return Run({}, statistics.median(seconds for _, seconds in calls), _new_columns(calls[0][0], batch), 0)

    def _generate_with_stats(
        self, strategy: Strategy, batch: dict[str, torch.Tensor], **more: Any
    ) -> tuple[JacobiStats, float]:
        output, seconds = self._generate(strategy, batch, return_dict_in_generate=True, **more)
        stats = getattr(output, "jacobi_stats", None)
        if stats is None:
            raise ValueError(
                "Jacobi decoding does not support this call, so nothing can be tuned; see the warning for the reason."
            )
        return stats, seconds

    def _generate(self, strategy: Strategy, batch: dict[str, torch.Tensor], **more: Any) -> tuple[Any, float]:
        arguments = {**self._arguments, **knobs_of(strategy, self._assistant_model, self._compile_config), **more}
        if strategy is None and self._compile_config is not None:
            arguments.setdefault("max_cache_len", self._room)  # one shape for all prompts
        device = self._model.device
        # Every call starts from the same state of the generator, and the caller's state does not change.
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            started = time.perf_counter()
            output = self._model.generate(**batch, **arguments)
            return output, time.perf_counter() - started


def _new_columns(output: Any, batch: dict[str, torch.Tensor]) -> int:
    sequences: torch.Tensor = getattr(output, "sequences", output)
    return sequences.shape[1] - batch["input_ids"].shape[1]


def _graphs_compiled() -> int:
    """Return how many graphs this process has compiled so far, because ordinary decoding does not report it."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


class Comparison:
    """Runs of several strategies on the same batches, and what they cost.

    Args:
        measure: times a strategy on a batch.
        batches: batches of prompts to decode.
        is_over: returns whether the time is up; called before each measurement.
        sources: returns the names of the draft sources of a strategy. Strategies with the same sources share prices.
        drafted: whether the model has a drafter in use.
        left: returns the seconds until the time is up.

    Attributes:
        runs: the runs of each strategy, on the first batches in order.
    """

    def __init__(
        self,
        measure: Callable[[Strategy, Any], Run],
        batches: list[Any],
        is_over: Callable[[], bool],
        sources: Callable[[Strategy], tuple[str, ...]],
        *,
        drafted: bool = False,
        left: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self._measure = measure
        self.left = left
        self.batches = list(batches)
        self.is_over = is_over
        self.sources = sources
        self.drafted = drafted
        self._times: defaultdict[tuple[str, ...], defaultdict[int, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.runs: defaultdict[Strategy, list[Run]] = defaultdict(list)

    def open(self) -> None:
        """Time ordinary decoding of the first batch, even if the time is up.

        Batches that end at their first new token are dropped, because they say nothing about a step.

        Raises:
            ValueError: every batch ends at its first new token.
        """
        while self.batches:
            run = self._measure(None, self.batches[0])
            if run.seconds_by_width:
                self._add(None, run)
                return
            del self.batches[0]
        raise ValueError(
            "every prompt ends at its first new token, so there is nothing to tune; give prompts with longer answers."
        )

    def run(self, strategies: Iterable[Strategy], batches: int) -> None:
        """Time strategies on the first `batches` batches, one batch after another, until the time is up.

        Runs that exist already are not repeated.
        """
        strategies = list(dict.fromkeys(strategies))
        for number in range(batches):
            for strategy in strategies:
                if len(self.runs[strategy]) > number:
                    continue
                if self.is_over():
                    return
                self._add(strategy, self._measure(strategy, self.batches[number]))

    def _add(self, strategy: Strategy, run: Run) -> None:
        self.runs[strategy].append(run)
        for width, seconds in run.seconds_by_width.items():
            self._times[self.sources(strategy)][width] += seconds

    def prices(self) -> Prices:
        """Return the median milliseconds of a step, by draft sources and number of slots."""
        return {
            sources: {width: statistics.median(times) * 1e3 for width, times in sorted(by_width.items())}
            for sources, by_width in self._times.items()
        }

    def timings(self, strategies: Iterable[Strategy]) -> list[Timing]:
        """Return the timings of strategies on the batches that all of them have run on, the fastest first.

        Strategies that were never run are left out.
        """
        tried = [strategy for strategy in dict.fromkeys(strategies) if self.runs[strategy]]
        shared = min((len(self.runs[strategy]) for strategy in tried), default=0)
        prices = self.prices()
        return sorted((self._timing(strategy, shared, prices) for strategy in tried), key=lambda one: one.seconds)

    def ranked(self, strategies: Iterable[Strategy]) -> list[Strategy]:
        """Return the strategies that were run, the fastest first."""
        return [timing.strategy for timing in self.timings(strategies)]

    def _timing(self, strategy: Strategy, count: int, prices: Prices) -> Timing:
        runs = self.runs[strategy][:count]
        steps = Counter[int]()
        for run in runs:
            steps.update({width: len(seconds) for width, seconds in run.seconds_by_width.items()})
        forwards = sum(run.forwards for run in runs)
        tokens_per_forward = sum(run.tokens for run in runs) / forwards if forwards else math.nan
        slots = sum(width * number for width, number in steps.items())
        mean_slots = slots / max(1, steps.total()) if forwards else math.nan
        seconds = sum(self._seconds(strategy, count, prices))
        speedup = sum(self._seconds(None, count, prices)) / seconds
        interval = (1.0, 1.0) if strategy is None else self.interval(strategy, None, count)
        return Timing(strategy, count, tokens_per_forward, mean_slots, seconds, speedup, *interval)

    def _seconds(self, strategy: Strategy, count: int, prices: Prices) -> list[float]:
        """Return the times of a strategy for the first `count` batches, each step at the pooled price of its width."""
        price = prices.get(self.sources(strategy), {})
        return [
            run.fixed + sum(len(seconds) * price[width] / 1e3 for width, seconds in run.seconds_by_width.items())
            for run in self.runs[strategy][:count]
        ]

    def interval(self, strategy: Strategy, baseline: Strategy, count: int) -> tuple[float, float]:
        """Return the 90 % interval of how many times as fast a strategy is as a baseline on prompts like these.

        The two are compared prompt by prompt. The interval is Student's, of the logarithms. With one prompt nothing is
        known: the interval is `(0, inf)`.

        Args:
            strategy: it has run on `count` batches.
            baseline: it too.
            count: batches that count.
        """
        if count < 2:
            return 0.0, math.inf
        prices = self.prices()
        times = zip(self._seconds(baseline, count, prices), self._seconds(strategy, count, prices), strict=True)
        logs = [math.log(theirs / ours) for theirs, ours in times]
        half = _STUDENT[min(count, len(_STUDENT)) - 1] * statistics.stdev(logs) / math.sqrt(count)
        return math.exp(statistics.mean(logs) - half), math.exp(statistics.mean(logs) + half)
