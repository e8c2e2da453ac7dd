"""Draft sources, alone and together, on three models: the base, the base with its drafter, and the forced model.

    OMP_NUM_THREADS=1 python examples/benchmarks/draft_sources.py sources
    OMP_NUM_THREADS=1 python examples/benchmarks/draft_sources.py clock

`sources` measures tokens per forward and slots on 64 prompts of each domain, greedy and at temperature 1. `clock`
measures tokens per second of windows without other sources, on arithmetic, as medians of several passes.

Baseline: ordinary eager `generate` of the same model. It runs in the same process, in turn with the others on every
prompt. The last line on stdout is the path of the JSON document (schema: jacobi_hf/results/schema.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import common
import typer
from decode import measure, show

import jacobi_hf
from jacobi_hf.results.schema import Measurement, Results

app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0] if __doc__ else None)
Output = Annotated[Path | None, typer.Option(help="Path of the JSON document to write.")]
DRAFTER = "examples/tiny_qwen3/drafter"
BASE = "base"
DRAFTED = "base + drafter"
FORCED = "forced"
ALONE = {"jacobi_pool_size": 0, "jacobi_lookup_tokens": 0}
WINDOW = {"jacobi_block_size": 2, "jacobi_max_blocks": 8}


def groups() -> Iterator[tuple[str, Any, Any, str | None]]:
    """Yield name, model, tokenizer and drafter of each group; the base without its drafter comes first."""
    base, tokenizer, _ = common.load(None)
    yield BASE, base, tokenizer, None
    jacobi_hf.load_drafter(base, str(common.EXAMPLES.parent / DRAFTER))
    yield DRAFTED, base, tokenizer, DRAFTER
    forced, tokenizer, _ = common.load(str(common.MODELS["forced"]))
    yield FORCED, forced, tokenizer, None


def sources_of(group: str, drafter: str | None) -> list[common.Contender]:
    """Return the decoders of a group. All have a window of 16 guesses, except for lookup alone."""

    def ours(name: str, **changes: Any) -> common.Contender:
        return common.jacobi(name, drafter, **WINDOW | changes)

    contenders = [
        ours("window", **ALONE),
        ours("window+lookup", jacobi_pool_size=0),
        ours("window+pool", jacobi_lookup_tokens=0),
        ours("window+lookup+pool"),
        ours("window+topk8", jacobi_topk_branches=8, **ALONE),
        ours("window+lookup+pool+topk8", jacobi_topk_branches=8),
    ]
    if group == BASE:
        lookup = common.jacobi("lookup", jacobi_max_blocks=0, jacobi_pool_size=0)
        contenders = [common.prompt_lookup(16), lookup, *contenders]
    if drafter:
        contenders += [
            ours("window, all verified", jacobi_verify_width=16, **ALONE),
            ours("window, 8 verified", jacobi_verify_width=8, **ALONE),
        ]
    return contenders


def as_of(group: str, measurements: list[Measurement]) -> list[Measurement]:
    """Return the measurements with the group as their model, without the fields that no page shows."""
    return [
        m.model_copy(update={"model": group, "ms_per_forward": None, "per_prompt_tokens_per_forward": None})
        for m in measurements
    ]


@app.command()
def sources(
    output: Output = None, prompts: Annotated[int, typer.Option(min=1, help="Prompts per domain.")] = 64
) -> None:
    """Measure window, lookup, pool and top-k branches, alone and together."""
    path = output or common.RESULTS / "draft_sources.json"
    measurements = []
    for group, model, tokenizer, drafter in groups():
        contenders = [common.ordinary(), *sources_of(group, drafter)]
        measurements += as_of(group, measure(model, tokenizer, contenders, prompts, 128, 1, with_times=False))
        sampled = [
            common.sampled(c) for c in contenders if c.decoder.name in ("generate", "window", "window+lookup+pool")
        ]
        measurements += as_of(group, measure(model, tokenizer, sampled, prompts, 128, 1, with_times=False))
        results = Results.start("Draft sources, with and without a drafter", model, "tiny")
        results.with_measurements(measurements).write(path)
    show(measurements, len(measurements))
    print(path)


@app.command()
def clock(
    output: Output = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes over all prompts.")] = 5,
) -> None:
    """Time windows without other sources, on arithmetic."""
    path = output or common.RESULTS / "drafter_clock.json"
    measurements = []
    for group, model, tokenizer, drafter in groups():
        if group == BASE:
            continue
        widths = (8, 12, 16, 0) if drafter else (0,)
        contenders = [common.ordinary()]
        for n, blocks in ((2, 8), (8, 2)):
            for verified in widths:
                name = f"n{n}-K{blocks}" + (f"-verify{verified}" if drafter else "")
                setting = {
                    "jacobi_block_size": n,
                    "jacobi_max_blocks": blocks,
                    "jacobi_verify_width": verified,
                } | ALONE
                contenders.append(common.jacobi(name, drafter, **setting))
        found = measure(model, tokenizer, contenders, prompts, 128, repeats, with_times=False, domains=("arithmetic",))
        measurements += as_of(group, found)
    results = Results.start(
        "Tokens per second of windows alone on arithmetic, with a drafter and after forcing", model, "tiny"
    )
    results.with_measurements(measurements).write(path)
    show(measurements)
    print(path)


if __name__ == "__main__":
    app()
