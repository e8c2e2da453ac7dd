"""The record of a finished run, for its results and its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacobi_hf.results.training import Batch, LossWeights, Training, TrainingData, TrainingDrafts
from jacobi_hf.trainer.drafter.config import DrafterConfig
from jacobi_hf.trainer.forcing.config import JacobiForcingConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jacobi_hf.trainer.base_config import BaseConfig

# Arguments that have a field of their own in `Training`, and those of the run's length, which its steps and epochs
# give.
_TYPED = (
    "block_size",
    "window_width",
    "windows_per_text",
    "steps_per_window",
    "learning_rate",
    "lr_scheduler_type",
    "muon_learning_rate",
    "optim",
    "consistency_loss_weight",
    "ar_loss_weight",
    "replay_loss_weight",
    "kl_loss_weight",
    "bf16",
    "fp16",
    "seed",
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
)


def training_facts(
    args: BaseConfig,
    *,
    base_model: str,
    train_dataset: str,
    packed: Mapping[str, Any] | None = None,
    replay_dataset: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Training:
    """Return the record of a run as one stage of a model's training.

    Args:
        args: the trainer's arguments.
        base_model: name or path of the model that the run began from.
        train_dataset: name or path of the packed records.
        packed: the settings in their manifest, if they have one.
        replay_dataset: name or path of the replay that was mixed in.
        arguments: arguments of the run by name. Those without a field of their own become `Training.arguments`.
        facts: the other fields of `Training`: steps, epochs, slots, minutes, weights_dtype, and what else is known.
    """
    data = _sources(train_dataset, packed)
    if replay_dataset is not None:
        data.append(TrainingData(name="replay", source=replay_dataset))
    return Training(
        method=_method(args),  # type: ignore[arg-type]
        base_model=base_model,
        data=data,
        strategy=_strategy(args, packed),
        optimizer="muon" if args.muon_learning_rate is not None else str(getattr(args.optim, "value", args.optim)),
        learning_rate=args.learning_rate,
        muon_learning_rate=args.muon_learning_rate,
        schedule=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        batch=Batch(
            devices=args.world_size,
            per_device=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
        ),
        precision="bf16" if args.bf16 else "fp32",
        loss_weights=_loss_weights(args) if isinstance(args, JacobiForcingConfig) else None,
        seed=args.seed,
        arguments={
            name: value for name, value in (arguments or {}).items() if name not in _TYPED and value is not None
        },
        **facts,
    )


def stages_of(model: str) -> list[Training]:
    """Return the stages of training that a model's or drafter's folder records in `forcing.json`; empty without one.

    Raises:
        ValueError: the file cannot be read.
    """
    file = Path(model) / "forcing.json"
    if not file.is_file():
        return []
    try:
        stages = json.loads(file.read_text(encoding="utf-8")).get("training", [])
        return [Training.model_validate(stage) for stage in stages]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no record of a run that this version can read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return the part of an error that says what is wrong: of pydantic's, the first message with its place."""
    found = getattr(error, "errors", None)
    if found is None:
        return str(error).splitlines()[0]
    first = found()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _method(args: BaseConfig) -> str:
    """Return the method of a run; finetuning without a consistency loss is supervised finetuning."""
    is_supervised = isinstance(args, JacobiForcingConfig) and not args.consistency_loss_weight
    return "sft" if is_supervised else args.method


def _sources(train_dataset: str, packed: Mapping[str, Any] | None) -> list[TrainingData]:
    """Return the prompts that were collected from, or the records themselves if no manifest names any."""
    collected = (packed or {}).get("of") or {}
    found = [
        TrainingData(name=one["name"], source=one["dataset"], samples=one["prompts"]) for one in collected.values()
    ]
    return found or [TrainingData(name="packed", source=train_dataset)]


def _strategy(args: BaseConfig, packed: Mapping[str, Any] | None) -> TrainingDrafts | None:
    """Return how the drafts were made; None for a finetuned model whose records have no manifest."""
    if isinstance(args, DrafterConfig):
        return TrainingDrafts(
            schedule="drafter",
            window_width=args.window_width,
            windows_per_text=args.windows_per_text,
            steps_per_window=args.steps_per_window,
        )
    if packed is None:
        return None
    names = ("noise_levels", "min_noise", "max_noise", "phase", "visits", "views")
    same: dict[str, Any] = {name: packed.get(name) for name in names}
    return TrainingDrafts(schedule=packed["schedule"], block_size=getattr(args, "block_size", None), **same)


def _loss_weights(args: JacobiForcingConfig) -> LossWeights:
    return LossWeights(
        consistency=args.consistency_loss_weight,
        ar=args.ar_loss_weight,
        replay=args.replay_loss_weight,
        kl=args.kl_loss_weight,
    )
