"""Jacobi Forcing: finetune a causal LM on its own Jacobi trajectories, so that several tokens come true per forward."""

from jacobi_hf.trainer.arguments import JacobiForcingConfig
from jacobi_hf.trainer.collator import JacobiForcingCollator
from jacobi_hf.trainer.dataset import BadRecordError, load_packed
from jacobi_hf.trainer.schedule import NoiseSchedule, pack
from jacobi_hf.trainer.trainer import JacobiForcingTrainer
from jacobi_hf.trainer.trajectories import AnswerConfig, Trajectory, collect_trajectories, record_trajectories

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
