"""Compare decoders on held-out prompts: tokens per forward, slots, milliseconds, tokens per second, equality.

    OMP_NUM_THREADS=1 python examples/benchmarks/decode.py compare
    OMP_NUM_THREADS=1 python examples/benchmarks/decode.py grid
    OMP_NUM_THREADS=1 python examples/benchmarks/decode.py acceptance

- `compare` runs the settings that the documentation quotes, on 64 prompts of each domain.
- `grid` runs many combinations of n, K, r, pool and lookup, on a few prompts.
- `acceptance` counts the tokens that each forward commits, on the base and on the forced checkpoint, without timing.

Baselines: ordinary eager `generate`; in `compare` also `generate` with a StaticCache and a compiled forward. All
decoders run in one process, prompt by prompt in turn. Seconds are medians of the repeats. The last line on stdout is
the path of the JSON document (schema: jacobi_hf/results/schema.py).
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jacobi_hf.evaluation.decoding import is_looping
from jacobi_hf.output import JacobiStats
from jacobi_hf.results.schema import Agreement, Measurement, Prompts, Results, Speedup

app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0] if __doc__ else None)
Model = Annotated[str | None, typer.Option(help="Model name or folder (default: the tiny checkpoint).")]
Output = Annotated[Path | None, typer.Option(help="Path of the JSON document to write.")]


Runs = list[list[common.Run]]  # by repeat, by prompt


def measure(
    model: Any,
    tokenizer: Any,
    contenders: list[common.Contender],
    prompt_count: int,
    max_new_tokens: int,
    repeats: int,
    *,
    with_times: bool,
    domains: tuple[str, ...] = ("code", "arithmetic", "prose"),
) -> list[Measurement]:
    """Run every contender on every prompt of each domain.

    Args:
        contenders: the first one is the reference of equality, and of speed if it is `generate`.
        prompt_count: prompts per domain.
        repeats: timed passes over all prompts; seconds are the median of the passes.
        with_times: also keep milliseconds by width, TPF by prompt, and the committed tokens of each forward.
    """
    measurements = []
    for domain in domains:
        texts = common.prompts(prompt_count)[domain]
        runs: dict[str, Runs] = {c.decoder.name: [] for c in contenders}
        for _ in range(repeats):
            for c in contenders:
                runs[c.decoder.name].append([])
            for text in track(texts, description=domain, console=Console(stderr=True)):
                for c in contenders:
                    runs[c.decoder.name][-1].append(common.run(model, tokenizer, c, text, max_new_tokens))
        found = [measured(c, runs, contenders[0].decoder.name, domain, max_new_tokens) for c in contenders]
        if with_times:
            found = [
                m.model_copy(update=times(model, tokenizer, c, texts, runs[c.decoder.name], max_new_tokens))
                for m, c in zip(found, contenders, strict=True)
            ]
        measurements += found
    return measurements


def measured(
    contender: common.Contender, runs: dict[str, Runs], reference: str, domain: str, max_new_tokens: int
) -> Measurement:
    """Return the measurement of a contender on a domain, from the runs of all contenders."""
    name = contender.decoder.name
    first = runs[name][0]
    expected = runs[reference][0]
    looping = [i for i, one in enumerate(expected) if is_looping(one.tokens)]
    different = [i for i, (a, b) in enumerate(zip(expected, first, strict=True)) if a.tokens != b.tokens]
    free = [one for i, one in enumerate(first) if i not in looping]
    slots = [width for one in first for width in one.slots]
    tokens = sum(len(one.tokens) for one in first)
    seconds = {
        other: statistics.median(sum(one.seconds for one in run) for run in mine) for other, mine in runs.items()
    }
    baselines = [b for b in ("generate", "generate-static-compiled") if b in seconds and b != name]
    return Measurement(
        decoder=contender.decoder,
        prompts=Prompts(
            domain=domain,
            source="examples/tiny_qwen3/prompts.json",
            count=len(first),
            max_new_tokens=max_new_tokens,
            do_sample=contender.arguments.get("do_sample", False),
        ),
        new_tokens=tokens,
        forwards=sum(one.forwards for one in first),
        tokens_per_forward=tokens_per_forward(first),
        tokens_per_forward_loop_free=tokens_per_forward(free) if free else None,
        looping=looping,
        mean_slots=round(statistics.mean(slots), 2) if slots else 0.0,
        seconds=round(seconds[name], 4),
        repeats=len(runs[name]),
        tokens_per_second=round(tokens / seconds[name], 2),
        speedups=[Speedup(baseline=b, factor=round(seconds[b] / seconds[name], 4)) for b in baselines],
        agreement=Agreement(
            baseline=reference, identical=len(first) - len(different), total=len(first), different=different
        ),
    )


def tokens_per_forward(runs: list[common.Run]) -> float:
    """Return TPF of all runs together."""
    return round(sum(len(one.tokens) for one in runs) / sum(one.forwards for one in runs), 4)


def times(
    model: Any,
    tokenizer: Any,
    contender: common.Contender,
    texts: list[str],
    runs: Runs,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Return the fields of a measurement that show it by prompt, by width and by committed tokens."""
    counts: dict[str, Any] = {}
    if contender.decoder.kind.startswith("jacobi"):
        found = stats(model, tokenizer, contender, texts, max_new_tokens)
        counts["mean_acceptance_length"] = common.acceptance_length(found)
        counts["accepted_lengths"] = common.accepted_lengths(found)
    return {
        **counts,
        "per_prompt_tokens_per_forward": [round(len(one.tokens) / one.forwards, 3) for one in runs[0]],
        "ms_per_forward": common.medians_by_width([one for run in runs for one in run]),
    }


