"""Write the table and the picture of the README from the results: python examples/benchmarks/readme.py

The table goes between the two marks in README.md, the picture into docs/images/ways.png. The picture's metadata hold
the heights of its bars, so that a test sees when the picture is older than the results.
"""

from __future__ import annotations

import json
import re
import textwrap
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


class Speed(NamedTuple):
    """How fast a way to decode is on one domain.

    Attributes:
        tokens_per_second: of the faster of eager and compiled.
        speedup: over ordinary decoding, compiled, of the same model in the same process; None for ordinary decoding
            itself.
        tokens_per_forward: None where it was not measured.
        note: what to say about the setting.
    """

    tokens_per_second: float
    speedup: float | None = None
    tokens_per_forward: float | None = None
    note: str = ""

    def __str__(self) -> str:
        factor = [] if self.speedup is None else [f"**{self.speedup:.1f}x**"]
        forwards = [] if self.tokens_per_forward is None else [f"TPF {self.tokens_per_forward:.1f}"]
        return " · ".join([*factor, f"{self.tokens_per_second:.0f} tok/s", *forwards]) + self.note


class Row(NamedTuple):
    """A way to decode: a row of the table. Where Jacobi decoding is not the fastest, a cell says what is."""

    name: str
    colour: str
    training: str
    text: str
    by_domain: dict[str, Speed | str]


class Measured:
    """The measurements of one model in a document of peers.py."""

    def __init__(self, results: Results, model: str) -> None:
        self._found = {(m.decoder.name, m.prompts.domain): m for m in results.measurements if m.model == model}

    def speed(self, name: str, domain: str, note: str = "") -> Speed:
        """Return how fast the decoder `name` is."""
        m = self._found[name, domain]
        assert m.tokens_per_second is not None
        baseline = self._found["generate-compiled", domain].tokens_per_second
        assert baseline is not None
        return Speed(m.tokens_per_second, m.tokens_per_second / baseline, m.tokens_per_forward, note)

    def ordinary(self, domain: str) -> Speed:
        """Return the baseline: ordinary decoding, compiled."""
        return self.speed("generate-compiled", domain)._replace(speedup=None, tokens_per_forward=1.0)

    def lookup(self, domain: str) -> Speed:
        """Return the fastest of transformers' prompt lookups."""
        return max((self.speed(f"prompt-lookup-{n}", domain) for n in (5, 10, 16)), key=lambda s: s.tokens_per_second)

    def tuned(self, domain: str) -> Speed | str:
        """Return the answer of autotune, or in words that it is no Jacobi decoding."""
        eager, compiled = self._found["autotuned", domain], self._found["autotuned-compiled", domain]
        settings = {m.extra["setting"].removesuffix(" decoding") for m in (eager, compiled)}
        if others := settings & {"assisted", "ordinary"}:
            return f"none: autotune chooses {' or '.join(sorted(others))} decoding"
        best = max(
            (self.speed(name, domain) for name in ("autotuned", "autotuned-compiled")),
            key=lambda s: s.tokens_per_second,
        )
        same = eager.extra["setting"] == compiled.extra["setting"]
        alone = all(setting.startswith("lookup") for setting in settings)
        return best._replace(
            tokens_per_forward=eager.tokens_per_forward if same else None, note=" (lookup alone)" if alone else ""
        )


