"""Ways to decode, timed: what one call came to, and what all calls together say about a way.

What a step costs depends on its slots and on the device, not on the text; how many tokens it yields depends on the text, not on the
device. So times are pooled over all settings by width, as medians, and a setting's time is its own count of steps of each width at those
prices: the noise of single runs cancels out, and a handful of prompts tells settings apart that differ by a few percent.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from transformers.generation import BaseStreamer

from jacobi_hf.config import JacobiConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import CompileConfig, PreTrainedModel

    from jacobi_hf.output import JacobiStats

ASSISTED: Final = "assisted decoding"
# Ours, transformers' with the caller's draft model, or ordinary decoding.
Way = JacobiConfig | Literal["assisted decoding"] | None


@dataclass(frozen=True)
class Setting:
    """A way to decode and what it came to, on the prompts that it was compared on.

    Attributes:
        way: a config, `ASSISTED`, or None for ordinary decoding.
        prompts: how many those are, in batches.
        tokens_per_forward: new tokens over forwards, prefill counted; nan for assisted decoding.
        mean_slots: positions per decoding forward; nan for assisted decoding.
        seconds: for these prompts.
        speedup: over ordinary decoding of the same prompts.
    """

    way: Way
    prompts: int
    tokens_per_forward: float
    mean_slots: float
    seconds: float
    speedup: float


def describe(way: Way, *, drafted: bool = False) -> str:
    """A way to decode in a few words; `drafted` where the model has a drafter in use."""
    if not isinstance(way, JacobiConfig):
        return way or "ordinary decoding"
    parts = [f"n={way.jacobi_block_size} K={way.jacobi_max_blocks}"] if way.jacobi_max_blocks else []
    if way.jacobi_verify_width:
        parts.append(f"drafter verifying {way.jacobi_verify_width}")
    elif drafted and way.jacobi_max_blocks:
        parts.append("drafter")
    parts += [f"lookup {way.jacobi_lookup_tokens}"] if way.jacobi_lookup_tokens else []
    parts += [f"pool {way.jacobi_pool_size}x{way.jacobi_branch_length}"] if way.jacobi_pool_size else []
    parts += [f"topk {way.jacobi_topk_branches}"] if way.jacobi_topk_branches else []
    return ", ".join(parts)


def sources_of(way: Way, *, drafted: bool = False) -> tuple[str, ...]:
    """What a way of ours drafts from; windows are `drafted` where the model has a drafter in use, whose steps have other prices."""
    if not isinstance(way, JacobiConfig):
        return ()
    window = "drafted window" if drafted else "window"
    used = {
        window: way.jacobi_max_blocks,
        "lookup": way.jacobi_lookup_tokens,
        "pool": way.jacobi_pool_size,
        "topk": way.jacobi_topk_branches,
    }
    return tuple(name for name, size in used.items() if size)


def knobs_of(
    way: Way, assistant_model: PreTrainedModel | None = None, compile_config: CompileConfig | None = None
) -> dict[str, Any]:
    """What `generate` is given to decode that way; compiled ordinary decoding is transformers' own, over a static cache."""
    if way == ASSISTED:
        return {"decoding": None, "assistant_model": assistant_model}
    if isinstance(way, JacobiConfig):
        return way.to_knobs() | ({} if compile_config is None else {"compile_config": compile_config})
    static = {} if compile_config is None else {"cache_implementation": "static", "compile_config": compile_config}
    return {"decoding": None, **static}


@dataclass(frozen=True)
class Run:
    """One batch, decoded one way.

    Attributes:
        seconds_by_width: of every step, by its slots; none for assisted decoding.
        fixed: seconds beside those of the steps.
        tokens: new ones of all rows.
        forwards: of all rows; 0 for assisted decoding.
        compiled: whether something was compiled or recorded on the way, for all later calls.
    """

    seconds_by_width: dict[int, list[float]]
    fixed: float
    tokens: int
    forwards: int
    compiled: bool = False


class _Ticks(BaseStreamer):
    """When ordinary decoding had each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then a token at a time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to be shown."""


