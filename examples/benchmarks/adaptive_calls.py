"""Timed calls of `generate` for adaptive.py."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from adaptive_cells import Cell
from transformers import CompileConfig

from jacobi_hf.decoding.loop import Decoder as Loop
from jacobi_hf.results.schema import Decoder


@dataclass
class Contender:
    """A decoder with its calls: `calls[prompt]` has one entry for each round."""

    decoder: Decoder
    arguments: dict[str, Any]
    calls: dict[int, list[Call]] = field(default_factory=dict)

    def add(self, prompt: int, call: Call) -> None:
        """Keep a call."""
        self.calls.setdefault(prompt, []).append(call)

    def rate(self, clock: str = "cpu") -> float:
        """Return tokens per second, by the median of each prompt's calls."""
        seconds = sum(statistics.median(getattr(call, clock) for call in calls) for calls in self.calls.values())
        return sum(calls[0].tokens for calls in self.calls.values()) / seconds


@dataclass(frozen=True)
class Call:
    """One call of `generate`: new tokens of each row, CPU and wall seconds, and the statistics of Jacobi decoding."""

    outputs: list[list[int]]
    cpu: float
    wall: float
    stats: Any

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(map(len, self.outputs))


@dataclass
class Bench:
    """A model with what a cell runs on it."""

    cell: Cell
    model: Any
    batches: list[dict[str, torch.Tensor]]
    stats: list[Any]

    def call(self, arguments: dict[str, Any], prompt: int, tokens: int) -> Call:
        """Run one call."""
        inputs = self.batches[prompt]
        chooses = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if self.cell.temperature else {}
        self.stats.clear()
        torch.manual_seed(prompt)
        wall = time.perf_counter()
        cpu = time.process_time()
        output = self.model.generate(
            **inputs, max_new_tokens=tokens, **({"do_sample": False} | chooses | arguments), **self._execution()
        )
        cpu = time.process_time() - cpu
        wall = time.perf_counter() - wall
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return Call([self._until_the_end(row) for row in rows], cpu, wall, self.stats[-1] if self.stats else None)

    def _execution(self) -> dict[str, Any]:
        if not self.cell.compiled:
            return {}
        config = CompileConfig(mode="default", fullgraph=True)
        config._compile_all_devices = True
        return {"cache_implementation": "static", "max_cache_len": 1024, "compile_config": config}

    def _until_the_end(self, row: list[int]) -> list[int]:
        end = self.model.generation_config.eos_token_id
        ends = {end} if isinstance(end, int) else set(end or ())
        return next((row[: place + 1] for place, token in enumerate(row) if token in ends), row)

    def compared(self, contenders: list[Contender], prompt: int, tokens: int, order: random.Random) -> None:
        """Run all contenders on a prompt in random order."""
        for contender in order.sample(contenders, len(contenders)):
            contender.add(prompt, self.call(contender.arguments, prompt, tokens))


@contextmanager
def kept_stats() -> Iterator[list[Any]]:
    """Yield the list that gets the statistics of each Jacobi call, at no cost for the call."""
    run = Loop.run
    found: list[Any] = []

    def keeping(self: Loop, *arguments: Any) -> None:
        run(self, *arguments)
        found.append(self.stats)

    Loop.run = keeping  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Loop.run = run  # type: ignore[method-assign]
