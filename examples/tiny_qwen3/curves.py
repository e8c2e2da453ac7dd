"""Draw the training curves of a forced checkpoint from the logs in the forcing.json of its stages.

python examples/tiny_qwen3/curves.py examples/tiny_qwen3/forced/forcing{-stage1,}.json docs/images/forcing.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

CURVES = {
    "consistency_loss": "consistency loss",
    "agreement": "agreement",
    "kl_loss": "KL from the base",
    "replay_loss": "AR loss on replay",
}


def smoothed(values: list[float], over: int) -> list[float]:
    """Return for each value the mean of the last `over` values."""
    return [sum(values[max(0, i + 1 - over) : i + 1]) / min(over, i + 1) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    log: list[dict[str, float]] = []
    for report in options.reports:
        before = log[-1]["step"] if log else 0
        entries = json.loads(report.read_text(encoding="utf-8"))["log"]
        log += [{**entry, "step": before + entry["step"]} for entry in entries if "consistency_loss" in entry]
    figure = Figure(figsize=(13, 3), layout="constrained")
    for number, (key, title) in enumerate(CURVES.items(), 1):
        axes = figure.add_subplot(1, len(CURVES), number)
        steps, values = zip(*((entry["step"], entry[key]) for entry in log if key in entry), strict=True)
        axes.plot(steps, values, color="#cccccc", linewidth=0.8)
        axes.plot(steps, smoothed(list(values), 8), color="#2a7f9e")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
    figure.savefig(options.picture, dpi=100)
    print(options.picture)


if __name__ == "__main__":
    main()
