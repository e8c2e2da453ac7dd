"""Pictures of the results: python examples/benchmarks/plots.py

From the JSON documents of step_cost.py: what a step costs by its width, and the speed-up of the replay against its tokens per forward.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from jacobi_hf.results import Results

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parents[1] / "docs" / "images"


def cost(shape: str, results: Results, path: Path) -> None:
    """Milliseconds per step, over those of a step of one slot, by slots."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for m in results.measurements:
        by_width = m.ms_per_forward or {}
        if len(by_width) > 1:
            label = f"{m.decoder.name}, batch {m.prompts.batch_size}, context {m.extra['context']}"
            style = "--" if m.decoder.compiled else "-"
            axes.plot(list(by_width), [by_width[w] / by_width[1] for w in by_width], style, marker=".", label=label)
    axes.set(xlabel="slots of a step", ylabel="cost, in steps of one slot", xscale="log", yscale="log", title=title(shape, results))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def speedup(shape: str, results: Results, path: Path) -> None:
    """The replay."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    replayed = [m for m in results.measurements if m.prompts.domain == "replay" and m.speedups]
    for compiled in (False, True):
        found = [m for m in replayed if m.decoder.compiled == compiled]
        points = [(m.tokens_per_forward or 0, m.speedups[0].factor) for m in found]
        axes.plot(*zip(*points, strict=True), "--" if compiled else "-", marker="o", label="compiled" if compiled else "eager")
    highest = max(m.tokens_per_forward or 0 for m in replayed)
    axes.plot([1, highest], [1, highest], ":", color="grey", label="a step costs what one slot costs")
    axes.set(xlabel="tokens per forward (replayed, up to 65 slots)", ylabel="speed-up over ordinary decoding", title=title(shape, results))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def title(shape: str, results: Results) -> str:
    """Where it was measured."""
    return f"{shape}, random weights, {results.hardware.gpu or results.hardware.cpu}, {results.dtype}"


if __name__ == "__main__":
    for document in sorted((HERE / "results").glob("step_cost-*.json")):
        results, shape = Results.read(document), document.stem.removeprefix("step_cost-")
        cost(shape, results, IMAGES / f"cost-{shape}.png")
        speedup(shape, results, IMAGES / f"replay-{shape}.png")
        print(IMAGES.name, f"cost-{shape}.png", f"replay-{shape}.png")
