"""What a training run refuses before its first step: foreign data, a disk that is too small."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacobi_hf.trainer.data.shards import MANIFEST, read_manifest

if TYPE_CHECKING:
    import torch

    from jacobi_hf.trainer.base import BaseTrainer
    from jacobi_hf.trainer.method_options import RunConfig


def packed_settings(train_dataset: str) -> dict[str, Any] | None:
    """Return the settings in the manifest of a packed folder, or None if the dataset is no folder with a manifest."""
    if not (Path(train_dataset) / MANIFEST).is_file():
        return None
    settings: dict[str, Any] = read_manifest(train_dataset)["settings"]
    return settings


def same_model(name: str, other: str) -> bool:
    """Return whether two names or paths mean one model."""
    return name == other or (Path(name).is_dir() and Path(other).is_dir() and Path(name).samefile(other))


def check_origin(config: RunConfig) -> None:
    """Check that the records were collected from the model that is trained; models are compared by name or path.

    Raises:
        ValueError: the records were collected from another model and `off_policy` is not set, or are not packed yet.
    """
    packed = packed_settings(config.train_dataset)
    if config.off_policy or packed is None:
        return
    collected = packed.get("of")
    if collected is None:
        raise ValueError(
            f"{config.train_dataset} holds trajectories: pack them first, and train on the folder that pack wrote."
        )
    others = sorted({one["model"] for one in collected.values() if not same_model(one["model"], config.model)})
    if others:
        raise ValueError(
            f"{config.train_dataset} was collected from {', '.join(others)}, and {config.model} is to be trained: "
            "collect and pack its own trajectories, or train on these all the same with --off_policy true."
        )


def check_use(config: RunConfig) -> None:
    """Check that the method uses the data that are given.

    Raises:
        ValueError: replay or a reference model for a drafter.
    """
    if config.method != "drafter":
        return
    for name in ("replay_dataset", "ref_model"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name} has no use with method=drafter, because the model itself does not change: leave it out."
            )


def check_space(trainer: BaseTrainer, dtype: torch.dtype) -> None:
    """Check that the disk has room for a checkpoint (trained weights and two moments of each) and the finished model.

    Raises:
        ValueError: it has not.
    """
    parameters = list(trainer.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    is_drafter = trainer.args.method == "drafter"
    final = trained if is_drafter else sum(p.numel() for p in parameters) * dtype.itemsize
    needed = final + (0 if trainer.args.save_strategy == "no" else 3 * trained)
    folder = Path(trainer.args.output_dir).resolve()
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    if free < needed:
        raise ValueError(
            f"{trainer.args.output_dir} has room for {free / 1e9:.2f} GB, and a checkpoint and the finished model "
            f"take {needed / 1e9:.2f} GB: make room, or choose another output_dir."
        )
