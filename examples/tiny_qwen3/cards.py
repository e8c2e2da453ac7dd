"""Write the model cards of the tiny forced model and of the tiny drafter from the committed results.

    python examples/tiny_qwen3/cards.py

`examples/tiny_qwen3/publish.py` publishes with the same inputs, under the names of the user's repositories.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jacobi_hf.hub_cards.card import generate_model_card

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results"
BASE = "jacobi-hf/tiny-qwen3"
COMMON: dict[str, Any] = {"license": "apache-2.0", "language": "en", "prompt": "def quicksort(items):"}

# The inputs of each card, by the folder that it describes.
INPUTS: dict[str, dict[str, Any]] = {
    "forced": {
        "results": [
            RESULTS / "peers.json",
            RESULTS / "forcing" / "forced-seed42.json",
            RESULTS / "cards" / "forced-eval.json",
            RESULTS / "forcing" / "base.json",
        ],
        "repo_id": "jacobi-hf/tiny-qwen3-forced",
        "base_model": BASE,
        "measured_as": ("forced", "forced-seed42", "examples/tiny_qwen3/forced"),
        "base_measured_as": "base",
        "decoders": ("autotuned", "autotuned-compiled", "multiblock-both", "jacobi_multiblock"),
        **COMMON,
    },
    "drafter": {
        "results": [
            RESULTS / "peers.json",
            RESULTS / "drafter" / "drafter-seed42.json",
            RESULTS / "forcing" / "base.json",
            RESULTS / "cards" / "drafter-eval.json",
        ],
        "repo_id": "jacobi-hf/tiny-qwen3-drafter",
        "base_model": BASE,
        "measured_as": ("base + drafter", "base", "examples/tiny_qwen3/checkpoint"),
        "decoders": (
            "autotuned",
            "autotuned-compiled",
            "window-n2-K8-r0-auto",
            "multiblock-both",
            "jacobi_multiblock",
        ),
        "drafter": True,
        **COMMON,
    },
}


def card(kind: str, **changes: Any) -> str:
    """Return the text of a card; `changes` replace inputs of the same name, such as `repo_id`."""
    return str(generate_model_card(**{**INPUTS[kind], **changes}))


def main() -> None:
    for kind in INPUTS:
        path = HERE / "cards" / f"{kind}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(card(kind), encoding="utf-8", newline="\n")
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
