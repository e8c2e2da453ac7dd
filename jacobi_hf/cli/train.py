"""`jacobi-hf train`: train a model or a drafter."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys

import typer

from jacobi_hf.cli._options import check_folder, errors_in_one_line, need


def train(context: typer.Context) -> None:
    """Finetune a model on its own packed trajectories, or with `--method drafter` train a drafter for it.

    The finished model or drafter is OUTPUT_DIR/final. After an interruption, the same command continues from the last
    checkpoint. For several processes: `accelerate launch [--config_file ..] -m jacobi_hf.cli train ..`.
    """
    with errors_in_one_line("train") as ending:
        need("train", "datasets", "filelock", "peft")
        from jacobi_hf.cli import _recipes as recipes
        from jacobi_hf.loading import check_config, check_dtype
        from jacobi_hf.results.environment import without_secrets
        from jacobi_hf.trainer.checkpoints import last_finished_checkpoint
        from jacobi_hf.trainer.data.shards import leave_together
        from jacobi_hf.trainer.run import CONFIGS, RunConfig, config_class
        from jacobi_hf.trainer.run import train as run

        given = recipes.given(context, RunConfig, *CONFIGS.values())
        kind = config_class(given.value_of("method", RunConfig.method))
        config, args = given.parse(RunConfig, kind)
        recipes.demand(config, "train", "model", "train_dataset")
        for dtype in (config.dtype, config.save_dtype):
            check_dtype(dtype)
        check_folder(args.output_dir)
        for name in filter(None, (config.model, config.ref_model)):
            check_config(name)

        def kept() -> str:
            checkpoint = last_finished_checkpoint(args.output_dir)
            return (
                f"{checkpoint} is kept; the same command goes on from there"
                if checkpoint
                else "no checkpoint has been written yet"
            )

        ending.kept = kept
        # Trainer logs to stdout, where a program that asks for JSON expects JSON alone.
        with contextlib.redirect_stdout(sys.stderr) if given.as_json else contextlib.nullcontext():
            finished = run(config, args, f"jacobi-hf train {shlex.join(without_secrets(context.args))}")
        if args.process_index == 0:
            facts = {"minutes": finished.minutes, "steps": finished.steps, "saved": str(finished.folder)}
            done = "is finished already" if finished.was_finished else "is finished"
            words = f"{finished.folder} {done}: {finished.steps} steps, {finished.minutes:.1f} minutes."
            typer.echo(json.dumps(facts) if given.as_json else words)
        leave_together()