def stats(
    model: Any, tokenizer: Any, contender: common.Contender, texts: list[str], max_new_tokens: int
) -> list[JacobiStats]:
    """Return the statistics of Jacobi decoding on each prompt."""
    encoded = [tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device) for text in texts]
    return [common.stats_of(model, inputs, contender.arguments, max_new_tokens) for inputs in encoded]


def show(measurements: list[Measurement], most: int = 60) -> None:
    """Print the first `most` measurements as a table on standard error."""
    table = Table()
    for column in ("domain", "decoder", "TPF", "loop-free", "slots", "tok/s", "speed-up", "identical"):
        table.add_column(column, justify="left" if column in ("domain", "decoder") else "right")
    for m in measurements[:most]:
        factor = next((f"{s.factor:.2f}" for s in m.speedups if s.baseline == "generate"), "")
        free = "" if m.tokens_per_forward_loop_free is None else f"{m.tokens_per_forward_loop_free:.2f}"
        equal = "" if m.agreement is None else f"{m.agreement.identical}/{m.agreement.total}"
        table.add_row(
            m.prompts.domain,
            m.decoder.name,
            f"{m.tokens_per_forward:.2f}",
            free,
            f"{m.mean_slots:.1f}",
            f"{m.tokens_per_second:.0f}",
            factor,
            equal,
        )
    Console(stderr=True, width=120).print(table)


def finish(results: Results, measurements: list[Measurement], output: Path) -> None:
    """Write the document, print its table, and print its path on stdout."""
    results.with_measurements(measurements).write(output)
    show(measurements)
    print(output)


@app.command()
def compare(
    model: Model = None,
    output: Output = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per domain.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes over all prompts.")] = 1,
    compiled: Annotated[bool, typer.Option(help="Also run generate with a StaticCache and torch.compile.")] = True,
) -> None:
    """Measure the settings that the documentation quotes."""
    loaded, tokenizer, name = common.load(model)
    contenders = [
        common.ordinary(),
        common.prompt_lookup(10),
        common.prompt_lookup(16),
        common.jacobi("jacobi", decoding="jacobi"),
        common.jacobi("multiblock-window", jacobi_pool_size=0, jacobi_lookup_tokens=0),
        common.jacobi("multiblock-pool", jacobi_lookup_tokens=0),
        common.jacobi("multiblock-lookup", jacobi_pool_size=0),
        common.jacobi("multiblock-both"),
        common.jacobi("multiblock-both-pool4", jacobi_pool_size=4),
        common.jacobi(
            "paper", **{k: v for k, v in common.jacobi_hf.JacobiConfig.paper().to_knobs().items() if k != "decoding"}
        ),
    ]
    if compiled:
        contenders.insert(1, common.compiled(512))
        common.run(loaded, tokenizer, contenders[1], "def main(", 4)  # compile before the timed runs
    results = Results.start("TPF, slots, speed and equality of decoders on held-out prompts", loaded, name)
    measurements = measure(loaded, tokenizer, contenders, prompts, max_new_tokens, repeats, with_times=True)
    finish(results, measurements, output or common.RESULTS / "decode_compare.json")