class Stopwatch:
    """Times calls of `generate`.

    Args:
        model, arguments: what is called, and with what beside the prompts and the knobs.
        assistant_model: for `ASSISTED`.
        compile_config: given to all other ways.
        room: columns of a static cache that holds any of the prompts with its new tokens.
    """

    # A call may compile, the next one record what was compiled, the next compile once more for sizes that turned out to change.
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
        self._model, self._arguments, self._room = model, arguments, room
        self._assistant_model, self._compile_config = assistant_model, compile_config

    def warm_up(self, batch: dict[str, torch.Tensor]) -> None:
        """What is slow only once, but for compiling: a call that does is made again when it comes.

        Raises:
            ValueError: Jacobi decoding does not serve such calls.
        """
        brief = {"max_new_tokens": 4, "disable_compile": True}
        self._generate(None, batch, **brief)
        self._generate_with_stats(JacobiConfig(), batch, **brief)
        if self._assistant_model is not None:
            self._generate(ASSISTED, batch, **brief)

    def measure(self, way: Way, batch: dict[str, torch.Tensor]) -> Run:
        """One call's times; one that compiled something does not count and is made again."""
        timed = self._ours if isinstance(way, JacobiConfig) else self._ordinary if way is None else self._assisted
        for _ in range(self.MOST_CALLS):
            graphs = _graphs_compiled()
            run = timed(way, batch)
            if not run.compiled and _graphs_compiled() == graphs:
                break
        return run

    def _ours(self, way: Way, batch: dict[str, torch.Tensor]) -> Run:
        stats, seconds = self._generate_with_stats(way, batch)
        compiled = bool(stats.compiled_steps or stats.cuda_graphs)
        fixed = seconds - stats.decode_seconds
        return Run(dict(stats.seconds_by_width), fixed, sum(stats.new_tokens), sum(stats.row_forwards), compiled)

    def _ordinary(self, way: Way, batch: dict[str, torch.Tensor]) -> Run:
        ticks, rows = _Ticks(), len(batch["input_ids"])
        # A streamer takes one row; more are timed as a whole.
        output, seconds = self._generate(way, batch, **({"streamer": ticks} if rows == 1 else {}))
        new = _new_columns(output, batch)
        gaps = [later - earlier for earlier, later in pairwise(ticks.times[1:])] or [seconds / new] * (new - 1)
        return Run({1: gaps} if gaps else {}, seconds - sum(gaps), new * rows, new * rows)

    def _assisted(self, way: Way, batch: dict[str, torch.Tensor]) -> Run:
        """Its steps cannot be told apart, so that a median of whole calls keeps the noise down."""
        calls = [self._generate(way, batch) for _ in range(self.ASSISTED_CALLS)]
        return Run({}, statistics.median(seconds for _, seconds in calls), _new_columns(calls[0][0], batch), 0)

    def _generate_with_stats(self, way: Way, batch: dict[str, torch.Tensor], **more: Any) -> tuple[JacobiStats, float]:
        output, seconds = self._generate(way, batch, return_dict_in_generate=True, **more)
        stats = getattr(output, "jacobi_stats", None)
        if stats is None:
            raise ValueError(
                "Jacobi decoding does not serve this call, so there is nothing to tune; see the warning for the reason."
            )
        return stats, seconds

    def _generate(self, way: Way, batch: dict[str, torch.Tensor], **more: Any) -> tuple[Any, float]:
        arguments = {**self._arguments, **knobs_of(way, self._assistant_model, self._compile_config), **more}
        if way is None and self._compile_config is not None:
            arguments.setdefault("max_cache_len", self._room)  # one shape for all prompts
        device = self._model.device
        # All calls draw the same, and the caller's next one what it would have drawn.
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            started = time.perf_counter()
            output = self._model.generate(**batch, **arguments)
            return output, time.perf_counter() - started


def _new_columns(output: Any, batch: dict[str, torch.Tensor]) -> int:
    sequences: torch.Tensor = getattr(output, "sequences", output)
    return sequences.shape[1] - batch["input_ids"].shape[1]