def table_rows() -> list[Row]:
    """Return the rows of the table."""
    peers = document("peers")
    base, forced, drafted = (Measured(peers, name) for name in ("base", "forced", "base + drafter"))
    losses = [
        held_out_loss(document("forcing/forced-seed42"), d) - held_out_loss(document("forcing/base"), d)
        for d in DOMAINS
    ]
    drift = f"changed: held-out loss +{min(losses):.2f} to +{max(losses):.2f} nats per token"
    forcing = minutes(TINY / "forced" / "forcing-stage1.json", TINY / "forced" / "forcing.json")
    draft = minutes(TINY / "draft" / "training.json", key="minutes_of_this_process_to_the_end_of_training")
    drafter = minutes(TINY / "drafter" / "forcing.json")
    rows = [
        ("ordinary decoding", "ordinary", "none", "the model's", base.ordinary),
        ("prompt lookup of transformers", "prompt lookup", "none", "the same", base.lookup),
        (
            "assisted decoding of transformers",
            "assisted",
            f"a draft model of 1.1 M parameters: {draft}",
            "the same",
            lambda domain: base.speed("assisted", domain),
        ),
        ("**Jacobi decoding**", "Jacobi", "none", "the same", base.tuned),
        ("**with a drafter**", "Jacobi + drafter", f"a drafter: {drafter}", "the same", drafted.tuned),
        ("**after Jacobi Forcing**", "Jacobi Forcing", f"the model itself: {forcing}", drift, forced.tuned),
    ]
    return [
        Row(name, colour, training, text, {d: speed(d) for d in DOMAINS})
        for name, colour, training, text, speed in rows
    ]


def compiled_by_transformers() -> str:
    """Return a sentence with the speed of transformers' own lookup and assisted decoding compiled."""
    results = document("peers-5.24")
    base = Measured(results, "base")
    lookup, assisted = (
        ", ".join(f"{base.speed(name, d).speedup:.1f}x" for d in DOMAINS)
        for name in ("prompt-lookup-10-compiled", "assisted-compiled")
    )
    (prompts,) = {m.prompts.count for m in results.measurements}
    return (
        "Prompt lookup and assisted decoding ran uncompiled. "
        f"Compiled, as transformers 5.24 allows, they reach {lookup} and {assisted} "
        f"in a run with {prompts} prompts."
    )


def document(name: str) -> Results:
    """Return a stored document of results."""
    return Results.read(HERE / "results" / f"{name}.json")


def of(results: Results, domain: str) -> list[Measurement]:
    """Return the measurements of a domain."""
    return [m for m in results.measurements if m.prompts.domain == domain]


def held_out_loss(results: Results, domain: str) -> float:
    """Return the loss on held-out text, in nats per token."""
    return next(m.held_out_loss for m in of(results, domain) if m.held_out_loss is not None)


def minutes(*files: Path, key: str = "minutes") -> str:
    """Return how long the training runs took that these files report."""
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    (threads,) = {report["threads"] for report in reports}
    return f"{sum(report[key] for report in reports):.0f} min, {threads} thread{'s' * (threads > 1)}"


def table() -> str:
    """Return the table, with the marks around it."""
    head = ["decoding", "training needed", "output", *DOMAINS]
    rows = [[row.name, row.training, row.text, *map(str, row.by_domain.values())] for row in table_rows()]
    lines = [" | ".join(cells).strip() for cells in (head, ["---"] * len(head), *rows)]
    peers = document("peers")
    (prompts,) = {m.prompts.count for m in peers.measurements}
    source = (
        f"{prompts} held-out prompts per domain, {peers.hardware.cpu}, {peers.threads} thread, {peers.dtype}, "
        f"batch 1, {peers.created[:10]}. "
        f"{compiled_by_transformers()}"
    )
    return BEGIN + "".join(f"| {line} |\n" for line in lines) + "\n" + textwrap.fill(source, 119) + "\n" + END


def bars() -> dict[str, dict[str, dict[str, float]]]:
    """Return the heights of the picture's bars, by panel, way and domain.

    Tokens per forward belong to the default setting and to prompts whose output does not end in a loop. Tokens per
    second are those of the table.
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
        row.colour: {d: round(s.tokens_per_second) for d, s in row.by_domain.items() if isinstance(s, Speed)}
        for row in table_rows()
    }
    return {
        "tokens per forward": forwards,
        "tokens per second": {name: found for name, found in speeds.items() if found},
    }


def draw(panels: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draw the picture."""
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
    """Return the README with a new table."""
    return re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: table(), readme, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    draw(bars(), PICTURE)
    print(README.name, PICTURE.name)
