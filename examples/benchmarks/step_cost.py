"""What a step costs by its width, for random weights at the shape of a known model.

    OMP_NUM_THREADS=1 python examples/benchmarks/step_cost.py --shape 0.1b
    python examples/benchmarks/step_cost.py --shape qwen3-1.7b          (on a GPU; bf16)

Cached tokens are random numbers: what a step costs does not depend on them. Steps of every width are timed as they stand, compiled, and on
CUDA captured (`mode="reduce-overhead"`), in turn; beside them ordinary `generate`, one token a forward, over as many cached tokens, as it
stands and with a StaticCache compiled the same ways. MBU is the bytes of weights and cached tokens that a step must read, over its time,
over the bandwidth of a copy measured in the same process. *Host* is the time until a step has been handed to the device; *idle* the share
of a replay's time in which the device does nothing. The document is written anew after each batch and context.

`--replay` decodes a text twice: ordinarily, and with that text as the draft, spoilt at such places that every forward yields exactly so
many tokens. That is no model's speed; it says what the engine makes of a given number of tokens per forward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, Qwen2Config, Qwen3Config, StaticCache
from transformers.generation import BaseStreamer

from jacobi_hf import JacobiConfig, clear_graphs
from jacobi_hf.decoding.layout import build_layout
from jacobi_hf.decoding.prompt import Prompt
from jacobi_hf.decoding.selection import Selector
from jacobi_hf.decoding.step import StepShape
from jacobi_hf.drafts.sources import sources_of
from jacobi_hf.drafts.window import JacobiWindow
from jacobi_hf.execution.buffers import CallBuffers
from jacobi_hf.execution.choose import execution_for
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.integration.forward import ModelForward, jacobi_attention
from jacobi_hf.results.schema import Decoder, Measurement, Prompts, Results, Speedup

# hidden size, intermediate size, layers, query heads, key/value heads, head dimension, vocabulary, tied embeddings
# "tiny" is there to try the program.
SHAPES: dict[str, tuple[type, tuple[int, int, int, int, int, int, int, bool]]] = {
    "tiny": (Qwen3Config, (64, 128, 2, 4, 2, 16, 512, True)),
    "0.1b": (Qwen3Config, (768, 2304, 12, 12, 4, 64, 32_768, True)),
    "qwen3-0.6b": (Qwen3Config, (1024, 3072, 28, 16, 8, 128, 151_936, True)),
    "qwen3-1.7b": (Qwen3Config, (2048, 6144, 28, 16, 8, 128, 151_936, True)),
    "qwen3-8b": (Qwen3Config, (4096, 12_288, 36, 32, 8, 128, 151_936, False)),
    "qwen2.5-7b": (Qwen2Config, (3584, 18_944, 28, 28, 4, 128, 152_064, False)),
}
WIDTHS = (1, 8, 16, 32, 64, 128, 192, 256)
SOME = (1, 16, 64)
TPF = (1.74, 2.0, 3.0, 4.1)


def build(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of that shape with random weights."""
    kind, (hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied) = SHAPES[shape]
    head = {"head_dim": head_dim} if kind is Qwen3Config else {}
    config = kind(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=32_768,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **head,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read and written ones, best of ten."""
    source = torch.empty((64 if device.type == "cpu" else 1024) * 2**20, dtype=torch.float32, device=device).fill_(1.0)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() * 4 / best


def bytes_read(model: Any, batch: int, context: int) -> int:
    """What any step must read: all weights but an embedding that is only looked up, and the cached keys and values."""
    config = model.config
    looked_up = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in model.parameters()) - looked_up
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * batch * context * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return (weights + cached) * model.dtype.itemsize


def modes(device: torch.device, backend: str) -> dict[str, CompileConfig | None]:
    """How steps and ordinary forwards run, by the suffix of their name."""
    found: dict[str, CompileConfig | None] = {
        "": None,
        "-compiled": CompileConfig(backend=backend, mode=None, fullgraph=True),
    }
    if device.type == "cuda":
        found["-captured"] = CompileConfig(backend=backend, mode="reduce-overhead", fullgraph=True)
    for config in filter(None, found.values()):
        config._compile_all_devices = True
    return found


def spots(shape: str, on_cpu: bool) -> list[tuple[int, int, list[int]]]:
    """Batch, context and widths of what is timed: every width at one place, a few at others."""
    if shape == "tiny":
        return [(1, 256, [1, 8, 16]), (4, 64, [1, 16])]
    widths, longest = [width for width in WIDTHS if not on_cpu or width <= 64], [] if on_cpu else [(1, 16_384)]
    others = [(1, 512), (4, 512), (16, 512), *longest]
    return [(1, 4096, widths), *((batch, context, list(SOME)) for batch, context in others)]


def device_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds for which a CUDA device computes or copies while it does some work."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        synchronize(device)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def timed_steps(
    model: Any, batch: int, context: int, widths: list[int], repeats: int, ways: dict[str, CompileConfig | None]
) -> dict[str, dict[int, Any]]:
    """Seconds of a step, and of the host alone, for each way to run it and each width; over `context` cached tokens."""
    device, room = model.device, max(widths) + 2
    config = JacobiConfig(
        jacobi_block_size=max(widths), jacobi_max_blocks=1, jacobi_pool_size=0, jacobi_lookup_tokens=0
    )
    sources = sources_of(config, model)
    buffers = CallBuffers(model, sources, batch, context + room, context + 2 * room, device)
    cache = buffers.cache
    state = buffers.state
    selector = Selector([], None, torch.zeros(batch, 1, dtype=torch.long))  # type: ignore[arg-type]
    text_BL = torch.randint(2, model.config.vocab_size, (batch, context), device=device)
    length_B = torch.full((batch,), context, device=device)
    prompt = Prompt(text_BL, None, length_B, torch.zeros_like(length_B), 0, context, text_BL, length_B)
    last = torch.tensor(context + room, device=device)
    executions = {f"step{way}": execution_for(model, config, wanted, buffers) for way, wanted in ways.items()}
    times: dict[str, dict[int, Any]] = {name: {width: [] for width in widths} for name in executions}

    def once(execution: Any, width: int) -> tuple[float, float]:
        state.open(prompt, room, 0, torch.zeros(0, dtype=torch.long, device=device), fills=False)
        cache.lengths_B.fill_(context)
        state.width_B.fill_(width - 1)
        layout = build_layout((width - 1,), device)
        key_column_K = cache.columns(width, context)
        synchronize(device)
        started = time.perf_counter()
        execution.run(
            state, forward, selector, StepShape(width - 1, ()), layout, key_column_K, context + 1, some_over=False
        )
        returned = time.perf_counter()
        synchronize(device)
        return time.perf_counter() - started, returned - started

    with torch.no_grad(), jacobi_attention(model):
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
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more."""


def ordinary(model: Any, context: int, tokens: int, compile_config: CompileConfig | None) -> float:
    """Median seconds from one token of `generate` to the next, over `context` random cached tokens, one row."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    room = context + tokens + 8
    cache = DynamicCache(config=config) if compile_config is None else StaticCache(config=config, max_cache_len=room)
    for layer in range(config.num_hidden_layers):
        states = torch.randn(1, config.num_key_value_heads, context, head_dim, dtype=model.dtype, device=model.device)
        cache.update(states, states, layer)
    ids = torch.randint(2, config.vocab_size, (1, context + 1), device=model.device)
    gaps, options = Gaps(), {} if compile_config is None else {"compile_config": compile_config}
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


def replaying(truth_BT: torch.Tensor, per_forward: float) -> Callable[..., Any]:
    """Return a `JacobiWindow.propose` that proposes the true continuation, wrong wherever a forward is to end."""
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


def replays(model: Any, tokens: int, ways: dict[str, CompileConfig | None]) -> list[Measurement]:
    """Tokens per second of ordinary decoding, and with 64 slots at given tokens per forward, run in each of these ways."""
    ids = torch.randint(2, model.config.vocab_size, (1, 64), device=model.device)
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": tokens,
        "do_sample": False,
        "eos_token_id": None,
    }
    config = JacobiConfig(jacobi_block_size=4, jacobi_max_blocks=16, jacobi_pool_size=0, jacobi_lookup_tokens=0)
    reference, original, found = model.generate(ids, **arguments), JacobiWindow.propose, []
    truth_BT = torch.cat([reference[:, 64:], reference[:, -1:].expand(-1, 160)], 1)
    prompts = Prompts(
        domain="replay", source="random weights, random prompt of 64 tokens", count=1, max_new_tokens=tokens
    )

    def measured(decoder: Decoder, options: dict[str, Any]) -> tuple[Measurement, Any]:
        def once() -> Any:
            return model.generate(
                ids, **arguments, return_dict_in_generate=decoder.kind == "jacobi_multiblock", **options
            )

        times = []
        for _ in range(5):
            synchronize(model.device)
            started = time.perf_counter()
            output = once()
            synchronize(model.device)
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times[2:])  # the first one compiles, the second one captures
        idle = (
            {"idle": round(1 - device_seconds(once, model.device) / seconds, 4)} if model.device.type == "cuda" else {}
        )
        return Measurement(
            decoder=decoder,
            prompts=prompts,
            tokens_per_forward=1.0,
            mean_slots=1.0,
            seconds=round(seconds, 4),
            repeats=3,
            tokens_per_second=round(tokens / seconds, 2),
            extra=idle,
        ), output

    for way, compile_config in ways.items():
        compiles = compile_config is not None
        options = {"compile_config": compile_config} if compiles else {}
        kind: Any = "generate-static-compiled" if compiles else "generate"
        ordinary = Decoder(name=f"generate{way}", kind=kind, compiled=compiles)
        plain, _ = measured(ordinary, options | ({"cache_implementation": "static"} if compiles else {}))
        found.append(plain)
        for per_forward in TPF:
            JacobiWindow.propose = replaying(truth_BT, per_forward)  # type: ignore[method-assign]
            clear_graphs(model)
            decoder = Decoder.of(f"replay-{per_forward}{way}", config).model_copy(update={"compiled": compiles})
            try:
                mine, output = measured(decoder, config.to_knobs() | options)
            finally:
                JacobiWindow.propose = original  # type: ignore[method-assign]
            stats, factor = output.jacobi_stats, (plain.seconds or 0) / (mine.seconds or 1)
            measures = {
                "new_tokens": tokens,
                "forwards": stats.forwards,
                "tokens_per_forward": round(stats.mean_tokens_per_forward, 3),
                "mean_slots": round(stats.mean_slots, 2),
                "speedups": [Speedup(baseline=ordinary.name, factor=round(factor, 4))],
            }
            extra = mine.extra | {
                "conversion": round(factor / stats.mean_tokens_per_forward, 4),
                "same_text": torch.equal(output.sequences, reference),
            }
            found.append(mine.model_copy(update={**measures, "extra": extra}))
    clear_graphs(model)
    return found


def at_one_spot(
    model: Any,
    batch: int,
    context: int,
    widths: list[int],
    repeats: int,
    ways: dict[str, CompileConfig | None],
    copied: float,
) -> list[Measurement]:
    """Steps, and ordinary decoding where the batch is one; `copied` is the bandwidth of a copy."""
    prompts = Prompts(
        domain="random", source=f"{context} random cached tokens", count=batch, max_new_tokens=1, batch_size=batch
    )
    found = []
    for name, by_width in timed_steps(model, batch, context, widths, repeats, ways).items():
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
    for way, config in ways.items() if batch == 1 else ():
        seconds = ordinary(model, context, 24, config)
        mbu = round(bytes_read(model, 1, context) / seconds / copied, 3)
        kind: Any = "generate" if config is None else "generate-static-compiled"
        found.append(
            Measurement(
                decoder=Decoder(name=f"generate{way}", kind=kind, compiled=config is not None),
                prompts=prompts,
                repeats=20,
                ms_per_forward={1: round(seconds * 1e3, 4)},
                extra={"context": context, "mbu_of_width_1": mbu},
            )
        )
    return found


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "0.1b",
    output: Annotated[Path | None, typer.Option(help="Where the JSON document goes.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    replay: Annotated[bool, typer.Option(help="Also end to end, at given tokens per forward.")] = True,
    tokens: Annotated[int, typer.Option(min=32, help="New tokens of the replay.")] = 128,
    backend: Annotated[str, typer.Option(help="Of torch.compile.")] = "inductor",
) -> None:
    """One shape."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is not known; the shapes are {', '.join(SHAPES)}.", param_hint="--shape")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device.type == "cpu"
    model = build(shape, device, torch.float32 if on_cpu else torch.bfloat16)
    path, ways, copied = (
        output or common.RESULTS / f"step_cost-{shape}.json",
        modes(device, backend),
        bandwidth(device),
    )
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
        add(at_one_spot(model, batch, context, widths, repeats, ways, copied))
    if replay:
        add(replays(model, tokens, ways))
    print(path)


if __name__ == "__main__":
    typer.run(main)
