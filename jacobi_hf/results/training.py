"""How a model was trained: one `Training` for each stage, as results documents and model cards record it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from jacobi_hf.results.environment import Hardware, Part

_RENAMED_METHODS = {"forcing": "finetune", "gated": "drafter"}


class TrainingData(Part):
    """Set of texts that a training stage used."""

    name: str
    """Short name of the set."""
    source: str
    """File, Hub dataset or description of where the texts come from."""
    samples: int | None = None
    """Number of prompts or texts; None if it is not known."""


class TrainingDrafts(Part):
    """How the drafts of a training stage were made: noisy blocks for a model, or guesses of the drafter itself."""

    schedule: str
    """Noise schedule of `jacobi-hf pack`; "drafter" if the drafter made its own drafts."""
    block_size: int | None = None
    """Tokens of a block; None for a drafter."""
    noise_levels: int | None = None
    """Number of noise levels of the schedule; None for a drafter."""
    min_noise: float | None = None
    """Lowest noise level: the share of a block that is wrong, from 0 to 1; None for a drafter."""
    max_noise: float | None = None
    """Highest noise level: the share of a block that is wrong, from 0 to 1; None for a drafter."""
    phase: str | None = None
    """Where in the schedule a record starts: "fixed" is its beginning, "random" is anywhere; None for a drafter."""
    visits: int | None = None
    """Packed records of each text; None for a drafter."""
    views: int | None = None
    """Noisy versions of the text within each packed record; None for a drafter."""
    window_width: int | None = None
    """Guesses of a training window of a drafter; None without a drafter."""
    windows_per_text: int | None = None
    """Training windows of each text of a drafter; None without a drafter."""
    steps_per_window: int | None = None
    """Decoding steps of each training window of a drafter; None without a drafter."""

    @model_validator(mode="before")
    @classmethod
    def _no_former_names(cls, given: Any) -> Any:
        """Raise an error that gives the new name of each former key or value."""
        former = given if isinstance(given, dict) else {}
        if former.get("schedule") == "gated":
            raise ValueError(
                'schedule "gated" is now "drafter"; there, block_size is now window_width, window is now '
                "windows_per_text, and visits is now steps_per_window: rename them in the document."
            )
        if "window" in former:
            raise ValueError("window is now noise_levels: rename the key in the document.")
        return given


class Batch(Part):
    """Rows of one optimizer step: `devices` times `per_device` times `accumulation`."""

    devices: int
    """Number of devices."""
    per_device: int
    """Rows of each device in one forward."""
    accumulation: int
    """Forwards of each device per optimizer step."""


class LossWeights(Part):
    """Weights of the terms of the training loss."""

    consistency: float
    """Weight of the loss on noisy blocks."""
    ar: float
    """Weight of the next-token loss on the model's own answers."""
    replay: float
    """Weight of the next-token loss on replayed texts."""
    kl: float
    """Weight of the divergence from the reference model."""


class Training(Part):
    """One stage of a model's training: one run of one program."""

    method: Literal["finetune", "drafter", "sft"]
    """Kind of training: "finetune" is Jacobi Forcing, "drafter" trains a drafter, "sft" finetunes on texts alone."""
    base_model: str
    """Name or path of the model that the stage started from."""
    command: str | None = None
    """Command line of the run."""
    reference_model: str | None = None
    """Model that the KL term compares with, if it is not the base model."""
    data: list[TrainingData] = Field(default_factory=list)
    """Sets of texts that the stage used."""
    strategy: TrainingDrafts | None = None
    """How its drafts were made; None if no manifest records it."""
    epochs: float
    """Passes over the training records."""
    steps: int
    """Optimizer steps."""
    optimizer: str | None = None
    """Name of the optimizer; "muon" means Muon for the matrices inside the layers and AdamW for all other weights."""
    learning_rate: float
    """Highest learning rate."""
    muon_learning_rate: float | None = None
    """Highest learning rate of the matrices that Muon updates."""
    schedule: str
    """Learning rate schedule."""
    batch: Batch
    """Rows of an optimizer step."""
    precision: Literal["fp32", "bf16"] | None = None
    """Dtype of the forwards."""
    weights_dtype: str
    """Dtype of the weights that the optimizer updates."""
    loss_weights: LossWeights | None = None
    """Weights of the terms of the loss; None for a drafter, whose loss has one term."""
    lora_rank: int | None = None
    """Rank of the LoRA adapter or drafter; None if all weights were trained."""
    slots: int
    """Positions of noisy blocks that contributed to the loss."""
    minutes: float
    """Minutes that the run took, without interruptions."""
    threads: int | None = None
    """CPU threads of torch."""
    hardware: Hardware | None = None
    """Machine of the run."""
    seed: int
    """Seed of the run."""
    loss: float | None = None
    """Training loss in nats, averaged over the run."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """All other arguments of the run, by name."""

    @field_validator("method", mode="before")
    @classmethod
    def _no_former_method(cls, method: Any) -> Any:
        """Raise an error that gives the new name of a former method."""
        if method in _RENAMED_METHODS:
            raise ValueError(f'"{method}" is now "{_RENAMED_METHODS[method]}": rename it in the document.')
        return method
