"""`jacobi-hf collect`: a model's own Jacobi trajectories."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from jacobi_hf.cli._options import check_folder, errors_in_one_line, need

if TYPE_CHECKING:
    from jacobi_hf.cli._recipes import Given
    from jacobi_hf.trainer.data.collection import CollectConfig


def collect(context: typer.Context) -> None:
    """Let a model answer prompts, and write down the states that Jacobi decoding of its answers goes through.

    A recipe's section may hold `sets`, a section of its own per set of prompts. Under `accelerate launch -m jacobi_hf.cli` or torchrun, the
    processes share the work. Interrupted, it goes on when it is run again.
    """
    with errors_in_one_line("collect") as ending:
        need("train", "datasets", "filelock")
        from datasets import disable_progress_bars

        from jacobi_hf.cli import _recipes as recipes
        from jacobi_hf.trainer.data.collection import CollectConfig
        from jacobi_hf.trainer.data.shards import leave_together, processes

        given = recipes.given(context, CollectConfig)
        sets = configs(given)
        ending.kept = lambda: (
            f"finished shards are kept in {', '.join(config.output_dir for config in sets)}; the same command goes on from there"
        )
        disable_progress_bars()  # one for each shard, across that of the prompts
        counts = _run(sets)
        if processes().is_main_process:
            typer.echo(json.dumps(counts, indent=1) if given.as_json else "\n".join(map(_in_words, counts)))
        leave_together()


def configs(given: Given) -> list[CollectConfig]:
    """The set of prompts that the arguments describe, or each of the recipe's `sets`; checked as far as goes without reading anything.

    Raises:
        ValueError: what is missing or wrong.
    """
    from jacobi_hf.cli._recipes import demand
    from jacobi_hf.loading import check_dtype
    from jacobi_hf.trainer.data.collection import CollectConfig

    sets = given.section.pop("sets", None) or {None: {}}
    if not isinstance(sets, dict) or not all(isinstance(own, dict) for own in sets.values()):
        raise ValueError("the recipe's sets have to be sections by name, each with the options that are its own.")
    named = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in given.words if word.startswith("--")}
    if len(sets) > 1 and named & {"output_dir", "dataset", "name"}:
        raise ValueError(
            "the recipe has several sets, each with its own dataset, name and output_dir: change those in the recipe."
        )
    found = []
    for name, own in sets.items():
        (config,) = given.parse(CollectConfig, more={**({"name": name} if name else {}), **own})
        demand(config, "collect", "model", "dataset", "output_dir")
        check_dtype(config.dtype)
        check_folder(config.output_dir)
        found.append(config)
    return found


def _run(sets: list[CollectConfig]) -> list[dict[str, Any]]:
    """Collect each set; all datasets are opened, and all models looked for, before the first one is collected."""
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
        f"{counts['output_dir']}: {counts['rows']} trajectories of {counts['prompts']} prompts, {counts['tokens']} tokens, "
        f"{per_forward:.2f} per forward of plain Jacobi decoding."
    )
