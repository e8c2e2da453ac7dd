"""`jacobi-hf train`: train a model with Jacobi Forcing, or a drafter."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from typing import TYPE_CHECKING

import typer

from jacobi_hf.cli._errors import check_folder, need
from jacobi_hf.cli._options import verb

if TYPE_CHECKING:
    from jacobi_hf.cli._recipes import Call


def _kinds() -> tuple[type, ...]:
    from jacobi_hf.cli._training import of_method
    from jacobi_hf.trainer.method_options import METHODS, RunConfig

    return RunConfig, *map(of_method, METHODS)


@verb(_kinds, json=True)
def train(call: Call) -> None:
    """Finetune a model on its own packed trajectories, or with `--method drafter` train a drafter for it.

    The finished model or drafter is OUTPUT_DIR/final. After an interruption, the same command continues from the last
    checkpoint. For several processes: `accelerate launch [--config_file ..] -m jacobi_hf.cli train ..`.
    """
    from jacobi_hf.cli._recipes import demand
    from jacobi_hf.cli._training import of_method
    from jacobi_hf.trainer.method_options import RunConfig, check_method

    method = call.value_of("method", RunConfig.method)
    check_method(method)
    config, _ = call.parse(RunConfig, of_method(method))  # errors in names and types, before torch is imported
    demand(config, "train", "model", "train_dataset")
    need("train", "datasets", "filelock", "peft")
    from jacobi_hf.loading import check_config, check_dtype
    from jacobi_hf.results.environment import without_secrets
    from jacobi_hf.trainer.data.shards import leave_together
    from jacobi_hf.trainer.run import config_class
    from jacobi_hf.trainer.run import train as run

    config, args = call.parse(RunConfig, config_class(method))
    for dtype in (config.dtype, config.save_dtype):
        check_dtype(dtype)
    check_folder(args.output_dir)
    for name in filter(None, (config.model, config.ref_model)):
        check_config(name)
    call.ending.kept = lambda: _kept(args.output_dir)
    # Trainer logs to stdout, which must hold nothing but the JSON document.
    with contextlib.redirect_stdout(sys.stderr) if call.as_json else contextlib.nullcontext():
        finished = run(config, args, f"jacobi-hf train {shlex.join(without_secrets(call.line))}")
    if args.process_index == 0:
        figures = {"minutes": finished.minutes, "steps": finished.steps, "saved": str(finished.folder)}
        state = "is finished already" if finished.was_finished else "is finished"
        words = f"{finished.folder} {state}: {finished.steps} steps, {finished.minutes:.1f} minutes."
        typer.echo(json.dumps(figures) if call.as_json else words)
    leave_together()


def _kept(folder: str) -> str:
    from jacobi_hf.trainer.checkpoints import last_finished_checkpoint

    checkpoint = last_finished_checkpoint(folder)
    if checkpoint is None:
        return "no checkpoint has been written yet"
    return f"{checkpoint} is kept; the same command goes on from there"
