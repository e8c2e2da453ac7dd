"""`run.json`: the arguments that a run was started with, and its time, so that an interrupted run can go on."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from jacobi_hf.resume import Progress
from jacobi_hf.trainer.checkpoints import last_finished_checkpoint
from jacobi_hf.trainer.run_checks import packed_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jacobi_hf.trainer.base_config import BaseConfig
    from jacobi_hf.trainer.method_options import RunConfig

# Arguments of `TrainingArguments` that change the trained weights by more than rounding.
_DECISIVE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_steps",
    "num_train_epochs",
    "seed",
    "data_seed",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
)


def decisive_arguments(config: RunConfig, args: BaseConfig) -> dict[str, Any]:
    """Return every argument, by name, that changes the trained weights by more than rounding, as plain JSON values."""
    own = {name: getattr(args, name) for name in (*args.own_arguments(), *_DECISIVE)}
    known = {**asdict(config), **own, "packed": packed_settings(config.train_dataset)}
    plain: dict[str, Any] = json.loads(json.dumps(known, default=str))
    return plain


class RunState(TrainerCallback):
    """The record of a run, in `run.json` beside its checkpoints: its arguments, and its minutes at each checkpoint.

    Args:
        folder: the run's output folder.
        arguments: the run's `decisive_arguments`.

    Raises:
        ValueError: the folder holds a run with other arguments, or checkpoints of another program.
    """

    def __init__(self, folder: str, arguments: Mapping[str, Any]) -> None:
        self._began = time.perf_counter()
        self._progress = Progress(Path(folder) / "run.json", arguments, place=folder, option="output_dir")
        if not self._progress.file.is_file() and last_finished_checkpoint(folder):
            raise ValueError(f"{folder} holds checkpoints of another program: choose another output_dir.")
        self._minutes_before = max((part["minutes"] for part in self._progress.parts.values()), default=0.0)

    @property
    def minutes(self) -> float:
        """Minutes that the run has taken, interruptions left out."""
        return self._minutes_before + (time.perf_counter() - self._began) / 60

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the file before there is any checkpoint."""
        if state.is_world_process_zero:
            self._progress.begin()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add a checkpoint, with the minutes up to it."""
        if state.is_world_process_zero:
            self._progress.add(f"checkpoint-{state.global_step}", {"minutes": self.minutes})
