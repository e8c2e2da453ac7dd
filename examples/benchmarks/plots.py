"""Draw the pictures of docs/results from the JSON documents under examples/benchmarks/results.

    python examples/benchmarks/plots.py

- from step_cost.py: the cost of a step by its width, and the speed-up of the replay by its tokens per forward;
- from `decode.py acceptance`: the tokens that a forward commits;
- from growth.py: the parts of a step by the cached tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from jacobi_hf.results.schema import Results

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parents[1] / "docs" / "images"


def cost(shape: str, results: Results, path: Path) -> None:
    """Draw the milliseconds per step by slots, in units of a step of one slot."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for m in results.measurements:
        by_width = m.ms_per_forward or {}
        if len(by_width) > 1:
            label = f"{m.decoder.name}, batch {m.prompts.batch_size}, context {m.extra['context']}"
            style = "--" if m.decoder.compiled else "-"
            axes.plot(list(by_width), [by_width[w] / by_width[1] for w in by_width], style, marker=".", label=label)
    axes.set(
        xlabel="slots of a step",
        ylabel="cost, in steps of one slot",
        xscale="log",
        yscale="log",
        title=title(shape, results),
    )
    axes.legend(fontsize="small")
    save(figure, path)


def speedup(shape: str, results: Results, path: Path) -> None:
    """Draw the speed-up of the replay by its tokens per forward."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    replayed = [m for m in results.measurements if m.prompts.domain == "replay" and m.speedups]
    for compiled in (False, True):
        found = [m for m in replayed if m.decoder.compiled == compiled]
        points = [(m.tokens_per_forward or 0, m.speedups[0].factor) for m in found]
        axes.plot(
            *zip(*points, strict=True),
            "--" if compiled else "-",
            marker="o",
            label="compiled" if compiled else "eager",
        )
    highest = max(m.tokens_per_forward or 0 for m in replayed)
    axes.plot([1, highest], [1, highest], ":", color="grey", label="a step costs what one slot costs")
    axes.set(
        xlabel="tokens per forward (replayed, up to 65 slots)",
        ylabel="speed-up over ordinary decoding",
        title=title(shape, results),
    )
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    save(figure, path)


def acceptance(results: Results, path: Path) -> None:
    """Draw the share of the decoding forwards that commit so many tokens, by decoder and domain."""
    decoders = list(dict.fromkeys(m.decoder.name for m in results.measurements))
    domains = list(dict.fromkeys(m.prompts.domain for m in results.measurements))
    figure, grid = plt.subplots(
        len(decoders), len(domains), figsize=(10, 5), layout="constrained", sharex=True, sharey=True
    )
    for m in results.measurements:
        axes = grid[decoders.index(m.decoder.name)][domains.index(m.prompts.domain)]
        found = m.accepted_lengths or {}
        shift = 0.2 if axes.containers else -0.2
        heights = [count / sum(found.values()) for count in found.values()]
        axes.bar(
            [length + shift for length in found],
            heights,
            0.4,
            label=f"{m.model}: {m.tokens_per_forward:.2f} a forward",
        )
        axes.set(yscale="log", ylim=(5e-4, 20), title=f"{m.decoder.name}, {m.prompts.domain}")
        axes.legend(fontsize="small")
    figure.supxlabel("tokens that a forward commits")
    figure.supylabel("share of the forwards")
    save(figure, path)


def growth(results: Results, path: Path) -> None:
    """Draw the parts of a Jacobi step by the cached tokens: those of the prompt, and those of a long generation."""
    figure, grid = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axes, domain in zip(grid, ("context", "new tokens"), strict=True):
        mine = [
            m for m in results.measurements if m.prompts.domain == domain and m.decoder.kind == "jacobi_multiblock"
        ]
        for part in mine[0].extra["ms"]:
            points = [(m.extra["at"], m.extra["ms"][part]) for m in mine]
            axes.plot(
                *zip(*points, strict=True),
                "-" if part in ("step", "forward", "mask") else "--",
                marker=".",
                label=part,
            )
        axes.set(xscale="log", yscale="log", xlabel=f"{domain}, tokens")
    grid[0].set(ylabel="ms")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture, close it, and print its path."""
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    print(f"docs/images/{path.name}")


def title(shape: str, results: Results) -> str:
    """Return the title of a picture: shape, machine and dtype."""
    return f"{shape}, random weights, {results.hardware.gpu or results.hardware.cpu}, {results.dtype}"


if __name__ == "__main__":
    for document in sorted((HERE / "results").glob("step_cost-*.json")):
        results = Results.read(document)
        shape = document.stem.removeprefix("step_cost-")
        cost(shape, results, IMAGES / f"cost-{shape}.png")
        speedup(shape, results, IMAGES / f"replay-{shape}.png")
    for name, picture in {"acceptance": acceptance, "growth": growth}.items():
        if (path := HERE / "results" / f"{name}.json").is_file():
            picture(Results.read(path), IMAGES / f"{name}.png")
