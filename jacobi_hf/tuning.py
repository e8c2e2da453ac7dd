"""Which setting is fastest for a model, a device and somebody's prompts.

What a step costs depends on its slots and on the device, not on the text; how many tokens it yields depends on the text, not on the
device. So times are pooled over all settings by width, as medians, and a setting's time is its own count of steps of each width at those
prices: the noise of single runs cancels out, and a handful of prompts tells settings apart that differ by a few percent.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from tqdm.auto import tqdm
from transformers.generation import BaseStreamer

from jacobi_hf.config import KNOBS, MULTIBLOCK, JacobiConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOWS = ((4, 1), (8, 1), (16, 1), (32, 1), (8, 2), (16, 2), (32, 2))  # n, K
LOOKUPS = (4, 8, 12, 16, 24)
POOLS = (0, 2)
ASSISTED: Final = "assisted decoding"
# Ours, transformers' with the caller's draft model, or ordinary decoding.
Way = JacobiConfig | Literal["assisted decoding"] | None


@dataclass(frozen=True)
class Setting:
    """A way to decode and what it came to, on the prompts that it was tried on.

    Attributes:
        way: a config, `ASSISTED`, or None for ordinary decoding.
        prompts: how many were tried, in batches.
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


@dataclass(frozen=True)
class Tuning:
    """What `autotune` found.

    Attributes:
        way: the fastest: a config, `ASSISTED` with the draft model that was given, or None for ordinary decoding.
        table: all settings that were tried, the fastest first.
        milliseconds: median time of a step by its slots, for each set of sources that drafts ("window", "lookup", "pool").
    """

    way: Way
    table: list[Setting]
    milliseconds: dict[tuple[str, ...], dict[int, float]]
    assistant_model: PreTrainedModel | None = None

    @property
    def config(self) -> JacobiConfig | None:
        """The fastest setting of Jacobi decoding; None where another way is faster."""
        return self.way if isinstance(self.way, JacobiConfig) else None

    @property
    def knobs(self) -> dict[str, Any]:
        """For `generate(**inputs, **knobs)`; what is saved with the model is overridden, for ordinary decoding too."""
        if self.config is not None:
            return self.config.to_knobs()
        return {"decoding": None} | ({"assistant_model": self.assistant_model} if self.way == ASSISTED else {})

    def __str__(self) -> str:
        lines = [f"{'setting':34s} {'prompts':>7s} {'TPF':>6s} {'slots':>6s} {'speed-up':>8s}"]
        lines += [
            f"{describe(s.way):34s} {s.prompts:7d} {s.tokens_per_forward:6.2f} {s.mean_slots:6.1f} {s.speedup:8.2f}" for s in self.table
        ]
        return "\n".join(lines)


def describe(way: Way) -> str:
    """A way to decode in a few words."""
    if not isinstance(way, JacobiConfig):
        return way or "ordinary decoding"
    config = way
    parts = [f"n={config.jacobi_block_size} K={config.jacobi_max_blocks}"] if config.jacobi_max_blocks else []
    parts += [f"lookup {config.jacobi_lookup_tokens}"] if config.jacobi_lookup_tokens else []
    parts += [f"pool {config.jacobi_pool_size}x{config.jacobi_branch_length}"] if config.jacobi_pool_size else []
    return ", ".join(parts)


def sources_of(way: Way) -> tuple[str, ...]:
    """What a way of ours drafts from."""
    if not isinstance(way, JacobiConfig):
        return ()
    used = {"window": way.jacobi_max_blocks, "lookup": way.jacobi_lookup_tokens, "pool": way.jacobi_pool_size}
    return tuple(name for name, size in used.items() if size)


