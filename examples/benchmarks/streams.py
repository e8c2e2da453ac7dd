"""Draw docs/images/streams.png: the attention mask of a step with a drafter.

python examples/benchmarks/streams.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

from jacobi_hf.attention.masks import attention_mask
from jacobi_hf.decoding.layout import build_layout

PATH = Path(__file__).resolve().parents[2] / "docs" / "images" / "streams.png"
TEXT = 3
WINDOW = 3
BRANCH = 2
DRAFT = 5


def main() -> None:
    layout = build_layout((WINDOW, BRANCH), torch.device("cpu"), DRAFT)
    columns = TEXT + layout.slots
    allowed_QK = attention_mask(layout, torch.tensor([TEXT]), torch.arange(columns))[0, 0]
    slots = [
        "pending",
        *(f"d{i + 1}" for i in range(WINDOW)),
        *(f"b{i + 1}" for i in range(BRANCH)),
        *(f"d{i + 1}'" for i in range(DRAFT)),
    ]
    is_draft_K = torch.arange(columns) >= columns - DRAFT
    colour_QK = torch.where(allowed_QK, torch.where(is_draft_K, 3, torch.where(torch.arange(columns) < TEXT, 1, 2)), 0)
    figure, axes = plt.subplots(figsize=(6.4, 5), layout="constrained")
    axes.imshow(colour_QK.numpy(), cmap=ListedColormap(["#ffffff", "#9aa5b1", "#2a7f9e", "#e07b39"]), vmin=0, vmax=3)
    axes.set_xticks(range(columns), [*(f"t{i + 1}" for i in range(TEXT)), *slots], rotation=90)
    axes.set_yticks(range(layout.slots), slots)
    axes.set_xticks([i - 0.5 for i in range(columns)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(layout.slots)], minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set(xlabel="key (grey: text, blue: verified stream, orange: draft stream)", ylabel="query")
    figure.savefig(PATH, dpi=110, metadata={"Software": None})
    print(PATH.name)


if __name__ == "__main__":
    main()
