"""Which setting is fastest for a model, a device and somebody's prompts; how that is timed is in `trial.py`."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from jacobi_hf.config import KNOBS, MULTIBLOCK, JacobiConfig
from jacobi_hf.drafts.loading import drafter_of
from jacobi_hf.execution.base import cannot_compile
from jacobi_hf.integration.compat import CACHE_NAMES
from jacobi_hf.tuning.timing import ASSISTED, Setting, Stopwatch, Trial, Way, describe, knobs_of, sources_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import CompileConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ASSISTED", "Setting", "Tuning", "Way", "autotune", "describe", "sources_of"]

_OURS_TO_GIVE = ("attention_mask", "input_ids", "inputs", "inputs_embeds", *CACHE_NAMES, "position_ids", "streamer")


@dataclass(frozen=True)
class Grid:
    """What is tried, the more promising first.

    Attributes:
        windows: n and K.
        lookups: lengths.
        combined: how many of the best windows are tried with lookup and pool.
        pools: sizes.
    """

    windows: tuple[tuple[int, int], ...] = ((16, 1), (8, 1), (16, 2), (32, 1), (8, 2), (4, 1), (32, 2))
    lookups: tuple[int, ...] = (8, 16, 12, 4, 24)
    combined: int = 2
    pools: tuple[int, ...] = (0, 2)

    def apart(self) -> list[JacobiConfig]:
        """Windows alone and lookups alone, in turn."""
        windows = [
            JacobiConfig(jacobi_block_size=n, jacobi_max_blocks=k, jacobi_pool_size=0, jacobi_lookup_tokens=0)
            for n, k in self.windows
        ]
        lookups = [
            JacobiConfig(jacobi_max_blocks=0, jacobi_pool_size=0, jacobi_lookup_tokens=length)
            for length in self.lookups
        ]
        return [way for pair in zip_longest(lookups, windows) for way in pair if way is not None]


COMPILED = Grid(windows=((16, 1), (8, 1), (32, 1)), lookups=(8, 16), combined=1, pools=(0,))


@dataclass(frozen=True)
class Tuning:
    """What `autotune` found.

    Attributes:
        way: the fastest: a config, `ASSISTED` with the draft model that was given, or None for ordinary decoding.
        table: all settings that were tried. The fastest comes first; those that were tried on fewer prompts come behind those that
            beat them on these.
        milliseconds: median time of a step by its slots, for each set of sources that drafts ("window", "lookup", "pool", and "drafted
            window" where a drafter was in use).
        assistant_model, compile_config: as given; the latter is None where it would be without effect.
        drafted: whether a drafter was in use.
        untried: what there was no time for.
    """

    way: Way
    table: list[Setting]
    milliseconds: dict[tuple[str, ...], dict[int, float]]
    assistant_model: PreTrainedModel | None = None
    compile_config: CompileConfig | None = None
    drafted: bool = False
    untried: tuple[Way, ...] = ()

    @property
    def config(self) -> JacobiConfig | None:
        """The fastest setting of Jacobi decoding; None where another way is faster."""
        return self.way if isinstance(self.way, JacobiConfig) else None

    @property
    def knobs(self) -> dict[str, Any]:
        """For `generate(**inputs, **knobs)`, with the `compile_config` if one was given.

        What is saved with the model is overridden, for ordinary decoding too, which where it compiles has a static cache.
        """
        return knobs_of(self.way, self.assistant_model, self.compile_config)

    def __str__(self) -> str:
        names = [describe(setting.way, drafted=self.drafted) for setting in self.table]
        widest = max(map(len, names), default=0)
        lines = [f"{'setting':{widest}s} {'prompts':>7s} {'TPF':>6s} {'slots':>6s} {'speed-up':>8s}"]
        lines += [
            f"{name:{widest}s} {s.prompts:7d} {s.tokens_per_forward:6.2f} {s.mean_slots:6.1f} {s.speedup:8.2f}"
            for name, s in zip(names, self.table, strict=True)
        ]
        left = "; ".join(describe(way, drafted=self.drafted) for way in self.untried)
        return "\n".join([*lines, *([f"no time for: {left}"] if left else [])])


def autotune(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[torch.Tensor] | torch.Tensor,
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

    Windows, lookups of several lengths, ordinary decoding and the setting saved with the model are tried on two prompts, with what
    combines the best of them (and with a drafter, how much of the best window to verify at a time); the better half goes on to twice
    the prompts, until one is left, the prompts are used up, or the time is. Settings are compared on the prompts that they share.
    Whatever is chosen, the text is the same. Torch's random generator is left as it was.

    With a `compile_config`, ordinary decoding runs compiled too, as transformers does it, and calls that compile something do not count.
    Half a dozen settings are tried then, since each compiles up to four shapes of a step, twice as many with a lookup beside a window:
    seconds apiece for a small model, up to a minute for a large one. That is part of `seconds`; allow for it (ten minutes on a CPU).

    Args:
        prompts: strings, or ids without pads (lists, tensors, or a tensor with a prompt in each row); a dozen of the kind that will
            be decoded.
        tokenizer: for strings.
        max_new_tokens: as will be asked for.
        batch_size: prompts that will be decoded together.
        seconds: when they are over, the setting at hand is finished with its prompt, and no other is begun. Ordinary decoding of one
            prompt is timed in any case; what there was no time for is in `Tuning.untried`.
        progress: whether to show a bar.
        assistant_model: a draft model, if there is one, so that transformers' assisted decoding is tried too (one row a batch).
        generate_kwargs: what else `generate` will be given (sampling, processors, `compile_config`).

    Raises:
        ValueError: no prompts, or such as end at their first new token, strings without a tokenizer, knobs or inputs among
            `generate_kwargs`, a draft model with batches, or a call that Jacobi decoding does not serve.
    """
    _check_arguments(generate_kwargs, seconds, max_new_tokens, batch_size, assistant_model)
    batches = _batches(_rows(prompts, tokenizer), batch_size, model.device)
    compile_config = _effective_compile_config(model, generate_kwargs)
    drafted = drafter_of(model) is not None
    arguments = {**generate_kwargs, "max_new_tokens": max_new_tokens}
    room = max(batch["input_ids"].shape[1] for batch in batches) + max_new_tokens
    stopwatch = Stopwatch(model, arguments, assistant_model, compile_config, room)
    first: list[Way] = [] if assistant_model is None else [ASSISTED]
    saved = JacobiConfig.from_generation_config(model.generation_config)
    if saved is not None and saved.decoding == MULTIBLOCK:
        first.append(saved if drafted else replace(saved, jacobi_verify_width=0))
    with tqdm(total=round(seconds), unit="s", desc="autotune", disable=not progress) as bar:
        trial = Trial(stopwatch.measure, batches, _Deadline(seconds, bar), drafted=drafted)
        stopwatch.warm_up(batches[0])
        table, untried = search(trial, first, Grid() if compile_config is None else COMPILED)
    return Tuning(table[0].way, table, trial.prices(), assistant_model, compile_config, drafted, tuple(untried))


def search(trial: Trial, first: Sequence[Way], grid: Grid) -> tuple[list[Setting], list[Way]]:
    """All settings that were tried, as in `Tuning.table`, and those that there was no time for.

    Args:
        trial: unopened.
        first: ways to try beside those of the grid, before them.
    """
    trial.open()
    ways: list[Way] = [None, *first, *grid.apart()]
    tried = min(2, len(trial.batches))
    for batches in range(1, tried + 1):
        trial.run(ways, batches)
        for refine in (_verify_widths, partial(_combinations, grid=grid)):
            if not trial.is_over():
                ways = list(dict.fromkeys([*ways, *refine(trial, ways)]))
                trial.run(ways, batches)
    rivals = trial.ranked(ways[1:])
    beaten: list[list[Way]] = []
    while len(rivals) > 1 and tried < len(trial.batches) and not trial.is_over():
        half = -(-len(rivals) // 2)
        rivals, beaten = rivals[:half], [rivals[half:], *beaten]
        tried = min(2 * tried, len(trial.batches))
        trial.run([None, *rivals], tried)
        rivals = trial.ranked(rivals)
    table = [setting for tier in ([None, *rivals], *beaten) for setting in trial.compared(tier)]
    return table, [way for way in ways if not trial.runs[way]]


def _verify_widths(trial: Trial, ways: list[Way]) -> list[JacobiConfig]:
    """How many guesses of a drafter to verify at a time, for the best window, which has been tried as acceptance suggests."""
    best = _best(trial, ways, "drafted window")[:1]
    return [
        replace(window, jacobi_verify_width=window.window_width // parts) for window in best for parts in (4, 2, 1)
    ]


def _combinations(trial: Trial, ways: list[Way], grid: Grid) -> list[JacobiConfig]:
    """The best windows with the best lookup and with pools."""
    windows = _best(trial, ways, "drafted window" if trial.drafted else "window")[: grid.combined]
    lengths = [0, *(way.jacobi_lookup_tokens for way in _best(trial, ways, "lookup")[:1])]
    return [
        replace(window, jacobi_lookup_tokens=length, jacobi_pool_size=pool)
        for window in windows
        for length in lengths
        for pool in grid.pools
        if length or pool
    ]


def _best(trial: Trial, ways: Iterable[Way], source: str) -> list[JacobiConfig]:
    """The ways that draft from one source alone, the fastest first."""
    ranked = trial.ranked(way for way in ways if trial.sources(way) == (source,))
    return [way for way in ranked if isinstance(way, JacobiConfig)]


class _Deadline:
    """Whether the time is up; moves the bar when asked."""

    def __init__(self, seconds: float, bar: Any) -> None:
        self._begun, self._seconds, self._bar = time.perf_counter(), seconds, bar

    def __call__(self) -> bool:
        elapsed = time.perf_counter() - self._begun
        self._bar.n = min(self._bar.total, round(elapsed))
        self._bar.refresh()
        return elapsed > self._seconds


def _check_arguments(
    generate_kwargs: dict[str, Any],
    seconds: float,
    max_new_tokens: int,
    batch_size: int,
    assistant_model: PreTrainedModel | None,
) -> None:
    if given := sorted(set(KNOBS) & set(generate_kwargs)):
        raise ValueError(f"{', '.join(given)} given to autotune, which is to find the knobs out; drop them.")
    if given := sorted(set(_OURS_TO_GIVE) & set(generate_kwargs)):
        raise ValueError(
            f"{', '.join(given)} given to autotune, which makes the inputs out of the prompts and times tokens itself; drop them."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} cannot be used; it must be at least 1.")
    if not seconds > 0 or math.isinf(seconds) or max_new_tokens < 2:
        raise ValueError(f"seconds={seconds} and max_new_tokens={max_new_tokens} leave nothing to measure.")
    if assistant_model is not None and batch_size > 1:
        raise ValueError("assisted decoding takes one row at a time: batch_size=1, or no assistant_model.")


def _rows(prompts: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Each prompt's ids."""
    one_alone = {str: "a string", Mapping: "a mapping"}
    given = next((name for kind, name in one_alone.items() if isinstance(prompts, kind)), None)
    if isinstance(prompts, torch.Tensor) and prompts.ndim != 2:
        given = f"a tensor of {prompts.ndim} dimensions"
    prompts = [] if given else list(prompts)
    if not prompts:
        raise ValueError(
            f"autotune needs a list of prompts, a dozen of the kind that will be decoded; got {given or 'none'}."
        )
    rows: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str) and tokenizer is None:
            raise ValueError(
                "the prompts are strings: give their tokenizer, autotune(model, prompts, tokenizer=tokenizer)."
            )
        ids: Any = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) and tokenizer is not None else prompt
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # torch's and numpy's
        if not isinstance(ids, (list, tuple)) or any(isinstance(i, bool) or not hasattr(i, "__index__") for i in ids):
            raise ValueError(f"prompt {number} is neither a string nor a list or tensor (one-dimensional) of ids.")
        if not ids:
            raise ValueError(f"prompt {number} is empty.")
        rows.append([int(i) for i in ids])
    return rows


def _batches(rows: list[list[int]], batch_size: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    batch_size = min(batch_size, len(rows))
    batches = []
    for first in range(0, len(rows) - batch_size + 1, batch_size):  # a smaller last batch would have other prices
        part = rows[first : first + batch_size]
        columns = max(map(len, part))
        ids = torch.tensor([[0] * (columns - len(row)) + row for row in part], device=device)
        mask = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in part], device=device)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def _effective_compile_config(model: Any, arguments: dict[str, Any]) -> CompileConfig | None:
    """Take the `compile_config` out of the arguments of `generate`; None where the call runs uncompiled."""
    options = arguments.get("generation_config") or model.generation_config
    given = arguments.pop("compile_config", None) or getattr(options, "compile_config", None)
    if given is None or arguments.get("disable_compile", getattr(options, "disable_compile", False)):
        return None
    if reason := cannot_compile(model):
        warnings.warn(
            f"compile_config is without effect: {reason}. All ways run uncompiled.", UserWarning, stacklevel=3
        )
        return None
    config: Any = copy.copy(given)
    config._compile_all_devices = True  # without it transformers compiles ordinary decoding on accelerators alone
    return config