def autotune(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    seconds: float = 60.0,
    progress: bool = True,
    assistant_model: PreTrainedModel | None = None,
    **generate_kwargs: Any,
) -> Tuning:
    """The fastest way for `model` to continue prompts like these, here: a setting of Jacobi decoding, or ordinary decoding.

    Windows, lookups of several lengths, ordinary decoding and the setting saved with the model are tried on a few prompts, then what
    combines the best of them; the better half goes on to twice the prompts, until one is left, the prompts are used up, or the time is.
    Whatever is chosen, the text is the same.

    Args:
        prompts: strings, or lists of ids; a dozen of the kind that will be decoded.
        tokenizer: for strings.
        max_new_tokens: as will be asked for.
        batch_size: prompts that will be decoded together.
        seconds: about how long to try; each setting is tried once in any case.
        progress: whether to show a bar.
        assistant_model: a draft model, if there is one, so that transformers' assisted decoding is tried too (one row a batch).
        generate_kwargs: what else `generate` will be given (sampling, processors, `compile_config`).

    Raises:
        ValueError: no prompts, strings without a tokenizer, knobs among `generate_kwargs`, a draft model with batches, or a call that
            Jacobi decoding does not serve.
    """
    batches = _batches(model, prompts, tokenizer, batch_size)
    if given := sorted(set(KNOBS) & set(generate_kwargs)):
        raise ValueError(f"{', '.join(given)} given to autotune, which is to find the knobs out; drop them.")
    if seconds <= 0 or max_new_tokens < 2:
        raise ValueError(f"seconds={seconds} and max_new_tokens={max_new_tokens} leave nothing to measure.")
    if assistant_model is not None and batch_size > 1:
        raise ValueError("assisted decoding takes one row at a time: batch_size=1, or no assistant_model.")
    with tqdm(total=round(seconds), unit="s", desc="autotune", disable=not progress) as bar:
        trial = _Trial(model, batches, {**generate_kwargs, "max_new_tokens": max_new_tokens}, time.perf_counter() + seconds, bar)
        trial.assistant_model = assistant_model
        trial.warm_up()
        first = min(2, len(batches))
        windows = [JacobiConfig(jacobi_block_size=n, jacobi_max_blocks=k, jacobi_pool_size=0, jacobi_lookup_tokens=0) for n, k in WINDOWS]
        lookups = [JacobiConfig(jacobi_max_blocks=0, jacobi_pool_size=0, jacobi_lookup_tokens=length) for length in LOOKUPS]
        saved = JacobiConfig.from_generation_config(model.generation_config)
        own: list[Way] = [saved] if saved is not None and saved.decoding == MULTIBLOCK else []
        own += [] if assistant_model is None else [ASSISTED]
        trial.run([None, *own, *windows, *lookups], first)
        longest = trial.ranked(lookups)[0].jacobi_lookup_tokens
        both = [
            replace(window, jacobi_lookup_tokens=length, jacobi_pool_size=pool)
            for window in trial.ranked(windows)[:2]
            for length in (0, longest)
            for pool in POOLS
            if length or pool
        ]
        trial.run(both, first)
        left, tried = trial.ranked([None, *own, *windows, *lookups, *both]), first
        while len(left) > 1 and tried < len(batches) and not trial.is_over:
            left, tried = left[: -(-len(left) // 2)], min(2 * tried, len(batches))
            trial.run([None, *left], tried)
            left = trial.ranked(left)
        table = [trial.setting(config) for config in trial.ranked(list(trial.runs))]
    # Of those that were tried on most prompts, the fastest; ordinary decoding has been tried on all of them.
    most = max(setting.prompts for setting in table if setting.way is not None)
    best = next(setting for setting in table if setting.prompts >= most)
    return Tuning(best.way, table, trial.prices(), assistant_model)


def _batches(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    batch_size: int,
) -> list[dict[str, torch.Tensor]]:
    if isinstance(prompts, str) or not len(prompts):
        given = "a string" if isinstance(prompts, str) else "none"
        raise ValueError(f"autotune needs a list of prompts, a dozen of the kind that will be decoded; got {given}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} cannot be used; it must be at least 1.")
    rows: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str) and tokenizer is None:
            raise ValueError("the prompts are strings: give their tokenizer, autotune(model, prompts, tokenizer=tokenizer).")
        ids: Any = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) and tokenizer is not None else prompt
        if not ids:
            raise ValueError(f"prompt {number} is empty.")
        rows.append([int(i) for i in ids])
    batch_size = min(batch_size, len(rows))
    batches = []
    for first in range(0, len(rows) - batch_size + 1, batch_size):  # a smaller last batch would have other prices
        part = rows[first : first + batch_size]
        columns = max(map(len, part))
        ids = torch.tensor([[0] * (columns - len(row)) + row for row in part], device=model.device)
        mask = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in part], device=model.device)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


class _Ticks(BaseStreamer):
    """When ordinary decoding had each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then a token at a time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to be shown."""


@dataclass
class _Run:
    """One batch under one setting: steps by width, what the call took beside them, tokens and forwards of all rows."""

    steps: Counter[int] = field(default_factory=Counter)
    fixed: float = 0.0
    tokens: int = 0
    forwards: int = 0