def _graphs_compiled() -> int:
    """In this process so far; ordinary decoding tells of none."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


class Trial:
    """Ways to decode on batches while there is time, and what they cost.

    Args:
        measure: times a way on a batch.
        batches: what is decoded.
        is_over: whether the time is up; asked before each measurement.
        drafted: whether windows draft with a drafter.

    Attributes:
        runs: of each way, on the first batches.
    """

    def __init__(
        self,
        measure: Callable[[Way, Any], Run],
        batches: list[Any],
        is_over: Callable[[], bool],
        *,
        drafted: bool = False,
    ) -> None:
        self._measure, self.batches, self.is_over, self.drafted = measure, list(batches), is_over, drafted
        self._times: defaultdict[tuple[str, ...], defaultdict[int, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.runs: defaultdict[Way, list[Run]] = defaultdict(list)

    def open(self) -> None:
        """Ordinary decoding of the first batch, whatever the time; batches before it that end at once have nothing to tell.

        Raises:
            ValueError: all of them do.
        """
        while self.batches:
            run = self._measure(None, self.batches[0])
            if run.seconds_by_width:
                self._note(None, run)
                return
            del self.batches[0]
        raise ValueError(
            "every prompt ends at its first new token, so there is nothing to tune; give prompts that are continued."
        )

    def run(self, ways: Iterable[Way], batches: int) -> None:
        """Try ways on the first `batches` batches, a batch at a time, where they have not been; until the time is up."""
        ways = list(dict.fromkeys(ways))
        for number in range(batches):
            for way in ways:
                if len(self.runs[way]) > number:
                    continue
                if self.is_over():
                    return
                self._note(way, self._measure(way, self.batches[number]))

    def _note(self, way: Way, run: Run) -> None:
        self.runs[way].append(run)
        for width, seconds in run.seconds_by_width.items():
            self._times[self.sources(way)][width] += seconds

    def sources(self, way: Way) -> tuple[str, ...]:
        """What a way drafts from here."""
        return sources_of(way, drafted=self.drafted)

    def prices(self) -> dict[tuple[str, ...], dict[int, float]]:
        """Median milliseconds of a step by sources and width."""
        return {
            sources: {width: statistics.median(times) * 1e3 for width, times in sorted(by_width.items())}
            for sources, by_width in self._times.items()
        }

    def compared(self, ways: Iterable[Way]) -> list[Setting]:
        """Ways, the fastest first, on the prompts that all of them have been tried on; without those that were never tried."""
        tried = [way for way in dict.fromkeys(ways) if self.runs[way]]
        shared = min((len(self.runs[way]) for way in tried), default=0)
        prices = self.prices()
        return sorted((self._setting(way, shared, prices) for way in tried), key=lambda setting: setting.seconds)

    def ranked(self, ways: Iterable[Way]) -> list[Way]:
        """As `compared`, the ways alone."""
        return [setting.way for setting in self.compared(ways)]

    def _setting(self, way: Way, count: int, prices: dict[tuple[str, ...], dict[int, float]]) -> Setting:
        runs = self.runs[way][:count]
        steps = Counter[int]()
        for run in runs:
            steps.update({width: len(seconds) for width, seconds in run.seconds_by_width.items()})
        tokens, forwards = sum(run.tokens for run in runs), sum(run.forwards for run in runs)
        slots = sum(width * number for width, number in steps.items()) / max(1, steps.total())
        seconds = self._seconds(way, count, prices)
        per_forward, mean_slots = (tokens / forwards, slots) if forwards else (math.nan, math.nan)
        return Setting(way, count, per_forward, mean_slots, seconds, self._seconds(None, count, prices) / seconds)

    def _seconds(self, way: Way, count: int, prices: dict[tuple[str, ...], dict[int, float]]) -> float:
        """A way's time for its first `count` batches at everybody's prices."""
        price, runs = prices.get(self.sources(way), {}), self.runs[way][:count]
        return sum(
            run.fixed + sum(len(seconds) * price[width] / 1e3 for width, seconds in run.seconds_by_width.items())
            for run in runs
        )
