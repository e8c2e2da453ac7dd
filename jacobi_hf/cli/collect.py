"""`jacobi-hf collect`: collect a model's own Jacobi trajectories."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from jacobi_hf.cli._errors import check_folder, need
from jacobi_hf.cli._options import verb

if TYPE_CHECKING:
    from jacobi_hf.cli._recipes import Call
    from jacobi_hf.trainer.data.collect_options import CollectConfig


def _kinds() -> tuple[type, ...]:
    from jacobi_hf.trainer.data.collect_options import CollectConfig

    return (CollectConfig,)


@verb(_kinds, json=True)
def collect(call: Call) -> None:
    """Let a model answer prompts, and write the states that Jacobi decoding of its answers passes through.

    A recipe's section may hold `sets`, with a section of its own for each set of prompts. Under `accelerate launch -m
    jacobi_hf.cli` or torchrun, the processes share the work. An interrupted run goes on when it is run again.
    """
    sets = configs(call)
    need("train", "datasets", "filelock")
    from datasets import disable_progress_bars

    from jacobi_hf.loading import check_dtype
    from jacobi_hf.trainer.data.shards import leave_together, processes

    for config in sets:
        check_dtype(config.dtype)
    folders = ", ".join(config.output_dir for config in sets)
    call.ending.kept = lambda: f"finished shards are kept in {folders}; the same command goes on from there"
    disable_progress_bars()  # one for each shard, across that of the prompts
    counts = _run(sets)
    if processes().is_main_process:
        typer.echo(json.dumps(counts, indent=1) if call.as_json else "\n".join(map(_in_words, counts)))
    leave_together()


def configs(call: Call) -> list[CollectConfig]:
    """Return the set of prompts that the options describe, or each of the recipe's `sets`. No prompt is read.

    Raises:
        ValueError: Options are missing or wrong.
    """
    from jacobi_hf.cli._recipes import demand

    sets = call.section.pop("sets", None) or {None: {}}
    if not isinstance(sets, dict) or not all(isinstance(own, dict) for own in sets.values()):
        raise ValueError("the recipe's sets must be sections by name, each with options of its own.")
    named = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in call.words if word.startswith("--")}
    if len(sets) > 1 and named & {"output_dir", "dataset", "name"}:
        raise ValueError(
            "the recipe has several sets, each with its own dataset, name and output_dir: change those in the recipe."
        )
    found = []
    for name, own in sets.items():
        (config,) = call.parse(more={**({"name": name} if name else {}), **own})
        demand(config, "collect", "model", "dataset", "output_dir")
        check_folder(config.output_dir)
        found.append(config)
    return found


def _run(sets: list[CollectConfig]) -> list[dict[str, Any]]:
    """Collect each set. Before the first one, all datasets are opened and all models' configurations are read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jacobi_hf.loading import check_config
    from jacobi_hf.trainer.data.collection import collect as collect_set
    from jacobi_hf.trainer.data.loading import open_dataset
    from jacobi_hf.trainer.data.shards import processes

    rows = [open_dataset(config.dataset, config.split) for config in sets]
    for config in sets:
        check_config(config.model, config.revision)
    counts = []
    for config, prompts in zip(sets, rows, strict=True):
        tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision)
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype, revision=config.revision).eval()
        totals = collect_set(model.to(processes().device), tokenizer, config, prompts)
        counts.append({"set": config.name, "output_dir": config.output_dir, **totals})
    return counts


def _in_words(counts: dict[str, Any]) -> str:
    per_forward = counts["tokens"] / max(1, counts["forwards"])
    return (
        f"{counts['output_dir']}: {counts['rows']} trajectories of {counts['prompts']} prompts, "
        f"{counts['tokens']} tokens, {per_forward:.2f} per forward of plain Jacobi decoding."
    )
