"""The one schema of measured results: whatever measures writes it, whatever reports reads it.

A document holds one run of one program on one machine with one model, and a list of measurements. Every field of a measurement
is something that was measured or set, never derived from another document.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jacobi_hf.attention.interface import attention_of
from jacobi_hf.config import JACOBI, JacobiConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

_SECRET_OPTION = re.compile(r"(token|password|secret|key)$", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"hf_\w{8,}")
_Z = 1.96  # of a 95 % interval
_RENAMED_METHODS = {"forcing": "finetune", "gated": "drafter"}
_PACKAGES = ("jacobi-hf", "torch", "transformers", "accelerate", "peft", "tokenizers")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hardware(_Strict):
    """The machine. `gpu` is None where none was used."""

    cpu: str
    cores: int
    gpu: str | None = None

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """This machine, with the device's name where it is no CPU."""
        cpu = platform.processor() or platform.machine()
        info = Path("/proc/cpuinfo")
        if info.is_file():
            cpu = next(
                (
                    line.split(":", 1)[1].strip()
                    for line in info.read_text().splitlines()
                    if line.startswith("model name")
                ),
                cpu,
            )
        gpu = torch.get_device_module(device).get_device_name(device) if device.type not in ("cpu", "meta") else None
        return cls(cpu=cpu, cores=os.cpu_count() or 1, gpu=gpu)


class Software(_Strict):
    """Versions of what ran, and the revision of this repository (with "+changes" when the working tree had any)."""

    python: str
    packages: dict[str, str]
    git_revision: str | None = None


class Decoder(_Strict):
    """How text was produced. `name` is unique within a document; the other fields are None where they do not apply."""

    name: str
    kind: Literal[
        "generate",
        "generate-static-compiled",
        "prompt-lookup",
        "assisted",
        "early-exit",
        "jacobi",
        "jacobi_multiblock",
    ]
    compiled: bool = Field(default=False, description="whether steps or forwards ran through torch.compile")
    block_size: int | None = Field(default=None, description="n")
    max_blocks: int | None = Field(default=None, description="K")
    activation_ratio: float | None = Field(default=None, description="r")
    pool_size: int | None = None
    branch_length: int | None = None
    lookup_tokens: int | None = Field(
        default=None, description="length of the lookup branch, or draft tokens of prompt lookup"
    )
    topk_branches: int | None = Field(default=None, description="branches from the model's second and third choices")
    drafter: str | None = Field(default=None, description="the drafter that makes the window's guesses")
    verify_width: int | None = Field(
        default=None, description="guesses verified at a time beside it, 0 = as acceptance suggests"
    )

    @classmethod
    def of(cls, name: str, config: JacobiConfig, drafter: str | None = None) -> Self:
        """The setting of a `JacobiConfig` under a name."""
        verify_width = config.jacobi_verify_width if drafter else None
        if config.decoding == JACOBI:
            return cls(
                name=name,
                kind="jacobi",
                block_size=config.jacobi_block_size,
                drafter=drafter,
                verify_width=verify_width,
            )
        return cls(
            name=name,
            kind="jacobi_multiblock",
            block_size=config.jacobi_block_size,
            max_blocks=config.jacobi_max_blocks,
            activation_ratio=config.jacobi_activation_ratio,
            pool_size=config.jacobi_pool_size,
            branch_length=config.jacobi_branch_length,
            lookup_tokens=config.jacobi_lookup_tokens,
            topk_branches=config.jacobi_topk_branches or None,
            drafter=drafter,
            verify_width=verify_width,
        )


class Prompts(_Strict):
    """What was continued."""

    domain: str
    source: str
    count: int
    max_new_tokens: int
    do_sample: bool = False
    batch_size: int = 1


class Speedup(_Strict):
    """Tokens per second over those of a decoder of the same document, on the same prompts, in the same process."""

    baseline: str
    factor: float