@app.command()
def grid(
    model: Model = None,
    output: Output = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per domain.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Measure n in {4, 8, 16, 32}, K in {1, 2, 3}, r in {0, .5, .85}, pool in {0, 2, 4}, lookup on and off."""
    loaded, tokenizer, name = common.load(model)
    contenders = [common.ordinary(), common.jacobi("jacobi", decoding="jacobi")]
    for n, blocks, ratio, pool, lookup in itertools.product(
        (4, 8, 16, 32), (1, 2, 3), (0.0, 0.5, 0.85), (0, 2, 4), (0, 16)
    ):
        contenders.append(
            common.jacobi(
                f"n{n}-K{blocks}-r{ratio:g}-pool{pool}-lookup{lookup}",
                jacobi_block_size=n,
                jacobi_max_blocks=blocks,
                jacobi_activation_ratio=ratio,
                jacobi_pool_size=pool,
                jacobi_lookup_tokens=lookup,
            )
        )
    results = Results.start("TPF, slots and speed over n, K, r, pool and lookup", loaded, name)
    measurements = measure(loaded, tokenizer, contenders, prompts, max_new_tokens, 1, with_times=False)
    best = sorted(measurements, key=lambda m: (m.prompts.domain, -(m.tokens_per_second or 0)))
    results.with_measurements(measurements).write(output or common.RESULTS / "decode_grid.json")
    show(
        [m for domain in ("arithmetic", "code", "prose") for m in [b for b in best if b.prompts.domain == domain][:12]]
    )
    print(output or common.RESULTS / "decode_grid.json")


@app.command()
def acceptance(
    output: Output = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per domain.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
) -> None:
    """Count the tokens that each forward commits, with a window alone and with the default knobs."""
    contenders = [
        common.jacobi("window-n8-K2", jacobi_block_size=8, jacobi_pool_size=0, jacobi_lookup_tokens=0),
        common.jacobi("multiblock-both"),
    ]
    measurements = []
    for name, folder in common.MODELS.items():
        loaded, tokenizer, _ = common.load(str(folder))
        for (domain, texts), c in itertools.product(common.prompts(prompts).items(), contenders):
            found = stats(loaded, tokenizer, c, texts, max_new_tokens)
            tokens = sum(one.new_tokens[0] for one in found)
            forwards = sum(one.row_forwards[0] for one in found)
            measurements.append(
                Measurement(
                    decoder=c.decoder,
                    model=name,
                    prompts=Prompts(
                        domain=domain,
                        source="examples/tiny_qwen3/prompts.json",
                        count=len(texts),
                        max_new_tokens=max_new_tokens,
                    ),
                    new_tokens=tokens,
                    forwards=forwards,
                    tokens_per_forward=round(tokens / forwards, 4),
                    mean_slots=round(statistics.mean(one.mean_slots for one in found), 2),
                    mean_acceptance_length=common.acceptance_length(found),
                    accepted_lengths=common.accepted_lengths(found),
                )
            )
            print(name, domain, c.decoder.name, measurements[-1].tokens_per_forward, measurements[-1].accepted_lengths)
    path = output or common.RESULTS / "acceptance.json"
    Results.start("Tokens that a decoding forward yields", loaded, "tiny").with_measurements(measurements).write(path)
    print(path)


if __name__ == "__main__":
    torch.manual_seed(0)
    app()
