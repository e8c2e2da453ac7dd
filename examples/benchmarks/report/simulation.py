"""The page on the simulation of adaptive steps: recorded texts on made-up machines."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from jacobi_hf.results.schema import Measurement

from .documents import document
from .tables import decimal, table

MEAN_REGRET = 3.0  # percent, of the medians over domains
CURVE_REGRET = 6.0
FIRST = 0.92
LATER = 0.97


def context() -> dict[str, Any]:
    """Return what the template shows."""
    results = document("adaptive_simulation")
    usual = [m for m in results.measurements if not m.extra["setting"]]
    models = list(dict.fromkeys(str(m.model) for m in usual))
    curves = list(dict.fromkeys(str(m.extra["curve"]) for m in usual))
    worst = max(usual, key=regret)
    where = f"{worst.model}, {worst.prompts.domain}, *{worst.extra['curve']}*"
    return {
        "command": results.command,
        "revision": results.software.git_revision,
        "created": results.created[:10],
        "calls": f"{sum(m.prompts.count * m.extra['sequences'] * m.extra['calls'] for m in results.measurements):,}",
        "bars": bar_table(usual, curves),
        "worst": f"{where}: {decimal(of_best(worst))} of its best fixed shape, `{worst.extra['best_option']}`",
        "speed": table(["step cost", *models], [[curve, *cells(usual, curve, models, speeds)] for curve in curves]),
        "of_best": table(["step cost", *models], [[curve, *cells(usual, curve, models, shares)] for curve in curves]),
        "varied": varied_table([m for m in results.measurements if m.extra["setting"]]),
        "changes": decimal(max(m.extra["changes"] for m in usual), 0),
    }


def later(m: Measurement) -> float:
    """Return the speed of later calls, relative to ordinary decoding."""
    return m.speedups[0].factor


def of_best(m: Measurement) -> float:
    """Return the speed of later calls, relative to the best fixed option."""
    return m.speedups[1].factor


def regret(m: Measurement) -> float:
    """Return how much longer later calls took than with the best fixed option, in percent; below 0 for a gain."""
    return 100 * (1 / of_best(m) - 1)


def group_regrets(measurements: Iterable[Measurement]) -> dict[tuple[str, str], float]:
    """Return the median regret over the domains, by model and curve; gains count as 0."""
    groups = defaultdict(list)
    for m in measurements:
        groups[str(m.model), str(m.extra["curve"])].append(regret(m))
    return {key: max(0.0, statistics.median(values)) for key, values in groups.items()}


def bar_table(usual: list[Measurement], curves: list[str]) -> str:
    """Return the table of the bars."""
    groups = group_regrets(usual)
    by_curve = {curve: statistics.mean(v for (_, c), v in groups.items() if c == curve) for curve in curves}
    dearest = max(by_curve, key=lambda curve: by_curve[curve])
    slow = min(usual, key=lambda m: m.extra["first_call"])
    low = min(usual, key=later)

    def named(m: Measurement) -> str:
        return f"{m.model}, {m.prompts.domain}, {m.extra['curve']}"

    rows = [
        ["mean regret", f"at most {MEAN_REGRET:.0f} %", f"{decimal(statistics.mean(groups.values()))} %", ""],
        ["regret on the worst machine", f"at most {CURVE_REGRET:.0f} %", f"{decimal(by_curve[dearest])} %", dearest],
        ["first call, worst cell", f"at least {FIRST}", decimal(slow.extra["first_call"], 3), named(slow)],
        ["later calls, worst cell", f"at least {LATER}", decimal(later(low), 3), named(low)],
    ]
    return table(["", "bar", "measured", "where"], rows)


def cells(
    usual: list[Measurement], curve: str, models: list[str], show: Callable[[list[Measurement]], str]
) -> list[str]:
    """Return what is shown of each model under a curve."""
    return [show([m for m in usual if (m.model, m.extra["curve"]) == (model, curve)]) for model in models]


def speeds(found: list[Measurement]) -> str:
    """Return the lowest speed of first calls, and lowest and median speed of later calls."""
    first = min(m.extra["first_call"] for m in found)
    return f"{decimal(first)}; {decimal(min(map(later, found)))}, {decimal(statistics.median(map(later, found)))}"


def shares(found: list[Measurement]) -> str:
    """Return the lowest and the median share of the best fixed option."""
    return f"{decimal(min(map(of_best, found)))}, {decimal(statistics.median(map(of_best, found)))}"


def varied_table(varied: list[Measurement]) -> str:
    """Return the table of the other settings, over all models and domains."""
    keys = list(dict.fromkeys((str(m.extra["setting"]), str(m.extra["curve"])) for m in varied))
    rows = []
    for setting, curve in keys:
        found = [m for m in varied if (m.extra["setting"], m.extra["curve"]) == (setting, curve)]
        rows.append([setting, curve, speeds(found), shares(found)])
    return table(["calls", "step cost", "of ordinary decoding", "of the best fixed shape"], rows)
