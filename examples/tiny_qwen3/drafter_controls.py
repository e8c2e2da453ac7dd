"""Controls of drafter training: change one thing of the short recipe at a time, train, and measure.

    python examples/tiny_qwen3/drafter_controls.py --output-dir examples/benchmarks/results/drafter [NAME ...]

The script needs the files that the stages collect and pack of examples/recipes/tiny_qwen3_drafter.yaml write. Each
variation trains and measures, and writes its JSON document before the next one starts. A variation that already has a
document is skipped. Baseline: the variation `short`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Relative to the root, where the stages run, because documents record the command.
RECIPE = "examples/recipes/tiny_qwen3_drafter_short.yaml"
MUON = "--muon_learning_rate 8e-3"
VARIATIONS = {
    "short": MUON,
    "constant-draft": f"{MUON} --constant_draft 1",  # plain multi-token prediction
    "soft-targets": f"{MUON} --targets soft",
    "rank-16": f"{MUON} --lora_r 16",
    "rank-32": f"{MUON} --lora_r 32",
    "no-decay": f"{MUON} --position_decay 1",
    "one-step": f"{MUON} --steps_per_window 1 --windows_per_text 15",
    "six-steps": f"{MUON} --steps_per_window 6 --windows_per_text 3",
    "adamw": "",
}


def stage(name: str, *arguments: str) -> None:
    """Run one stage, a verb of the command line."""
    subprocess.run([sys.executable, "-m", "jacobi_hf.cli", name, "--config", RECIPE, *arguments], cwd=ROOT, check=True)


def run(name: str, seed: str, out: Path) -> None:
    """Train and measure one variation, and write its document to `out`."""
    folder = f"build/forcing/drafter/controls/{name}-seed{seed}"
    stage("train", "--output_dir", folder, "--seed", seed, *VARIATIONS[name].split())
    stage("bench", "--drafter", f"{folder}/final", "--name", f"control {name}", "--output", os.path.relpath(out, ROOT))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(VARIATIONS)} (default: all)")
    parser.add_argument("--output-dir", required=True, help="folder for the JSON documents")
    parser.add_argument("--seed", default="42")
    options = parser.parse_args()
    for name in options.names or VARIATIONS:
        out = Path(options.output_dir).resolve() / f"control-{name}-seed{options.seed}.json"
        if not out.is_file():
            run(name, options.seed, out)
        print(out)


if __name__ == "__main__":
    main()
