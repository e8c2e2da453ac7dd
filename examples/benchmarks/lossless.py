"""Lossless forcing beside everything else that one may draft from: the base, the base with its drafter, and the forced model.

    OMP_NUM_THREADS=1 python examples/benchmarks/lossless.py sources
    OMP_NUM_THREADS=1 python examples/benchmarks/lossless.py clock

`sources` takes 64 prompts of each domain, greedy and at temperature 1, once; `clock` times a few settings on arithmetic, in turn on every
prompt, several times over. The base's own `generate` is decoded in each group, so that ratios are of one process and one minute. The last
line on stdout is the path of the JSON document that was written (schema: jacobi_hf/results/schema.py).
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
Output = Annotated[Path | None, typer.Option(help="Where the JSON document goes.")]
DRAFTER = "examples/tiny_qwen3/drafter"
BASE, DRAFTED, FORCED = "base", "base + drafter", "forced"
ALONE = {"jacobi_pool_size": 0, "jacobi_lookup_tokens": 0}
WINDOW = {"jacobi_block_size": 2, "jacobi_max_blocks": 8}


def groups() -> Iterator[tuple[str, Any, Any, str | None]]:
    """Name, model, tokenizer and drafter of each group, one after the other."""
    base, tokenizer, _ = common.load(None)
    yield BASE, base, tokenizer, None
    jacobi_hf.load_drafter(base, str(common.EXAMPLES.parent / DRAFTER))
    yield DRAFTED, base, tokenizer, DRAFTER
    forced, tokenizer, _ = common.load(str(common.MODELS["forced"]))
    yield FORCED, forced, tokenizer, None


def sources_of(group: str, drafter: str | None) -> list[common.Contender]:
    """What may be drafted from, alone and together. All have a window of 16 guesses, except where lookup is alone."""

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
    """Under the group's name, without what is not the matter here."""
    return [
        m.model_copy(update={"model": group, "ms_per_forward": None, "per_prompt_tokens_per_forward": None})
        for m in measurements
    ]


@app.command()
def sources(
    output: Output = None, prompts: Annotated[int, typer.Option(min=1, help="Prompts per domain.")] = 64
) -> None:
    """Window, lookup, pool and branches of second choices, alone and together."""
    path, measurements = output or common.RESULTS / "lossless_sources.json", []
    for group, model, tokenizer, drafter in groups():
        contenders = [common.ordinary(), *sources_of(group, drafter)]
        measurements += as_of(group, measure(model, tokenizer, contenders, prompts, 128, 1, with_times=False))
        warm = [
            common.sampled(c) for c in contenders if c.decoder.name in ("generate", "window", "window+lookup+pool")
        ]
        measurements += as_of(group, measure(model, tokenizer, warm, prompts, 128, 1, with_times=False))
        results = Results.start("Sources of drafts, with and without a drafter", model, "tiny")
        results.with_measurements(measurements).write(path)
    show(measurements, len(measurements))
    print(path)


@app.command()
def clock(
    output: Output = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes over all prompts.")] = 5,
) -> None:
    """Arithmetic by the clock: windows alone."""
    path, measurements = output or common.RESULTS / "lossless_clock.json", []
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