class Agreement(_Strict):
    """Outputs equal, token for token, to those of `baseline`; `different` lists the prompts that are not."""

    baseline: str
    identical: int
    total: int
    different: list[int] = []

    @classmethod
    def between(
        cls, outputs: Sequence[list[int]], references: Sequence[list[int]], baseline: str = "generate"
    ) -> Self:
        """Compare the output ids of each prompt with those of the baseline."""
        different = [i for i, (a, b) in enumerate(zip(outputs, references, strict=True)) if a != b]
        total = len(outputs)
        return cls(baseline=baseline, identical=total - len(different), total=total, different=different)


class Quality(_Strict):
    """A score with its 95 % interval."""

    metric: str
    value: float
    low: float
    high: float
    samples: int

    @classmethod
    def of_share(cls, metric: str, right: int, samples: int) -> Self:
        """A share of right answers, with the interval of Wilson (1927)."""
        share, spread = right / samples, _Z * _Z / samples
        centre = (share + spread / 2) / (1 + spread)
        half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
        return cls(
            metric=metric, value=share, low=max(0.0, centre - half), high=min(1.0, centre + half), samples=samples
        )


class Measurement(_Strict):
    """One decoder on one set of prompts.

    Attributes:
        model: where a document compares models, the one that was measured.
        tokens_per_forward: new tokens over forwards, prefill counted, all prompts together.
        mean_slots: positions per decoding forward.
        seconds: median of the repeats, all prompts; `repeats` says how many there were.
        accepted_lengths: in how many decoding forwards so many tokens were committed, as `JacobiStats` counts them.
        ms_per_forward: milliseconds per decoding forward by its number of slots (wall time of the whole step).
        per_prompt_tokens_per_forward: the figure of each prompt, in order.
        looping: prompts whose output ends in a loop, by index; `tokens_per_forward_loop_free` leaves them out.
        held_out_loss: nats per token on held-out text.
        extra: anything specific to the program, by name.
    """

    decoder: Decoder
    prompts: Prompts
    model: str | None = None
    new_tokens: int | None = None
    forwards: int | None = None
    tokens_per_forward: float | None = None
    tokens_per_forward_loop_free: float | None = None
    per_prompt_tokens_per_forward: list[float] | None = None
    looping: list[int] | None = None
    mean_slots: float | None = None
    seconds: float | None = None
    repeats: int | None = None
    tokens_per_second: float | None = None
    speedups: list[Speedup] = []
    agreement: Agreement | None = None
    quality: Quality | None = None
    held_out_loss: float | None = None
    accepted_lengths: dict[int, int] | None = None
    ms_per_forward: dict[int, float] | None = None
    extra: dict[str, Any] = {}


class Cost(_Strict):
    """What something other than decoding takes: training, collecting, memory.

    Attributes:
        value: median of `repeats` measurements, in `unit`.
        baseline, factor: name of another cost of the document, and this value over its.
        setting: what it was measured with.
    """

    name: str
    value: float
    unit: str
    repeats: int = 1
    baseline: str | None = None
    factor: float | None = None
    setting: dict[str, Any] = {}


class TrainingData(_Strict):
    """Texts that a stage of training learnt from. `samples` is how many prompts (or texts) there were."""

    name: str
    source: str
    samples: int | None = None


class Strategy(_Strict):
    """How the drafts of a training run were made, for model cards.

    Attributes:
        schedule: name of the noise schedule (`NoiseSchedule.kind`), or "drafter" where the drafter made its own drafts.
        block_size: n of the trajectories; None for a drafter.
        noise_levels, min_noise, max_noise, phase, visits, views: as in `PackConfig`; None for a drafter.
        window_width, windows_per_text, steps_per_window: as in `DrafterConfig`; None without a drafter.
    """

    schedule: str
    block_size: int | None = None
    noise_levels: int | None = None
    min_noise: float | None = None
    max_noise: float | None = None
    phase: str | None = None
    visits: int | None = None
    views: int | None = None
    window_width: int | None = None
    windows_per_text: int | None = None
    steps_per_window: int | None = None

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


class Batch(_Strict):
    """Rows of an optimiser step: devices x rows on each x accumulated batches."""

    devices: int
    per_device: int
    accumulation: int


