"""Draw the training curves of a forced checkpoint from the log in its forcing.json.

python examples/tiny_qwen3/curves.py examples/tiny_qwen3/forced/forcing.json docs/images/forcing.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

CURVES = {
    "consistency_loss": "consistency loss",
    "agreement": "agreement",
    "ar_loss": "AR loss on own answers",
    "replay_loss": "AR loss on replay",
}


def smoothed(values: list[float], over: int) -> list[float]:
    """Mean over the last `over` values."""
    return [sum(values[max(0, i + 1 - over) : i + 1]) / min(over, i + 1) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    log = [entry for entry in json.loads(options.report.read_text(encoding="utf-8"))["log"] if "consistency_loss" in entry]
    figure = Figure(figsize=(13, 3), layout="constrained")
    for number, (key, title) in enumerate(CURVES.items(), 1):
        axes = figure.add_subplot(1, len(CURVES), number)
        steps, values = zip(*((entry["step"], entry[key]) for entry in log if key in entry), strict=True)
        axes.plot(steps, values, color="#cccccc", linewidth=0.8)
        axes.plot(steps, smoothed(list(values), 8), color="#2a7f9e")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
    figure.savefig(options.picture, dpi=100)


if __name__ == "__main__":
    main()
