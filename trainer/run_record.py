"""What a finished run was, for its results and its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacobi_hf.results.training import Batch, LossWeights, Training, TrainingData, TrainingDrafts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jacobi_hf.trainer.forcing.config import JacobiForcingConfig

# Arguments that have a field of their own in `Training`, and those of the length, which its steps and epochs say.
_TYPED = (
    "method",
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
    args: JacobiForcingConfig,
    *,
    base_model: str,
    train_dataset: str,
    packed: Mapping[str, Any] | None = None,
    replay_dataset: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Training:
    """The stage that a run with these arguments was.

    Args:
        args: the trainer's arguments.
        base_model: name or path of the model that the run began from.
        train_dataset: name or path of the packed records.
        packed: the settings in their manifest, where they have one.
        replay_dataset: name or path of what was mixed in.
        arguments: arguments of the run by name; those that have no field of their own are kept as `Training.arguments`.
        facts: the other fields of `Training`: steps, epochs, slots, minutes, weights_dtype, and what else is known.
    """
    method = "drafter" if args.method == "drafter" else "finetune" if args.consistency_loss_weight else "sft"
    data = _sources(train_dataset, packed)
    if replay_dataset is not None and method != "drafter":
        data.append(TrainingData(name="replay", source=replay_dataset))
    return Training(
        method=method,  # type: ignore[arg-type]
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
        loss_weights=None if method == "drafter" else _loss_weights(args),
        seed=args.seed,
        arguments={
            name: value for name, value in (arguments or {}).items() if name not in _TYPED and value is not None
        },
        **facts,
    )


def stages_of(model: str) -> list[Training]:
    """The stages that the model or drafter in a folder was trained in, as far as the folder says.

    Raises:
        ValueError: its `forcing.json` cannot be read.
    """
    file = Path(model) / "forcing.json"
    if not file.is_file():
        return []
    try:
        return [
            Training.model_validate(stage)
            for stage in json.loads(file.read_text(encoding="utf-8")).get("training", [])
        ]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file} is no record of a run that this version can read: {str(error).splitlines()[0]}"
        ) from None


def _sources(train_dataset: str, packed: Mapping[str, Any] | None) -> list[TrainingData]:
    """What was collected from, or the records themselves where nothing says."""
    collected = (packed or {}).get("of") or {}
    found = [
        TrainingData(name=one["name"], source=one["dataset"], samples=one["prompts"]) for one in collected.values()
    ]
    return found or [TrainingData(name="packed", source=train_dataset)]


def _strategy(args: JacobiForcingConfig, packed: Mapping[str, Any] | None) -> TrainingDrafts | None:
    """Where the drafts came from; None where no manifest says."""
    if args.method == "drafter":
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
    return TrainingDrafts(schedule=packed["schedule"], block_size=args.block_size, **same)


def _loss_weights(args: JacobiForcingConfig) -> LossWeights:
    return LossWeights(
        consistency=args.consistency_loss_weight,
        ar=args.ar_loss_weight,
        replay=args.replay_loss_weight,
        kl=args.kl_loss_weight,
    )
