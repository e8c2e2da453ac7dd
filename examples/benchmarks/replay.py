"""Replays of a recorded text at given tokens per forward, for step_cost.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from shapes import synchronize
from transformers import CompileConfig

from jacobi_hf import JacobiConfig, clear_graphs
from jacobi_hf.config import CONSTANT
from jacobi_hf.drafts.window import JacobiWindow
from jacobi_hf.results.schema import Decoder, Measurement, Prompts, Speedup

TPF = (1.74, 2.0, 3.0, 4.1)
PROMPT = 64  # tokens of the random prompt


class Replay:
    """A random prompt with its ordinary continuation, which replays propose as guesses.

    Attributes:
        model: the model that decodes.
        tokens: new tokens of the continuation.
        reference: prompt and continuation.
        truth_BT: the continuation, padded with its last token, so that windows can reach over its end.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        self.model = model
        self._ids = torch.randint(2, model.config.vocab_size, (1, PROMPT), device=model.device)
        self._arguments = {
            "attention_mask": torch.ones_like(self._ids),
            "max_new_tokens": tokens,
            "do_sample": False,
            "eos_token_id": None,
        }
        self.tokens = tokens
        self.reference = model.generate(self._ids, **self._arguments)
        self.truth_BT = torch.cat([self.reference[:, PROMPT:], self.reference[:, -1:].expand(-1, 160)], 1)

    def measured(self, decoder: Decoder, options: dict[str, Any]) -> tuple[Measurement, Any]:
        """Return the measurement of a decoder without its tokens per forward, and its output.

        Args:
            options: arguments of `generate` for the decoder.
        """
        device = self.model.device
        returns_stats = decoder.kind == "jacobi_multiblock"

        def once() -> Any:
            return self.model.generate(self._ids, **self._arguments, return_dict_in_generate=returns_stats, **options)

        times = []
        for _ in range(5):
            synchronize(device)
            started = time.perf_counter()
            output = once()
            synchronize(device)
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times[2:])  # the first one compiles, the second one records CUDA graphs
        extra = {}
        if device.type == "cuda":
            extra["idle"] = round(1 - device_seconds(once, device) / seconds, 4)
        prompts = Prompts(
            domain="replay",
            source=f"random weights, random prompt of {PROMPT} tokens",
            count=1,
            max_new_tokens=self.tokens,
        )
        measurement = Measurement(
            decoder=decoder,
            prompts=prompts,
            tokens_per_forward=1.0,
            mean_slots=1.0,
            seconds=round(seconds, 4),
            repeats=3,
            tokens_per_second=round(self.tokens / seconds, 2),
            extra=extra,
        )
        return measurement, output


def device_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Do some work, and return the seconds for which a CUDA device computes or copies."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        synchronize(device)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def replaying(truth_BT: torch.Tensor, per_forward: float) -> Callable[..., Any]:
    """Return a `JacobiWindow.propose` that proposes the true continuation with an error at the end of each forward.

    Args:
        truth_BT: the true continuation of each row.
        per_forward: tokens that each forward commits, on average.
    """
    index_T = torch.arange(truth_BT.shape[1], device=truth_BT.device)
    ends_T = (index_T / per_forward).floor() != ((index_T + 1) / per_forward).floor()
    draft_BT = torch.where(ends_T, (truth_BT + 1) % truth_BT.max().add(1), truth_BT)
    propose = JacobiWindow.propose

    def replay(self: JacobiWindow, context: Any) -> tuple[torch.Tensor, torch.Tensor]:
        token_B1W, length_B1 = propose(self, context)
        generated_B = context.outcome.generated_B
        index_BW = generated_B[:, None] + torch.arange(token_B1W.shape[2], device=generated_B.device)
        return draft_BT.gather(1, index_BW.clamp(max=draft_BT.shape[1] - 1))[:, None], length_B1

    return replay


@contextmanager
def replayed(truth_BT: torch.Tensor, per_forward: float) -> Iterator[None]:
    """Let the window propose a replay with so many tokens per forward."""
    propose = JacobiWindow.propose
    JacobiWindow.propose = replaying(truth_BT, per_forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        JacobiWindow.propose = propose  # type: ignore[method-assign]


def replays(model: Any, tokens: int, modes: dict[str, CompileConfig | None]) -> list[Measurement]:
    """Measure ordinary decoding and replays, run in each of the modes.

    Args:
        tokens: new tokens of the text.
        modes: how forwards and steps run, by the suffix of their name; None runs eagerly.
    """
    replay = Replay(model, tokens)
    found = []
    for suffix, compile_config in modes.items():
        options = {} if compile_config is None else {"compile_config": compile_config}
        plain = ordinary(replay, suffix, options)
        found += [plain, *(one_replay(replay, per_forward, suffix, options, plain) for per_forward in TPF)]
        clear_graphs(model)
    return found


def ordinary(replay: Replay, suffix: str, options: dict[str, Any]) -> Measurement:
    """Measure ordinary decoding, with a static cache if it is compiled."""
    if not options:
        return replay.measured(Decoder(name="generate", kind="generate"), {})[0]
    decoder = Decoder(name=f"generate{suffix}", kind="generate-static-compiled", compiled=True)
    return replay.measured(decoder, options | {"cache_implementation": "static"})[0]


def one_replay(
    replay: Replay, per_forward: float, suffix: str, options: dict[str, Any], plain: Measurement
) -> Measurement:
    """Measure a replay with windows of 64 guesses; `plain` is its baseline."""
    config = JacobiConfig(
        jacobi_schedule=CONSTANT,
        jacobi_block_size=4,
        jacobi_max_blocks=16,
        jacobi_pool_size=0,
        jacobi_lookup_tokens=0,
    )
    decoder = Decoder.of(f"replay-{per_forward}{suffix}", config).model_copy(update={"compiled": bool(options)})
    with replayed(replay.truth_BT, per_forward):
        clear_graphs(replay.model)  # compiled steps hold the window of the replay before
        mine, output = replay.measured(decoder, config.to_knobs() | options)
    stats = output.jacobi_stats
    factor = (plain.seconds or 0) / (mine.seconds or 1)
    extra = {
        "conversion": round(factor / stats.mean_tokens_per_forward, 4),
        "same_text": torch.equal(output.sequences, replay.reference),
    }
    update = {
        "new_tokens": replay.tokens,
        "forwards": stats.forwards,
        "tokens_per_forward": round(stats.mean_tokens_per_forward, 3),
        "mean_slots": round(stats.mean_slots, 2),
        "speedups": [Speedup(baseline=plain.decoder.name, factor=round(factor, 4))],
        "extra": mine.extra | extra,
    }
    return mine.model_copy(update=update)
