"""The page on adaptive steps: the default call against ordinary decoding and the best fixed setting, cell by cell."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from adaptive_cells import cells as all_cells

from jacobi_hf.results.schema import Cost, Measurement, Results

from .documents import RESULTS, document, group
from .tables import NOTHING, decimal, identical, source, table

LATER = 0.97  # of ordinary decoding
FIRST = 0.92
OF_BEST = 0.85  # of the best fixed setting, where eight slots cost at most CHEAP times one slot
CHEAP = 2.2
REASONS: dict[str, str] = {
    "smollm2-math-fp32-b1-t0-eager": "on these prompts no fixed setting gets there either, see the table",
    "smollm2-chat-fp32-b1-t0-eager": "guesses hardly pay on this text: every fixed setting is slower than ordinary "
    "decoding, see the table",
    **{
        f"{name}-arithmetic-fp32-b8-t0-eager": "the answers are short, so the few wide steps that try and the fixed "
        "cost of a call weigh more than in answers of full length"
        for name in ("base", "drafter")
    },
}
"""Why a cell falls short, by its name. Every figure is in the tables."""


@dataclass(frozen=True)
class Cell:
    """What the page shows of a cell."""

    name: str
    results: Results

    def of(self, decoder: str) -> Measurement | None:
        """Return the measurement of a decoder, or None."""
        return next((m for m in self.results.measurements if m.decoder.name == decoder), None)

    @property
    def ours(self) -> Measurement:
        """The later calls of the default call."""
        found = self.of("default call")
        assert found is not None
        return found

    @property
    def later(self) -> float:
        """Speed of later calls, relative to ordinary decoding."""
        return self.ours.speedups[0].factor

    @property
    def first(self) -> float | None:
        """Speed of first calls, relative to ordinary decoding."""
        found = self.of("default call, first call")
        return None if found is None else found.speedups[0].factor

    @property
    def best(self) -> Measurement | None:
        """The best fixed setting."""
        names = ("default call", "default call, first call")
        fixed = [m for m in self.results.measurements if m.speedups and m.decoder.name not in names]
        return max(fixed, key=lambda m: m.speedups[0].factor, default=None)

    @property
    def of_best(self) -> float | None:
        """Speed of later calls, relative to the best fixed setting."""
        return None if self.best is None else self.later / self.best.speedups[0].factor

    @property
    def cost_of_8(self) -> float | None:
        """Cost of a forward of eight slots, relative to one slot."""
        return next((c.factor for c in self.results.costs if c.name == "forward of 8 slots"), None)

    @property
    def key(self) -> list[str]:
        """Model, text and so on, as in the tables."""
        model, text, dtype, rows, temperature, execution = self.name.split("-")
        return [model, text, dtype, rows.removeprefix("b"), temperature.removeprefix("t"), execution]


@dataclass(frozen=True)
class Bar:
    """A bar, with the cells that it is about and those of them that fall short."""

    text: str
    cells: list[Cell]
    short: list[Cell]


HEAD = ["model", "text", "dtype", "rows", "T", ""]


def context() -> dict[str, Any]:
    """Return what the template shows."""
    found = [
        Cell(name, results)
        for name, results in group("adaptive", "").items()
        if not name.startswith(("before-", "short-"))
    ]
    short = [Cell(name.removeprefix("short-"), results) for name, results in group("adaptive", "short-").items()]
    before = {
        name.removeprefix("before-"): Cell(name.removeprefix("before-"), results)
        for name, results in group("adaptive", "before-").items()
    }
    cells = sorted(found, key=lambda cell: (ORDER.index(cell.key[0]), cell.key[2:]))
    return {
        "count": len(cells),
        "listed": len(all_cells()),
        "table": cell_table(cells),
        "bars": bar_table(cells),
        "short": short_table(cells),
        "before": before_table([*short, *cells], before),
        "hours": decimal(sum(c.value for cell in cells for c in cell.results.costs if c.name == "cell") / 3600, 1),
        "sources": sources([*cells, *short], before),
        "one_slot": one_slot() if (RESULTS / "one_slot.json").exists() else None,
    }


ORDER = ["base", "forced", "drafter", "random", "smollm2", "qwen"]


def cell_table(cells: list[Cell]) -> str:
    """Return the table of all cells."""
    head = [
        *HEAD,
        "first call",
        "later calls",
        "by wall time",
        "best fixed setting",
        "its factor",
        "of the best",
        "8 slots",
        "TPF",
        "identical",
    ]
    rows = [
        [
            *cell.key,
            decimal(cell.first),
            decimal(cell.later),
            decimal(cell.ours.extra["factor_by_wall_time"]),
            NOTHING if cell.best is None else cell.best.decoder.name,
            decimal(None if cell.best is None else cell.best.speedups[0].factor),
            decimal(cell.of_best),
            decimal(cell.cost_of_8, 1),
            decimal(cell.ours.tokens_per_forward),
            identical(cell.ours),
        ]
        for cell in cells
    ]
    return table(head, rows)


def bars(cells: list[Cell]) -> list[Bar]:
    """Return the bars that are about single cells."""

    def bar(text: str, about: list[Cell], holds: Any) -> Bar:
        return Bar(text, about, [cell for cell in about if not holds(cell)])

    compared = [cell for cell in cells if cell.of_best is not None]
    cheap = [cell for cell in compared if (cell.cost_of_8 or 99) <= CHEAP]
    smol = [cell for cell in cells if cell.key[0] == "smollm2" and cell.key[2:] == ["fp32", "1", "0", "eager"]]
    goals = {"math": 1.15, "chat": 1.0, "code": 1.0}
    named = [cell for cell in smol if cell.key[1] in goals]
    readme = [cell for cell in cells if cell.key[1] == "readme"]
    exact = [cell for cell in cells if cell.key[2] == "fp32"]
    return [
        bar(f"later calls: at least {LATER} of ordinary decoding", cells, lambda cell: cell.later >= LATER),
        bar(
            f"first call, eager: at least {FIRST} of ordinary decoding",
            [cell for cell in cells if cell.first is not None],
            lambda cell: cell.first >= FIRST,
        ),
        bar(
            f"at least {OF_BEST} of the best fixed setting, where 8 slots cost at most {CHEAP} times one slot",
            cheap,
            lambda cell: cell.of_best >= OF_BEST,
        ),
        bar(
            "SmolLM2, fp32, greedy, one row: at least 1.0 of the best fixed setting",
            [cell for cell in smol if cell in compared],
            lambda cell: cell.of_best >= 1,
        ),
        bar(
            "SmolLM2, fp32: at least 1.15 of ordinary decoding on math, 1.0 on chat and code",
            named,
            lambda cell: cell.later >= goals[cell.key[1]],
        ),
        bar(
            f"README's first lines, Qwen in bf16: at least {LATER} of ordinary decoding",
            readme,
            lambda cell: cell.later >= LATER,
        ),
        bar("fp32: every text is that of ordinary decoding", exact, is_identical),
    ]


def is_identical(cell: Cell) -> bool:
    """Return whether all texts of the default call are those of ordinary decoding."""
    compared = [m.agreement for m in cell.results.measurements if m.agreement is not None]
    return all(one.identical == one.total for one in compared)


def bar_table(cells: list[Cell]) -> str:
    """Return the table of the bars, with the number of cells that hold."""
    rows = [[bar.text, f"{len(bar.cells) - len(bar.short)} of {len(bar.cells)}"] for bar in bars(cells)]
    ratios = [cell.of_best for cell in cells if cell.of_best is not None]
    if ratios:
        middle = statistics.median(ratios)
        rows.append(["at least 0.95 of the best fixed setting in the median of the cells", decimal(middle)])
    return table(["bar", "cells that hold"], rows)


def short_table(cells: list[Cell]) -> str | None:
    """Return the table of cells that fall short, with the reason; None if there are none."""
    names: dict[str, list[str]] = {}
    for bar in bars(cells):
        for cell in bar.short:
            names.setdefault(cell.name, []).append(bar.text.split(":")[0])
    rows = [[name, "; ".join(short), REASONS.get(name, "not examined")] for name, short in names.items()]
    return table(["cell", "falls short in", "reason"], rows) if rows else None


def before_table(cells: list[Cell], before: dict[str, Cell]) -> str:
    """Return the table of the default call before it adapted its steps."""
    now = {cell.name: cell for cell in cells}
    rows = [
        [*cell.key, decimal(cell.later), decimal(now[name].later if name in now else None), identical(cell.ours)]
        for name, cell in before.items()
    ]
    return table([*HEAD, "before", "now", "identical before"], rows)


def sources(cells: list[Cell], before: dict[str, Cell]) -> list[str]:
    """Return where the cells were measured: one line for each model, dtype and revision."""
    lines = {}
    for cell in [*cells, *before.values()]:
        results = cell.results
        key = (results.model, results.dtype, results.software.git_revision)
        lines.setdefault(key, source(results))
    return list(lines.values())


def one_slot() -> dict[str, Any]:
    """Return what the page shows of steps of one slot."""
    now = document("one_slot")
    earlier = document("one_slot-before") if (RESULTS / "one_slot-before.json").exists() else None
    rows = []
    for cost in now.costs:
        case, _, what = cost.name.partition(": ")
        rows.append(
            [case, what, decimal(before_factor(earlier, cost), 3), decimal(cost.factor, 3), decimal(cost.value, 1)]
        )
    return {
        "source": source(now),
        "table": table(["case", "", "before", "ratio to ordinary decoding", "value"], rows),
        "before": None if earlier is None else earlier.software.git_revision,
    }


def before_factor(earlier: Results | None, cost: Cost) -> float | None:
    """Return the factor of the cost of the same name in an earlier document, or None."""
    found = [] if earlier is None else earlier.costs
    return next((one.factor for one in found if one.name == cost.name), None)
