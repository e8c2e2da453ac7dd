"""Measure how time and memory of a step grow with context, batch and new tokens.

    OMP_NUM_THREADS=1 python examples/benchmarks/growth.py

A small Qwen3 with random weights continues random ids, since the cost of a step does not depend on them. A step lasts
from the start of one forward to the start of the next. Its parts are timed apart:

- *forward*: its attention grows with the cached tokens;
- *mask*: the arguments of the forward, with the mask;
- *lookup*: a scan over the ids of the text;
- *choice*: the token at every slot, and the acceptance of guesses;
- *pool*, *window*, *commit*;
- *rest*: everything that the host does between them.

A figure is the median over the steps that have so many cached tokens. Every Jacobi step has the full width, 65 slots
with the default knobs, so that steps can be compared. Baseline: ordinary `generate`, in turn with Jacobi decoding,
call by call.

Memory is the highest use of a call minus the use before it. A second process measures it. There, glibc returns each
freed block of 64 KiB or more at once, so resident memory is allocated memory. On CUDA the allocator counts.

The last line on stdout is the path of the JSON document.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from memory import resident
from rich.console import Console
from rich.progress import track
from shapes import synchronize
from transformers import Qwen3Config, Qwen3ForCausalLM

from jacobi_hf.config import CONSTANT, JacobiConfig
from jacobi_hf.decoding import step
from jacobi_hf.decoding.cache import JacobiStaticCache
from jacobi_hf.decoding.step import StepShape
from jacobi_hf.drafts.lookup import NgramLookup
from jacobi_hf.drafts.ngram_pool import NgramPool
from jacobi_hf.drafts.sources import Sources
from jacobi_hf.drafts.window import JacobiWindow
from jacobi_hf.execution.base import Eager
from jacobi_hf.integration.forward import ModelForward
from jacobi_hf.results.schema import Measurement, Prompts, Results

PARTS = {
    "mask": [(ModelForward, "arguments")],
    "choice": [(step, "accept")],
    "lookup": [(NgramLookup, "propose")],
    "pool": [(NgramPool, "propose"), (NgramPool, "observe")],
    "window": [(JacobiWindow, "observe"), (JacobiWindow, "propose")],
    "commit": [(JacobiStaticCache, "commit")],
}
MOST = 32_768


@dataclass(frozen=True)
class Point:
    """One point on one of the three axes: a call, and the steps of it that count.

    Attributes:
        axis: "context", "batch" or "new tokens".
        rows: rows of the batch.
        prompt: tokens of each row's prompt.
        tokens: new tokens of the call.
        cached: only steps with so many cached tokens count, or up to a quarter more; None counts all steps.
    """

    axis: str
    rows: int
    prompt: int
    tokens: int
    cached: int | None = None

    @property
    def call(self) -> tuple[int, int, int]:
        """Rows, prompt tokens and new tokens of the call."""
        return self.rows, self.prompt, self.tokens


def points(most: int) -> list[Point]:
    """Return the points: contexts up to `most`, batches up to 16, new tokens up to an eighth of `most`."""
    short = most // 64
    tokens = max(40, most // 200)
    return [
        *(Point("context", 1, context, tokens) for context in (short, 4 * short, 16 * short, most)),
        *(Point("batch", rows, short, tokens) for rows in (1, 4, 16)),
        *(Point("new tokens", 1, short // 8, most // 8, times * short) for times in (1, 2, 4, 6)),
    ]


def random_model(device: torch.device) -> Qwen3ForCausalLM:
    """Return a random model with 2 layers of 4 heads and 2 key/value heads of 32."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2 * MOST,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval().to(device)


