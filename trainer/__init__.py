"""Jacobi Forcing: finetune a causal LM on its own Jacobi trajectories, so that several tokens come true per forward."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jacobi_hf.trainer.arguments import JacobiForcingConfig
    from jacobi_hf.trainer.collator import JacobiForcingCollator
    from jacobi_hf.trainer.dataset import BadRecordError, load_packed
    from jacobi_hf.trainer.schedule import NoiseSchedule, pack
    from jacobi_hf.trainer.trainer import JacobiForcingTrainer
    from jacobi_hf.trainer.trajectories import AnswerConfig, Trajectory, collect_trajectories, record_trajectories

# Loaded when asked for, so that a module of the package can be run (python -m jacobi_hf.trainer.mask) and imports stay quick.
_MODULE_OF = {
    "AnswerConfig": "trajectories",
    "BadRecordError": "dataset",
    "JacobiForcingCollator": "collator",
    "JacobiForcingConfig": "arguments",
    "JacobiForcingTrainer": "trainer",
    "NoiseSchedule": "schedule",
    "Trajectory": "trajectories",
    "collect_trajectories": "trajectories",
    "load_packed": "dataset",
    "pack": "schedule",
    "record_trajectories": "trajectories",
}

__all__ = [
    "AnswerConfig",
    "BadRecordError",
    "JacobiForcingCollator",
    "JacobiForcingConfig",
    "JacobiForcingTrainer",
    "NoiseSchedule",
    "Trajectory",
    "collect_trajectories",
    "load_packed",
    "pack",
    "record_trajectories",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
