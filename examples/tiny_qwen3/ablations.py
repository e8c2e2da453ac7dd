"""Ablations of Jacobi Forcing: change one thing of the short recipe at a time, train, and measure.

    python examples/tiny_qwen3/ablations.py --output-dir examples/benchmarks/results/forcing [NAME ...]

The script needs the files that `forcing_data.py` writes to build/forcing. It collects trajectories of the base first;
all variations use them. Then each variation packs, trains and measures, and writes its JSON document before the next
one starts. A variation that already has a document is skipped. Baseline: the variation `short`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Relative to the root, where the stages run, because documents record the command.
RECIPE = "examples/recipes/tiny_qwen3_short.yaml"
BASE = "examples/tiny_qwen3/checkpoint"
# Prompts of each domain for the trajectories of the base, and for those of a second stage.
FIRST_PROMPTS = {"arithmetic": 7000, "code": 3000}
SECOND_PROMPTS = {"arithmetic": 1000, "code": 1000}
# In place of KL: cross entropy on the model's own answers and on replay, as in published recipes.
CROSS_ENTROPY = "--kl_loss_weight 0 --ar_loss_weight 1 --replay_loss_weight 4"


@dataclass(frozen=True)
class Variation:
    """Extra arguments of the stages of one variation.

    Attributes:
        second_stage: block size of a second stage, which starts from the model of `short` and its trajectories; None
            for no second stage.
    """

    collect: str = ""
    pack: str = ""
    train: str = ""
    second_stage: int | None = None


VARIATIONS = {
    "short": Variation(),
    "cross-entropy-for-kl": Variation(train=CROSS_ENTROPY),
    "noisy-context": Variation(train="--context noisy"),
    "window-context": Variation(train="--context window --context_window 2"),
    "fixed-phase": Variation(
        pack="--phase fixed --views 1"
    ),  # compare with one-view: with a fixed phase, all views are equal
    "no-replay": Variation(train="--replay_ratio 0"),
    "ar-weight-3": Variation(train="--ar_loss_weight 3"),
    "all-noise-levels": Variation(pack="--min_noise 0"),
    "one-view": Variation(pack="--views 1"),
    "block-sum": Variation(train="--consistency_reduction block_sum"),
    "reference-reduction": Variation(train="--consistency_reduction reference"),
    "kl-weight-2": Variation(train="--kl_loss_weight 2"),
    "reference-bundle": Variation(
        pack="--phase fixed --min_noise 0 --noise_levels 16 --views 1",
        train="--kl_loss_weight 0 --context noisy --ar_loss_weight 10 --consistency_reduction reference "
        "--replay_ratio 0",
    ),
    "ar-only": Variation(train=f"--consistency_loss_weight 0 {CROSS_ENTROPY}"),
    "second-stage": Variation(second_stage=16),
    "second-stage-random-start": Variation(collect="--random_start true", second_stage=16),
    "second-stage-n32": Variation(second_stage=32),
    "muon": Variation(train="--muon_learning_rate 5e-3"),
    "twice-the-steps": Variation(train="--max_steps 400"),
}


def stage(name: str, *arguments: str) -> None:
    """Run one stage, a verb of the command line."""
    subprocess.run([sys.executable, "-m", "jacobi_hf.cli", name, "--config", RECIPE, *arguments], cwd=ROOT, check=True)


def collect(model: str, build: str, prompts: dict[str, int], *arguments: str) -> list[str]:
    """Collect trajectories of a model on each domain, and return their folders below `build`."""
    folders = [f"{build}/trajectories/{domain}" for domain in prompts]
    for (domain, limit), folder in zip(prompts.items(), folders, strict=True):
        data = ("--name", domain, "--dataset", f"build/forcing/{domain}.jsonl", "--limit", str(limit))
        stage("collect", "--model", model, *data, "--output_dir", folder, *arguments)
    return folders


def run(name: str, seed: str, out: Path) -> None:
    """Pack, train and measure one variation, and write its document to `out`."""
    variation = VARIATIONS[name]
    build = f"build/forcing/ablations/{name}-seed{seed}"
    pack = variation.pack.split()
    train = variation.train.split()
    if variation.second_stage:
        first = f"build/forcing/ablations/short-seed{seed}/model/final"
        blocks = ("--block_size", str(variation.second_stage))
        if not (ROOT / first).is_dir():
            raise FileNotFoundError(
                f"{name} starts from {first}, which is missing. Run the variation short with this seed first."
            )
        pack += ["--sources", *collect(first, build, SECOND_PROMPTS, *blocks, *variation.collect.split())]
        train += ["--model", first, "--ref_model", BASE, *blocks]
    stage("pack", "--output_dir", f"{build}/packed", "--seed", seed, *pack)
    stage("train", "--train_dataset", f"{build}/packed", "--output_dir", f"{build}/model", "--seed", seed, *train)
    stage(
        "bench",
        "--model",
        f"{build}/model/final",
        "--name",
        f"ablation {name}",
        "--output",
        os.path.relpath(out, ROOT),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(VARIATIONS)} (default: all)")
    parser.add_argument("--output-dir", required=True, help="folder for the JSON documents")
    parser.add_argument("--seed", default="42")
    options = parser.parse_args()
    collect(BASE, "build/forcing/ablations", FIRST_PROMPTS)
    for name in options.names or VARIATIONS:
        out = Path(options.output_dir).resolve() / f"ablation-{name}-seed{options.seed}.json"
        if not out.is_file():
            run(name, options.seed, out)
        print(out)


if __name__ == "__main__":
    main()