class LossWeights(_Strict):
    """Factors of the terms of the loss."""

    consistency: float
    ar: float
    replay: float
    kl: float


class Training(_Strict):
    """A stage of a model's training: one run of one program.

    Attributes:
        method: "finetune" trains the model on its Jacobi trajectories, "drafter" trains a drafter and leaves the model
            as it is, "sft" trains the model on the texts alone.
        base_model: what the stage began from; `reference_model` is what KL held it to, where that was another one.
        optimizer: as the trainer calls it, or "muon": Muon for the matrices inside the layers, AdamW for the rest.
        precision: of the forwards; `weights_dtype` is that of the weights that the optimiser changes.
        loss_weights: None for a drafter, whose loss has one term.
        lora_rank: of an adapter or drafter; None where all weights were trained.
        slots: positions of noisy blocks that were learnt from.
        minutes: of the whole run, interruptions left out.
        loss: mean over the run.
        arguments: the other arguments of the run, by name.
    """

    method: Literal["finetune", "drafter", "sft"]
    base_model: str
    command: str | None = None
    reference_model: str | None = None
    data: list[TrainingData] = []
    strategy: Strategy | None = None
    epochs: float
    steps: int
    optimizer: str | None = None
    learning_rate: float
    muon_learning_rate: float | None = None
    schedule: str
    batch: Batch
    precision: Literal["fp32", "bf16"] | None = None
    weights_dtype: str
    loss_weights: LossWeights | None = None
    lora_rank: int | None = None
    slots: int
    minutes: float
    threads: int | None = None
    hardware: Hardware | None = None
    seed: int
    loss: float | None = None
    arguments: dict[str, Any] = {}

    @field_validator("method", mode="before")
    @classmethod
    def _no_former_method(cls, method: Any) -> Any:
        """Raise an error that gives the new name of a former method."""
        if method in _RENAMED_METHODS:
            raise ValueError(f'"{method}" is now "{_RENAMED_METHODS[method]}": rename it in the document.')
        return method


class Results(_Strict):
    """A document of measured results. `training` lists the stages of the model's training, the first one first."""

    schema_version: Literal[1] = 1
    what: str
    command: str
    created: str
    model: str
    parameters: int
    dtype: str
    device: str
    threads: int
    attention: str
    hardware: Hardware
    software: Software
    measurements: list[Measurement] = []
    costs: list[Cost] = []
    training: list[Training] = []

    @classmethod
    def start(cls, what: str, model: Any, name: str) -> Self:
        """A document without measurements, with everything that this process knows of itself.

        Args:
            what: what is measured, in a sentence.
            model: the model that is measured.
            name: the model's name or path as a reader can find it.
        """
        program = Path(sys.argv[0]).name if Path(sys.argv[0]).is_absolute() else sys.argv[0]
        return cls(
            what=what,
            command=" ".join([program, *without_secrets(sys.argv[1:])]),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=name,
            parameters=model.num_parameters(),
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device.type,
            threads=torch.get_num_threads(),
            attention=attention_of(model.config),
            hardware=Hardware.of(model.device),
            software=Software(python=platform.python_version(), packages=_versions(), git_revision=_git_revision()),
        )

    def with_measurements(self, measurements: list[Measurement]) -> Self:
        """A copy that holds these measurements."""
        return self.model_copy(update={"measurements": measurements})

    def write(self, path: str | Path) -> None:
        """Write the document as JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
            part.write(self.model_dump_json(indent=1, exclude_none=True) + "\n")
        Path(part.name).chmod(0o644)
        Path(part.name).replace(path)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a document.

        Raises:
            pydantic.ValidationError: unknown or missing fields, named, or a schema version that this package does not know.
        """
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))


def without_secrets(words: list[str]) -> list[str]:
    """Words of a command line with `...` for the values of options such as `--hub_token`, and for what looks like a token of the Hub."""
    shown, hides = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = name.startswith("-") and _SECRET_OPTION.search(name) is not None
        shown.append("..." if hides else f"{name}=..." if secret and equals else _HUB_TOKEN.sub("...", word))
        hides = secret and not equals
    return shown


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    folder = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None