@dataclass
class Steps:
    """Records the steps of calls.

    Attributes:
        model: the model of the calls.
        found: for each step: cached tokens before it, slots, and the seconds of its parts and of the whole step.
    """

    model: Any
    found: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)
    _parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _last: tuple[int, int, float] | None = None

    def now(self) -> float:
        """Return the time in seconds after the device has finished its work."""
        synchronize(self.model.device)
        return time.perf_counter()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the steps of one call."""
        originals = [
            (owner, name, getattr(owner, name), part) for part, places in PARTS.items() for owner, name in places
        ]
        hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end),
        ]
        for owner, name, original, part in originals:
            setattr(owner, name, self._timed(original, part))
        self._last = None
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for owner, name, original, _ in originals:
                setattr(owner, name, original)

    def _timed(self, function: Any, part: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            result = function(*args, **kwargs)
            self._parts[part] += self.now() - started
            return result

        return timed

    def _begin(self, _: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        now = self.now()
        if self._last is not None:
            cached, width, started = self._last
            whole = now - started
            self.found.append(
                (cached, width, {**self._parts, "step": whole, "rest": whole - sum(self._parts.values())})
            )
        self._parts.clear()
        cached = int(kwargs["position_ids"][:, 0].min())
        width = kwargs["input_ids"].shape[1]
        self._last = (cached, width, self.now())

    def _end(self, *_: Any) -> None:
        assert self._last is not None
        self._parts["forward"] += self.now() - self._last[2]


def peak(device: torch.device) -> int:
    """Return the highest number of bytes in use since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def forget_peak(device: torch.device) -> int:
    """Let `peak` count from now on, and return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident()


def decode(model: Any, call: tuple[int, int, int], arguments: dict[str, Any]) -> None:
    """Continue random ids; `call` has rows, prompt tokens and new tokens."""
    rows, prompt, tokens = call
    ids = torch.randint(
        1, model.config.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(prompt)
    ).to(model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **arguments)


def memory_of(model: Any, calls: list[tuple[int, int, int]]) -> dict[str, list[int]]:
    """Return by decoder the highest bytes of each call minus those in use before it."""
    found: dict[str, list[int]] = {}
    for contender in contenders():
        decode(model, calls[0], contender.arguments)
        for call in calls:
            before = forget_peak(model.device)
            decode(model, call, contender.arguments)
            found.setdefault(contender.decoder.name, []).append(peak(model.device) - before)
    return found


def full_shape(_: Eager, shape: StepShape) -> StepShape:
    """Return, in place of `Eager.shape`, the greatest shape that the default knobs allow, whatever the step needs."""
    config = JacobiConfig(jacobi_schedule=CONSTANT)
    pool = NgramPool(config.jacobi_pool_size, config.jacobi_branch_length)
    sources = Sources([JacobiWindow(config), NgramLookup(config.jacobi_lookup_tokens), pool])
    return StepShape(sources.width, sources.branch_lengths, starts=shape.starts)


def contenders() -> list[common.Contender]:
    """Return ordinary decoding, and Jacobi decoding with the default knobs."""
    return [common.ordinary(), common.jacobi("jacobi_multiblock")]


def milliseconds(steps: list[tuple[int, int, dict[str, float]]]) -> dict[str, float]:
    """Return the median milliseconds of the steps and of each of their parts."""
    names = [name for name in ("step", "forward", *PARTS, "rest") if any(name in parts for _, _, parts in steps)]
    return {name: round(statistics.median(parts.get(name, 0.0) for _, _, parts in steps) * 1e3, 4) for name in names}


def memory_in_new_process(most: int) -> dict[str, list[int]]:
    """Run `memory_of` in a process in which glibc returns freed memory at once."""
    command = [sys.executable, __file__, "--most", str(most), "--memory"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    held: dict[str, list[int]] = json.loads(printed.splitlines()[-1])
    return held


def measured(
    contender: common.Contender,
    point: Point,
    steps: list[tuple[int, int, dict[str, float]]],
    memory_bytes: int | None,
) -> Measurement:
    """Return the measurement of a decoder at a point, from all steps of the point's call."""
    low = point.cached or point.prompt
    high = (point.cached or MOST) * 5 // 4
    found = [one for one in steps if low < one[0] < high]
    return Measurement(
        decoder=contender.decoder,
        prompts=Prompts(
            domain=point.axis,
            source=f"random ids, {point.prompt} a row",
            count=point.rows,
            max_new_tokens=point.tokens,
            batch_size=point.rows,
        ),
        mean_slots=found[0][1],
        repeats=len(found),
        extra={
            "at": {"context": point.prompt, "batch": point.rows, "new tokens": point.cached}[point.axis],
            "ms": milliseconds(found),
            "mib": None if memory_bytes is None else round(memory_bytes / 2**20, 2),
        },
    )


def main(
    output: Annotated[Path, typer.Option(help="Path of the JSON document to write.")] = common.RESULTS / "growth.json",
    most: Annotated[
        int, typer.Option(min=512, max=MOST, help="Longest context; new tokens go up to an eighth of it.")
    ] = MOST,
    repeats: Annotated[int, typer.Option(min=1)] = 2,
    memory: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure all points of all axes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(device)
    planned = points(most)
    Eager.shape = full_shape  # type: ignore[method-assign]
    calls = list(dict.fromkeys(point.call for point in planned))
    if memory:
        print(json.dumps(memory_of(model, calls)))
        return
    steps = {contender.decoder.name: {call: Steps(model) for call in calls} for contender in contenders()}
    for contender in contenders():
        decode(model, calls[0], contender.arguments)
    for call in track([call for _ in range(repeats) for call in calls], console=Console(stderr=True)):
        for contender in contenders():
            mine = steps[contender.decoder.name][call]
            with mine.watch():
                decode(model, call, contender.arguments)
    held = memory_in_new_process(most)
    measurements = []
    for point in planned:
        for contender in contenders():
            name = contender.decoder.name
            memory_bytes = None if point.cached else held[name][calls.index(point.call)]
            measurements.append(measured(contender, point, steps[name][point.call].found, memory_bytes))
            print(point.axis, name, measurements[-1].repeats, measurements[-1].extra)
    what = "Time and memory of a step as context, batch and new tokens grow"
    Results.start(what, model, "random Qwen3, 2 layers").with_measurements(measurements).write(output)
    print(output)


if __name__ == "__main__":
    typer.run(main)
