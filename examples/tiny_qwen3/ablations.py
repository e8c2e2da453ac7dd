"""Ablations: one factor at a time, by the short recipe.

    python examples/tiny_qwen3/ablations.py --output-dir examples/benchmarks/results/forcing [NAME ...]

Needs what `collect` of examples/recipes/tiny_qwen3_cpu.yaml wrote. Each variation packs, trains and evaluates on its own, and its results
document is finished before the next one starts; those already there are left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, RECIPE = ROOT / "examples" / "train_jacobi_forcing.py", ROOT / "examples" / "recipes" / "tiny_qwen3_short.yaml"

# name: (arguments of pack, arguments of train)
VARIATIONS: dict[str, tuple[str, str]] = {
    "short": ("", ""),
    "noisy-context": ("", "--context noisy"),
    "window-context": ("", "--context window --window 2"),
    "fixed-phase": ("--phase fixed", ""),
    "ar-weight-10": ("", "--ar_loss_weight 10"),
    "block-sum": ("", "--consistency_reduction block_sum"),
    "reference-reduction": ("", "--consistency_reduction reference"),
    "no-replay": ("", "--replay_ratio 0"),
    "all-noise-levels": ("--min_noise 0", ""),
    "reference-bundle": (
        "--phase fixed --min_noise 0 --window 16",
        "--context noisy --ar_loss_weight 10 --consistency_reduction reference --replay_ratio 0",
    ),
    "ar-only": ("", "--consistency_loss_weight 0"),
}


def stage(name: str, *arguments: str) -> None:
    """One stage of the example script."""
    subprocess.run([sys.executable, str(SCRIPT), name, "--config", str(RECIPE), *arguments], cwd=ROOT, check=True)  # noqa: S603


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help=f"of {', '.join(VARIATIONS)}; all when none is given")
    parser.add_argument("--output-dir", required=True, help="folder of the results documents")
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    for name in options.names or VARIATIONS:
        out = Path(options.output_dir) / f"ablation-{name}-seed{options.seed}.json"
        if out.is_file():
            continue
        pack, train = (arguments.split() for arguments in VARIATIONS[name])
        build = f"build/forcing/ablations/{name}-seed{options.seed}"
        stage("pack", "--output_dir", f"{build}/packed", "--seed", options.seed, *pack)
        stage("train", "--train_dataset", f"{build}/packed", "--output_dir", f"{build}/model", "--seed", options.seed, *train)
        stage("evaluate", "--model", f"{build}/model/final", "--name", f"ablation {name}", "--output", str(out))


if __name__ == "__main__":
    main()
