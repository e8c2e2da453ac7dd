"""The table and the picture of the README, from the results: python examples/benchmarks/readme.py

The table is put between the two marks in README.md, the picture into docs/images/ways.png. Its bars are kept in the picture's metadata
too, so that a test sees when it is older than the results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from report.documents import TINY

from jacobi_hf.results.schema import Measurement, Results

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
PICTURE = HERE.parents[1] / "docs" / "images" / "ways.png"
BEGIN, END = "<!-- written by examples/benchmarks/readme.py -->\n", "<!-- end -->\n"
DOMAINS = ("code", "arithmetic", "prose")
COLOURS = {
    "ordinary": "#9aa0a6",
    "prompt lookup": "#c9a227",
    "assisted": "#b5651d",
    "Jacobi": "#7fb3d5",
    "Jacobi + drafter": "#2e86c1",
    "Jacobi Forcing": "#1b4f72",
}


class Yield(NamedTuple):
    """What a way comes to on a domain; None is not measured. `instead` is what autotune stays with, where that is no Jacobi decoding."""

    tokens_per_forward: float | None
    eager: float | None = None
    compiled: float | None = None
    instead: str | None = None

    def __str__(self) -> str:
        if self.instead:
            return f"stays with {self.instead}"
        tpf = "-" if self.tokens_per_forward is None else f"{self.tokens_per_forward:.2f}"
        speeds = ("-" if speed is None else f"{speed:.0f}" for speed in (self.eager, self.compiled))
        return " · ".join((tpf, *speeds))


class Way(NamedTuple):
    """A row of the table."""

    name: str
    colour: str
    text: str
    by_domain: dict[str, Yield]
    published: Path | None = None
    training: str = ""


def ways() -> list[Way]:
    """Ways to be faster, with what each costs."""
    peers, base = document("peers"), document("forcing/base")
    forced, published = document("forcing/forced-seed42"), document("custom_generate")

    def measured(model: str, name: str, domain: str) -> Measurement:
        return next(
            m for m in peers.measurements if (m.model, m.decoder.name, m.prompts.domain) == (model, name, domain)
        )

    def theirs(name: str, domain: str) -> Yield:
        m = measured("base", name, domain)
        return Yield(m.tokens_per_forward, m.tokens_per_second)

    def ordinary(domain: str) -> Yield:
        return Yield(
            1.0, theirs("generate", domain).eager, measured("base", "generate-compiled", domain).tokens_per_second
        )

    def lookup(domain: str) -> Yield:
        return max((theirs(f"prompt-lookup-{n}", domain) for n in (5, 10, 16)), key=lambda found: found.eager or 0)

    def tuned(model: str, domain: str) -> Yield:
        eager, compiled = measured(model, "autotuned", domain), measured(model, "autotuned-compiled", domain)
        others = {m.extra["setting"].removesuffix(" decoding") for m in (eager, compiled)} & {"assisted", "ordinary"}
        if others:
            return Yield(None, instead=", ".join(sorted(others)))
        return Yield(eager.tokens_per_forward, eager.tokens_per_second, compiled.tokens_per_second)

    def by_drafter(domain: str) -> Yield:
        return Yield(next(m.tokens_per_forward for m in of(published, domain) if m.decoder.drafter))

    drift = [held_out_loss(forced, d) - held_out_loss(base, d) for d in DOMAINS]
    loss = f"+{min(drift):.2f} to {max(drift):.2f} nats per token"
    forcing = minutes(TINY / "forced" / "forcing-stage1.json", TINY / "forced" / "forcing.json")
    drafter, draft = TINY / "drafter", TINY / "draft"
    return [
        Way("ordinary `generate`", "ordinary", "its own", {d: ordinary(d) for d in DOMAINS}),
        Way("prompt lookup of transformers", "prompt lookup", "the same", {d: lookup(d) for d in DOMAINS}),
        Way(
            "assisted, by a 1.1 M draft model",
            "assisted",
            "the same",
            {d: theirs("assisted", d) for d in DOMAINS},
            draft / "model.safetensors",
            minutes(draft / "training.json", key="minutes_of_this_process_to_the_end_of_training"),
        ),
        Way("**Jacobi**, autotuned", "Jacobi", "the same", {d: tuned("base", d) for d in DOMAINS}),
        Way(
            "**Jacobi + drafter**",
            "Jacobi + drafter",
            "the same",
            {d: by_drafter(d) for d in DOMAINS},
            drafter / "drafter_model.safetensors",
            minutes(drafter / "forcing.json"),
        ),
        Way(
            "**Jacobi Forcing**, autotuned",
            "Jacobi Forcing",
            loss,
            {d: tuned("forced", d) for d in DOMAINS},
            TINY / "forced" / "model.safetensors",
            forcing,
        ),
    ]


def document(name: str) -> Results:
    """One of the stored documents."""
    return Results.read(HERE / "results" / f"{name}.json")


def of(results: Results, domain: str) -> list[Measurement]:
    """The measurements of a domain."""
    return [m for m in results.measurements if m.prompts.domain == domain]


def held_out_loss(results: Results, domain: str) -> float:
    """Nats per token of held-out text."""
    return next(m.held_out_loss for m in of(results, domain) if m.held_out_loss is not None)


def minutes(*files: Path, key: str = "minutes") -> str:
    """How long the training runs took that these files report."""
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    (threads,) = {report["threads"] for report in reports}
    return f"{sum(report[key] for report in reports):.0f} min, {threads} thread{'s' * (threads > 1)}"


def table() -> str:
    """The table, with the marks around it."""
    head = ["", *DOMAINS, "text", "to publish", "training"]
    rows = [
        [
            way.name,
            *map(str, way.by_domain.values()),
            way.text,
            f"{way.published.stat().st_size / 1e6:.1f} MB" if way.published else "",
            way.training,
        ]
        for way in ways()
    ]
    lines = [" | ".join(row).strip() for row in (head, ["---", *["---:"] * len(DOMAINS), "---", "---:", "---"], *rows)]
    peers = document("peers")
    (prompts,) = {m.prompts.count for m in peers.measurements}
    source = f"Speeds: {prompts} held-out prompts per domain, {peers.hardware.cpu}, {peers.created[:10]}.\n"
    return BEGIN + "".join(f"| {line} |\n" for line in lines) + "\n" + source + END


def bars() -> dict[str, dict[str, dict[str, float]]]:
    """What the picture shows: panel, way, domain.

    Tokens per forward are of the default setting, over prompts whose output does not end in a loop; tokens per second are of whatever
    is faster, eager or compiled.
    """
    sources = {
        "Jacobi": document("forcing/base"),
        "Jacobi + drafter": document("drafter/drafter-seed42"),
        "Jacobi Forcing": document("forcing/forced-seed42"),
    }
    forwards = {"ordinary": dict.fromkeys(DOMAINS, 1.0)}
    for name, results in sources.items():
        found = {d: [m for m in of(results, d) if m.decoder.name == "multiblock-both"] for d in DOMAINS}
        forwards[name] = {d: round(ms[0].tokens_per_forward_loop_free or 0, 2) for d, ms in found.items() if ms}
    speeds = {
        way.colour: {
            d: round(max(y.eager or 0, y.compiled or 0)) for d, y in way.by_domain.items() if y.eager is not None
        }
        for way in ways()
    }
    return {
        "tokens per forward": forwards,
        "tokens per second": {name: found for name, found in speeds.items() if found},
    }


def draw(panels: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """The picture."""
    figure, grid = plt.subplots(1, len(panels), figsize=(11, 3.6), layout="constrained")
    for axes, (panel, by_way) in zip(grid, panels.items(), strict=True):
        width = 0.85 / len(by_way)
        for i, (name, by_domain) in enumerate(by_way.items()):
            places = [DOMAINS.index(d) + (i - (len(by_way) - 1) / 2) * width for d in by_domain]
            drawn = axes.bar(places, list(by_domain.values()), width * 0.95, color=COLOURS[name], label=name)
            axes.bar_label(drawn, fmt="%.1f" if "forward" in panel else "%.0f", fontsize="x-small", padding=1)
        axes.set(xticks=range(len(DOMAINS)), xticklabels=DOMAINS, title=panel)
        axes.spines[["top", "right"]].set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [name for name in COLOURS if name in handles]
    figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None, "Description": json.dumps(panels)})
    plt.close(figure)


def with_table(readme: str) -> str:
    """The README with the table as it is now."""
    return re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: table(), readme, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    draw(bars(), PICTURE)
    print(README.name, PICTURE.name)
