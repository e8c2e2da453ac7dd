"""Measure the cost of a step by its width, for random weights at the shape of a known model.

    OMP_NUM_THREADS=1 python examples/benchmarks/step_cost.py --shape 0.1b
    python examples/benchmarks/step_cost.py --shape qwen3-1.7b          (on a GPU; bf16)

Cached tokens are random numbers, since the cost of a step does not depend on them. Steps of every width run eagerly,
compiled, and on CUDA as CUDA graphs (`mode="reduce-overhead"`), in turn. Baseline: ordinary `generate`, one token a
forward, over as many cached tokens, eager and with a StaticCache compiled in the same ways.

- *MBU*: bytes of weights and cached tokens that a step must read, divided by its time, and by the bandwidth of a copy
  that the same process measures;
- *host*: time until a step has been launched on the device;
- *idle*: share of the time of a replay in which the device does nothing.

`--replay` decodes a text twice: by ordinary decoding, and with that text as the guesses. Errors in the guesses give
every forward a known number of tokens. This is not the speed of any model; it shows what the engine makes of a given
number of tokens per forward.

The document is written again after each batch and context. The last line on stdout is its path.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from replay import replays
from rich.console import Console
from rich.progress import track
from shapes import SHAPES, bandwidth, build, bytes_read, synchronize
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.generation import BaseStreamer

from jacobi_hf import JacobiConfig, clear_graphs
from jacobi_hf.config import CONSTANT
from jacobi_hf.decoding.layout import build_layout
from jacobi_hf.decoding.prompt import read_prompt
from jacobi_hf.decoding.selection import Selector
from jacobi_hf.decoding.step import StepPlan, StepShape
from jacobi_hf.drafts.sources import sources_of
from jacobi_hf.execution.buffers import CallBuffers
from jacobi_hf.execution.choose import execution_for
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.integration.forward import ModelForward
from jacobi_hf.results.schema import Decoder, Measurement, Prompts, Results

WIDTHS = (1, 8, 16, 32, 64, 128, 192, 256)
SOME = (1, 16, 64)


def modes(device: torch.device, backend: str) -> dict[str, CompileConfig | None]:
    """Return how steps and ordinary forwards run, by the suffix of their name; None runs eagerly."""
    found: dict[str, CompileConfig | None] = {
        "": None,
        "-compiled": CompileConfig(backend=backend, mode=None, fullgraph=True),
    }
    if device.type == "cuda":
        found["-cuda-graphs"] = CompileConfig(backend=backend, mode="reduce-overhead", fullgraph=True)
    for config in filter(None, found.values()):
        config._compile_all_devices = True
    return found


def spots(shape: str, on_cpu: bool) -> list[tuple[int, int, list[int]]]:
    """Return the timed places: batch, context and widths. One place has all widths, the others have a few."""
    if shape == "tiny":
        return [(1, 256, [1, 8, 16]), (4, 64, [1, 16])]
    widths = [width for width in WIDTHS if not on_cpu or width <= 64]
    longest = [] if on_cpu else [(1, 16_384)]
    others = [(1, 512), (4, 512), (16, 512), *longest]
    return [(1, 4096, widths), *((batch, context, list(SOME)) for batch, context in others)]


def timed_steps(
    model: Any, batch: int, context: int, widths: list[int], repeats: int, run_modes: dict[str, CompileConfig | None]
) -> dict[str, dict[int, Any]]:
    """Time steps over `context` cached tokens.

    Returns:
        By name and width, for each repeat: the seconds of the step, and those until the host had launched it.
    """
    device = model.device
    room = max(widths) + 2
    config = JacobiConfig(
        jacobi_schedule=CONSTANT,
        jacobi_block_size=max(widths),
        jacobi_max_blocks=1,
        jacobi_pool_size=0,
        jacobi_lookup_tokens=0,
    )
    sources = sources_of(config, model)
    columns = context + 2 * room
    buffers = CallBuffers(model, sources, batch, columns, device, most=columns)
    cache = buffers.cache
    state = buffers.state
    selector = Selector([], None, torch.zeros(batch, 1, dtype=torch.long))  # type: ignore[arg-type]
    text_BL = torch.randint(2, model.config.vocab_size, (batch, context), device=device)
    prompt = read_prompt(text_BL, None, None, 0, None, model.config.vocab_size)
    last = torch.tensor(context + room, device=device)
    executions = {
        f"step{suffix}": execution_for(model, config, wanted, buffers) for suffix, wanted in run_modes.items()
    }
    times: dict[str, dict[int, Any]] = {name: {width: [] for width in widths} for name in executions}

    def once(execution: Any, width: int) -> tuple[float, float]:
        state.open(prompt, room, 0, torch.zeros(0, dtype=torch.long, device=device), fills=False)
        cache.lengths_B.fill_(context)
        state.width_B.fill_(width - 1)
        layout = build_layout((width - 1,), device)
        key_column_K = cache.columns(width, context)
        plan = StepPlan(StepShape(width - 1, ()), layout, key_column_K, may_be_over=False)
        synchronize(device)
        started = time.perf_counter()
        execution.run(state, forward, selector, plan)
        returned = time.perf_counter()
        synchronize(device)
        return time.perf_counter() - started, returned - started

    with torch.no_grad():
        forward = ModelForward(model, cache, sources, last)
        for name, execution in executions.items():  # allocate, compile, warm up
            for width in track(widths, description=name, console=Console(stderr=True)):
                once(execution, width)
                once(execution, width)
        for _ in range(repeats):
            for width in widths:
                for name, execution in executions.items():
                    times[name][width].append(once(execution, width))
    clear_graphs(model)
    return times


class Gaps(BaseStreamer):
    """Notes the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def ordinary(model: Any, context: int, tokens: int, compile_config: CompileConfig | None) -> float:
    """Return the median seconds from one token of `generate` to the next, over random cached tokens, at batch 1."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    room = context + tokens + 8
    cache = DynamicCache(config=config) if compile_config is None else StaticCache(config=config, max_cache_len=room)
    for layer in range(config.num_hidden_layers):
        states = torch.randn(1, config.num_key_value_heads, context, head_dim, dtype=model.dtype, device=model.device)
        cache.update(states, states, layer)
    ids = torch.randint(2, config.vocab_size, (1, context + 1), device=model.device)
    gaps = Gaps()
    options = {} if compile_config is None else {"compile_config": compile_config}
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        streamer=gaps,
        **{CACHE: cache},
        **options,
    )
    return statistics.median(b - a for a, b in zip(gaps.times[3:], gaps.times[4:], strict=False))


def at_one_spot(
    model: Any,
    batch: int,
    context: int,
    widths: list[int],
    repeats: int,
    run_modes: dict[str, CompileConfig | None],
    copied: float,
) -> list[Measurement]:
    """Measure steps, and at batch 1 also ordinary decoding.

    Args:
        copied: bytes per second of a copy.
    """
    prompts = Prompts(
        domain="random", source=f"{context} random cached tokens", count=batch, max_new_tokens=1, batch_size=batch
    )
    found = []
    for name, by_width in timed_steps(model, batch, context, widths, repeats, run_modes).items():
        total = {width: statistics.median(t for t, _ in times) for width, times in by_width.items()}
        host = {width: round(statistics.median(h for _, h in times) * 1e3, 4) for width, times in by_width.items()}
        extra = {"context": context, "mbu_of_width_1": round(bytes_read(model, batch, context) / total[1] / copied, 3)}
        found.append(
            Measurement(
                decoder=Decoder(name=name, kind="jacobi_multiblock", compiled=name != "step"),
                prompts=prompts,
                repeats=repeats,
                ms_per_forward={width: round(seconds * 1e3, 4) for width, seconds in total.items()},
                extra=extra if model.device.type == "cpu" else {**extra, "host_ms": host},
            )
        )
    for suffix, config in run_modes.items() if batch == 1 else ():
        seconds = ordinary(model, context, 24, config)
        mbu = round(bytes_read(model, 1, context) / seconds / copied, 3)
        kind: Any = "generate" if config is None else "generate-static-compiled"
        found.append(
            Measurement(
                decoder=Decoder(name=f"generate{suffix}", kind=kind, compiled=config is not None),
                prompts=prompts,
                repeats=20,
                ms_per_forward={1: round(seconds * 1e3, 4)},
                extra={"context": context, "mbu_of_width_1": mbu},
            )
        )
    return found


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "0.1b",
    output: Annotated[
        Path | None, typer.Option(help="Path of the JSON document to write (default: results/step_cost-SHAPE.json).")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    replay: Annotated[bool, typer.Option(help="Also measure whole texts at given tokens per forward.")] = True,
    tokens: Annotated[int, typer.Option(min=32, help="New tokens of the replay.")] = 128,
    backend: Annotated[str, typer.Option(help="Backend of torch.compile.")] = "inductor",
) -> None:
    """Measure the steps of one shape."""
    if shape not in SHAPES:
        raise typer.BadParameter(
            f"{shape!r} is not a shape; the shapes are {', '.join(SHAPES)}.", param_hint="--shape"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device.type == "cpu"
    model = build(shape, device, torch.float32 if on_cpu else torch.bfloat16)
    path = output or common.RESULTS / f"step_cost-{shape}.json"
    run_modes = modes(device, backend)
    copied = bandwidth(device)
    results = Results.start(f"Cost of a step by its width at the shape {shape}, random weights", model, shape)
    measurements: list[Measurement] = []

    def add(found: list[Measurement]) -> None:
        measurements.extend(found)
        measurements[0].extra["copy_gigabytes_per_second"] = round(copied / 1e9, 2)
        results.with_measurements(measurements).write(path)
        for m in found:
            print(
                m.decoder.name,
                m.prompts.batch_size,
                m.ms_per_forward or "",
                m.tokens_per_second or "",
                m.tokens_per_forward or "",
                m.extra,
            )

    for batch, context, widths in spots(shape, on_cpu):
        add(at_one_spot(model, batch, context, widths, repeats, run_modes, copied))
    if replay:
        add(replays(model, tokens, run_modes))
    print(path)


if __name__ == "__main__":
    typer.run(main)