class _Trial:
    """Runs of settings on batches, and what they cost."""

    def __init__(self, model: Any, batches: list[dict[str, torch.Tensor]], arguments: dict[str, Any], deadline: float, bar: Any) -> None:
        self._model, self._batches, self._arguments, self._deadline, self._bar = model, batches, arguments, deadline, bar
        self._begun = time.perf_counter()
        self._times: defaultdict[tuple[str, ...], defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.assistant_model: Any = None
        self.runs: dict[Way, list[_Run]] = {}

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() > self._deadline

    def warm_up(self) -> None:
        """What is slow only once."""
        arguments = {**self._arguments, "max_new_tokens": 4}
        for knobs in ({"decoding": None}, {"decoding": "jacobi_multiblock"}):
            self._model.generate(**self._batches[0], **arguments, **knobs)

    def run(self, configs: Sequence[Way], batches: int) -> None:
        """Try settings on the first `batches` batches, a batch at a time, where they have not been; while there is time."""
        for config in configs:
            self.runs.setdefault(config, [])
        for number in range(batches):
            for config in dict.fromkeys(configs):
                if len(self.runs[config]) == number and not (number and self.is_over):
                    self.runs[config].append(self._run(config, self._batches[number]))
                    self._bar.n = min(self._bar.total, round(time.perf_counter() - self._begun))
                    self._bar.refresh()

    def _run(self, config: Way, batch: dict[str, torch.Tensor]) -> _Run:
        times, started = self._times[sources_of(config)], time.perf_counter()
        rows, columns = batch["input_ids"].shape
        if isinstance(config, str):  # ASSISTED
            output = self._model.generate(**batch, **self._arguments, assistant_model=self.assistant_model, decoding=None)
            return _Run(Counter(), time.perf_counter() - started, output.shape[1] - columns)
        if config is None:
            ticks = _Ticks()
            # A streamer takes one row; more are timed as a whole.
            streamer = {"streamer": ticks} if rows == 1 else {}
            output = self._model.generate(**batch, **self._arguments, **streamer, decoding=None)
            new, ended = output.shape[1] - columns, time.perf_counter()
            if rows > 1 or len(ticks.times) < 3:
                ticks.times = [started, *(started + (ended - started) * (i + 1) / new for i in range(new))]
            gaps = [later - earlier for earlier, later in zip(ticks.times[1:], ticks.times[2:], strict=False)]
            times[1] += gaps
            return _Run(Counter({1: len(gaps)}), ticks.times[1] - started, new * rows, new * rows)
        output = self._model.generate(**batch, **self._arguments, **config.to_knobs(), return_dict_in_generate=True)
        elapsed, stats = time.perf_counter() - started, getattr(output, "jacobi_stats", None)
        if stats is None:
            raise ValueError("Jacobi decoding does not serve this call, so there is nothing to tune; see the warning for the reason.")
        for width, values in stats.seconds_by_width.items():
            times[width] += values
        return _Run(stats.slots_by_width, elapsed - stats.decode_seconds, sum(stats.new_tokens), sum(stats.row_forwards))

    def prices(self) -> dict[tuple[str, ...], dict[int, float]]:
        """Median milliseconds of a step by sources and width."""
        return {
            sources: {width: statistics.median(times) * 1e3 for width, times in sorted(by_width.items())}
            for sources, by_width in self._times.items()
        }

    def seconds(self, config: Way, runs: int | None = None) -> float:
        """A setting's time for its first `runs` batches (all it was tried on) at everybody's prices."""
        price = {width: statistics.median(times) for width, times in self._times[sources_of(config)].items()}
        mine = self.runs[config][:runs]
        return sum(sum(count * price[width] for width, count in run.steps.items()) + run.fixed for run in mine)

    def setting(self, config: Way) -> Setting:
        """What a setting came to."""
        runs = self.runs[config]
        slots, steps = sum(w * c for run in runs for w, c in run.steps.items()), sum(run.steps.total() for run in runs)
        tokens, forwards, seconds = sum(run.tokens for run in runs), sum(run.forwards for run in runs), self.seconds(config)
        per_forward, mean_slots = (tokens / forwards, slots / max(1, steps)) if forwards else (math.nan, math.nan)
        return Setting(config, len(runs), per_forward, mean_slots, seconds, self.seconds(None, len(runs)) / seconds)

    def ranked(self, configs: list[Any]) -> list[Any]:
        """Settings, the fastest first."""
        return sorted(dict.fromkeys(configs), key=lambda config: -self.setting(config).speedup)
