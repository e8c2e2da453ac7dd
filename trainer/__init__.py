"""Training of models and drafters whose guesses are accepted more often: collecting, packing and the trainers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jacobi_hf.trainer.data.answer_options import AnswerConfig
    from jacobi_hf.trainer.data.collator import JacobiForcingCollator
    from jacobi_hf.trainer.data.loading import load_packed
    from jacobi_hf.trainer.data.record import BadRecordError, PackedRecord
    from jacobi_hf.trainer.data.schedule import NoiseSchedule, pack
    from jacobi_hf.trainer.data.trajectories import Trajectory, collect_trajectories, record_trajectories
    from jacobi_hf.trainer.drafter.config import DrafterConfig
    from jacobi_hf.trainer.drafter.trainer import DrafterTrainer
    from jacobi_hf.trainer.forcing.config import JacobiForcingConfig
    from jacobi_hf.trainer.forcing.trainer import JacobiForcingTrainer

# Loaded on first use, so that imports stay quick and a module of the package can be run (python -m).
_MODULE_OF = {
    "AnswerConfig": "data.answer_options",
    "BadRecordError": "data.record",
    "DrafterConfig": "drafter.config",
    "DrafterTrainer": "drafter.trainer",
    "JacobiForcingCollator": "data.collator",
    "JacobiForcingConfig": "forcing.config",
    "JacobiForcingTrainer": "forcing.trainer",
    "NoiseSchedule": "data.schedule",
    "PackedRecord": "data.record",
    "Trajectory": "data.trajectories",
    "collect_trajectories": "data.trajectories",
    "load_packed": "data.loading",
    "pack": "data.schedule",
    "record_trajectories": "data.trajectories",
}

__all__ = [
    "AnswerConfig",
    "BadRecordError",
    "DrafterConfig",
    "DrafterTrainer",
    "JacobiForcingCollator",
    "JacobiForcingConfig",
    "JacobiForcingTrainer",
    "NoiseSchedule",
    "PackedRecord",
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
