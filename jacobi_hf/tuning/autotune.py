"""Find the fastest strategy for a model, a device and a user's prompts; `timing.py` times the strategies."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from jacobi_hf.config import CONSTANT, MULTIBLOCK, JacobiConfig
from jacobi_hf.drafts.loading import drafter_of
from jacobi_hf.tuning.inputs import batches_of, check_arguments, prompt_rows, take_compile_config
from jacobi_hf.tuning.strategies import ASSISTED, Strategy, describe, knobs_of, sources_of
from jacobi_hf.tuning.timing import Comparison, Prices, Run, Stopwatch, Timing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from transformers import CompileConfig, PreTrainedModel, PreTrainedTokenizerBase

    Messages = Sequence[dict[str, str]]

_WINDOW = JacobiConfig(jacobi_schedule=CONSTANT, jacobi_pool_size=0, jacobi_lookup_tokens=0)
_LOOKUP = JacobiConfig(jacobi_schedule=CONSTANT, jacobi_pool_size=0, jacobi_max_blocks=0)


@dataclass(frozen=True)
class Grid:
    """Settings with a constant schedule that `autotune` tries, the more promising ones first.

    Attributes:
        windows: pairs of n and K.
        lookups: lengths of the lookup.
        combined: number of the best windows that are combined with the best lookup and with pools.
        pools: sizes of the n-gram pool for these combinations.
    """

    windows: tuple[tuple[int, int], ...] = ((16, 1), (8, 1), (16, 2), (32, 1), (8, 2), (4, 1), (32, 2))
    lookups: tuple[int, ...] = (8, 16, 12, 4, 24)
    combined: int = 2
    pools: tuple[int, ...] = (0, 2)

    def apart(self) -> list[JacobiConfig]:
        """Return configs with one draft source each: lookups and windows alternate."""
        windows = [replace(_WINDOW, jacobi_block_size=n, jacobi_max_blocks=k) for n, k in self.windows]
        lookups = [replace(_LOOKUP, jacobi_lookup_tokens=length) for length in self.lookups]
        return [config for pair in zip_longest(lookups, windows) for config in pair if config is not None]


# To find the best of m strategies takes about RUNS * m calls.
RUNS = 4
PROMPTS = 6  # prompts that it takes to tell strategies apart
LEAST = 0.97  # the adaptive schedule is recommended if it has at least so much of the speed of ordinary decoding

COMPILED = Grid(windows=((16, 1), (8, 1), (32, 1)), lookups=(8, 16), combined=1, pools=(0,))


@dataclass(frozen=True)
class Tuning:
    """Result of `autotune`: the recommended strategy, and the timing of each one that was tried.

    Attributes:
        strategy: the recommended one: a config for Jacobi decoding, `"assisted decoding"` with the given draft model,
            or None for ordinary decoding. See `recommend`.
        table: timings of all strategies that were tried, the fastest first. Strategies that were dropped early come
            after those that beat them, since they ran on fewer prompts.
        milliseconds: median time of a step in milliseconds, by the number of its slots, for each set of draft sources
            of a strategy, by name.
        assistant_model: the draft model that was given.
        compile_config: the compile config that was given; None if it had no effect.
        drafted: whether a drafter was in use.
        untried: strategies that there was no time for.
    """

    strategy: Strategy
    table: list[Timing]
    milliseconds: Prices
    assistant_model: PreTrainedModel | None = None
    compile_config: CompileConfig | None = None
    drafted: bool = False
    untried: tuple[Strategy, ...] = ()

    @property
    def config(self) -> JacobiConfig | None:
        """The recommended setting of Jacobi decoding; None if another strategy is recommended."""
        return self.strategy if isinstance(self.strategy, JacobiConfig) else None

    @property
    def adaptive(self) -> Timing | None:
        """The timing of the adaptive schedule, which needs no tuning; None if there was no time for it."""
        timings = (one for one in self.table if isinstance(one.strategy, JacobiConfig) and one.strategy.is_adaptive)
        return next(timings, None)

    @property
    def recommended(self) -> Timing:
        """The timing of the recommended strategy."""
        return next(one for one in self.table if one.strategy == self.strategy)

    @property
    def is_win(self) -> bool:
        """Whether the recommended strategy is surely faster than ordinary decoding."""
        return self.strategy is not None and self.recommended.low > 1

    @property
    def comparison(self) -> str:
        """A sentence that compares the fastest strategy with the adaptive schedule; empty without a timing of it."""
        if self.adaptive is None or self.adaptive.prompts != self.table[0].prompts:
            return ""
        if self.adaptive.strategy == self.strategy:
            return "No setting is surely faster than the adaptive schedule, so no knob is needed."
        share = self.table[0].seconds / self.adaptive.seconds
        return f"The adaptive schedule, which needs no tuning, has {share:.2f} of the speed of the fastest strategy."

    @property
    def knobs(self) -> dict[str, Any]:
        """Arguments for `generate(**inputs, **knobs)`, with the `compile_config` if one was given.

        They override a decoding that is saved with the model. Compiled ordinary decoding uses a static cache.
        """
        return knobs_of(self.strategy, self.assistant_model, self.compile_config)

    def __str__(self) -> str:
        names = [describe(timing.strategy, drafted=self.drafted) for timing in self.table]
        widest = max(map(len, names), default=0)
        lines = [f"{'strategy':{widest}s} {'prompts':>7s} {'TPF':>6s} {'slots':>6s} {'speed-up':>8s} {'90 %':>9s}"]
        lines += [
            f"{name:{widest}s} {t.prompts:7d} {t.tokens_per_forward:6.2f} {t.mean_slots:6.1f} {t.speedup:8.2f} "
            f"{interval_of(t):>9s}"
            for name, t in zip(names, self.table, strict=True)
        ]
        untried = "; ".join(describe(strategy, drafted=self.drafted) for strategy in self.untried)
        answer = f"recommended: {describe(self.strategy, drafted=self.drafted)}"
        notes = [f"no time for: {untried}" if untried else "", answer, self.comparison]
        return "\n".join([*lines, *filter(None, notes)])


def interval_of(timing: Timing) -> str:
    """Return the interval of a speed-up in words; empty if it is not known."""
    return f"{timing.low:.2f}\u2013{timing.high:.2f}" if timing.prompts > 1 else ""


def autotune(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Messages] | Sequence[Sequence[int]] | Sequence[torch.Tensor] | torch.Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    seconds: float = 60.0,
    progress: bool = True,
    assistant_model: PreTrainedModel | None = None,
    **generate_kwargs: Any,
) -> Tuning:
    """Recommend how to decode with a model on this machine, measured on prompts like those that will be decoded.

    The strategies are windows and lookups of several sizes with a constant schedule, the adaptive schedule, ordinary
    decoding, the setting saved with the model, and assisted decoding if there is a draft model. As many of them are
    tried as there is time for on half a dozen prompts. All of these run on two prompts. If there is time for all, so
    do combinations of the best window and the best lookup and, with a drafter, several verify widths of the best
    window. The faster half then runs on twice the prompts, until the prompts or the time are used up. Ordinary
    decoding and the adaptive schedule run on all of these prompts. Strategies are compared on the prompts that they
    have in common. The text is the same with every strategy. The state of torch's random generator does not change.

    The adaptive schedule is recommended unless another strategy is surely faster, or ordinary decoding is faster.

    The adaptive schedule learns from its runs, as from any call: what it measured of costs and acceptance stays with
    the model, and later calls begin with it.

    With a `compile_config`, ordinary decoding is compiled too, as transformers does it. Calls that compile something
    are not timed, but they use up `seconds`. Only half a dozen strategies are tried then, since each one compiles up
    to four shapes of a step, and up to eight if a lookup runs beside a window. A shape takes seconds for a small model
    and up to a minute for a large
    one: allow ten minutes on a CPU.

    Args:
        model: model to decode with.
        prompts: a dozen prompts of the kind that will be decoded: strings, lists of messages, which go through the
            chat template, or token ids without padding, as lists, tensors, or one tensor with a prompt in each row.
        tokenizer: the model's tokenizer; needed for strings and messages.
        max_new_tokens: most new tokens of each prompt, as in the later calls.
        batch_size: prompts that are decoded together, as in the later calls.
        seconds: when to stop. The run at that moment is finished, and no other starts. Ordinary decoding of one prompt
            is timed in any case.
        progress: whether to show a progress bar.
        assistant_model: draft model for transformers' assisted decoding, which takes one row at a time.
        generate_kwargs: further arguments of the later calls of `generate`, such as sampling options, processors or
            `compile_config`.

    Returns:
        The recommended strategy, with the timings of all that were tried.

    Raises:
        ValueError: there are no prompts, all prompts end at their first new token, or a prompt or an argument cannot
            be used; the error names it.
    """
    check_arguments(generate_kwargs, seconds, max_new_tokens, batch_size, assistant_model)
    batches = batches_of(prompt_rows(prompts, tokenizer), batch_size, model.device)
    compile_config = take_compile_config(model, generate_kwargs)
    drafted = drafter_of(model) is not None
    arguments = {**generate_kwargs, "max_new_tokens": max_new_tokens}
    room = max(batch["input_ids"].shape[1] for batch in batches) + max_new_tokens
    stopwatch = Stopwatch(model, arguments, assistant_model, compile_config, room)
    first: list[Strategy] = [] if assistant_model is None else [ASSISTED]
    adaptive = JacobiConfig()
    saved = JacobiConfig.from_generation_config(model.generation_config)
    if saved is not None and saved.decoding == MULTIBLOCK:
        saved = saved if drafted else replace(saved, jacobi_verify_width=0)
        adaptive = saved if saved.is_adaptive else adaptive
        first.append(saved)
    with tqdm(total=round(seconds), unit="s", desc="autotune", disable=not progress) as bar:

        def measure(strategy: Strategy, batch: dict[str, torch.Tensor]) -> Run:
            bar.set_postfix_str(describe(strategy, drafted=drafted))
            return stopwatch.measure(strategy, batch)

        deadline = _Deadline(seconds, bar)
        sources = partial(sources_of, model=model)
        comparison = Comparison(measure, batches, deadline, sources, drafted=drafted, left=deadline.left)
        stopwatch.warm_up(batches[0])
        table, untried = search(comparison, first, Grid() if compile_config is None else COMPILED, [adaptive])
    prices = comparison.prices()
    strategy = recommend(comparison, table)
    return Tuning(strategy, table, prices, assistant_model, compile_config, drafted, tuple(untried))


def recommend(comparison: Comparison, table: Sequence[Timing]) -> Strategy:
    """Return the strategy to use.

    It is the fastest one if that is surely faster than the adaptive schedule, by the 90 % interval. Otherwise it is
    the adaptive schedule, or ordinary decoding where the schedule is slower than that.

    Args:
        comparison: what was run.
        table: timings, the fastest first.
    """
    count = table[0].prompts
    on_all = [one for one in table if one.prompts == count]
    adaptive = [one for one in on_all if isinstance(one.strategy, JacobiConfig) and one.strategy.is_adaptive]
    reference = next((one.strategy for one in adaptive if one.speedup >= LEAST), None)
    fastest = table[0].strategy
    if fastest != reference and comparison.interval(fastest, reference, count)[0] > 1:
        return fastest
    return reference


def search(
    comparison: Comparison, first: Sequence[Strategy], grid: Grid, kept: Sequence[Strategy] = ()
) -> tuple[list[Timing], list[Strategy]]:
    """Time strategies until the time is up; return the timings, as in `Tuning.table`, and the untried strategies.

    Args:
        comparison: an empty comparison, with the batches and the deadline.
        first: strategies to try before those of the grid.
        grid: settings of Jacobi decoding to try.
        kept: strategies that run on as many prompts as the fastest, as ordinary decoding does.
    """
    comparison.open()
    kept = [None, *kept]
    comparison.run(kept, 1)
    everything: list[Strategy] = list(dict.fromkeys([*kept, *first, *grid.apart()]))
    strategies = [*kept, *_affordable(comparison, kept, everything)]
    refinements = (_verify_widths, partial(_combinations, grid=grid)) if len(strategies) == len(everything) else ()
    tried = min(2, len(comparison.batches))
    for batches in range(1, tried + 1):
        comparison.run(strategies, batches)
        for refine in refinements:
            if not comparison.is_over():
                strategies = list(dict.fromkeys([*strategies, *refine(comparison, strategies)]))
                comparison.run(strategies, batches)
    everything = list(dict.fromkeys([*everything, *strategies]))
    rivals = [strategy for strategy in comparison.ranked(strategies) if strategy not in kept]
    beaten: list[list[Strategy]] = []
    while tried < len(comparison.batches) and not comparison.is_over():
        half = -(-len(rivals) // 2)
        beaten = [rivals[half:], *beaten]
        rivals = rivals[:half]
        tried = min(2 * tried, len(comparison.batches))
        comparison.run([*kept, *rivals], tried)
        rivals = comparison.ranked(rivals)
    table = [timing for tier in ([*kept, *rivals], *beaten) for timing in comparison.timings(tier)]
    return table, [strategy for strategy in everything if not comparison.runs[strategy]]


def _affordable(
    comparison: Comparison, kept: Sequence[Strategy], strategies: Sequence[Strategy]
) -> Sequence[Strategy]:
    """Return the first strategies, without those that are kept, as many as there is time to compare.

    Few strategies on several prompts say more than many on one.
    """
    runs = [run.seconds for strategy in kept for run in comparison.runs[strategy]]
    prompts = min(PROMPTS, len(comparison.batches))
    calls = comparison.left() * len(runs) / sum(runs) - len(kept) * (prompts - 1)
    rivals = [strategy for strategy in strategies if strategy not in kept]
    return rivals if calls >= RUNS * len(rivals) else rivals[: max(0, int(calls / RUNS))]


def _verify_widths(comparison: Comparison, strategies: list[Strategy]) -> list[JacobiConfig]:
    """Return the best window with several fixed verify widths; none without a drafter."""
    best = _best(comparison, strategies, has_window=True)[:1] if comparison.drafted else []
    return [
        replace(window, jacobi_verify_width=window.window_width // parts) for window in best for parts in (4, 2, 1)
    ]


def _combinations(comparison: Comparison, strategies: list[Strategy], grid: Grid) -> list[JacobiConfig]:
    """Return the best windows combined with the best lookup and with pools."""
    windows = _best(comparison, strategies, has_window=True)[: grid.combined]
    lookups = _best(comparison, strategies, has_window=False)[:1]
    lengths = [0, *(lookup.jacobi_lookup_tokens for lookup in lookups)]
    return [
        replace(window, jacobi_lookup_tokens=length, jacobi_pool_size=pool)
        for window in windows
        for length in lengths
        for pool in grid.pools
        if length or pool
    ]


def _best(comparison: Comparison, strategies: Iterable[Strategy], *, has_window: bool) -> list[JacobiConfig]:
    """Return the constant strategies with one draft source, which is the window or not, the fastest first."""
    alone = [
        strategy
        for strategy in strategies
        if isinstance(strategy, JacobiConfig)
        and not strategy.is_adaptive
        and len(comparison.sources(strategy)) == 1
        and bool(strategy.window_width) == has_window
    ]
    return [strategy for strategy in comparison.ranked(alone) if isinstance(strategy, JacobiConfig)]


class _Deadline:
    """Returns whether the time is up, and moves the progress bar each time it is called."""

    def __init__(self, seconds: float, bar: Any) -> None:
        self._started = time.perf_counter()
        self._seconds = seconds
        self._bar = bar

    def __call__(self) -> bool:
        left = self.left()
        self._bar.n = min(self._bar.total, round(self._seconds - left))
        self._bar.refresh()
        return left < 0

    def left(self) -> float:
        """Return the seconds until the time is up."""
        return self._seconds - (time.perf_counter() - self._started)
