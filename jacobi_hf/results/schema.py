"""Schema of measured results: every program that measures writes it, every report and model card reads it.

A `Results` document holds one run of one program on one machine with one model, and its list of measurements. Every
field was measured or set; none is derived from another document.
"""

from __future__ import annotations

import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field

from jacobi_hf.attention.interface import attention_of
from jacobi_hf.config import JACOBI, JacobiConfig
from jacobi_hf.results.environment import Hardware, Part, Software, command_line
from jacobi_hf.results.training import Training  # noqa: TC001  (pydantic reads annotations)

if TYPE_CHECKING:
    from collections.abc import Sequence

_Z = 1.96  # of a 95 % interval


class Decoder(Part):
    """How the text of a measurement was generated. A field is None if this kind of decoding has no such setting."""

    name: str
    """Name of the decoder, unique within a document."""
    kind: Literal[
        "generate",
        "generate-static-compiled",
        "prompt-lookup",
        "assisted",
        "early-exit",
        "jacobi",
        "jacobi_multiblock",
    ]
    """Method: ordinary `generate`, one of transformers' own methods, or Jacobi decoding."""
    compiled: bool = False
    """Whether steps or forwards ran through torch.compile."""
    adaptive: bool = False
    """Whether decoding chose the guesses of each forward, within the other settings."""
    block_size: int | None = None
    """Tokens of a block (n)."""
    max_blocks: int | None = None
    """Blocks of the window (K)."""
    activation_ratio: float | None = None
    """Share of a block that must be accepted before the next block starts (r), from 0 to 1."""
    pool_size: int | None = None
    """Branches that the n-gram pool proposes per step."""
    branch_length: int | None = None
    """Guesses of each branch of the n-gram pool."""
    lookup_tokens: int | None = None
    """Guesses of the lookup branch; for prompt lookup, draft tokens per forward."""
    topk_branches: int | None = None
    """Branches made of the model's second and third choices."""
    drafter: str | None = None
    """Name of the drafter that proposes the guesses of the window."""
    verify_width: int | None = None
    """Guesses of the drafter that each forward verifies; 0 means that recent acceptance decides."""

    @classmethod
    def of(cls, name: str, config: JacobiConfig, drafter: str | None = None) -> Self:
        """Return the description of Jacobi decoding with a config, under a name.

        Args:
            name: name of the decoder in the document.
            config: settings of the decoding.
            drafter: name of the drafter in use; None without a drafter.
        """
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
            adaptive=config.is_adaptive,
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


class Prompts(Part):
    """Prompts of a measurement, and how far each one was continued."""

    domain: str
    """Kind of text, such as "code", or name of the task."""
    source: str
    """Where the prompts come from."""
    count: int
    """Number of prompts."""
    max_new_tokens: int
    """Most new tokens of each prompt."""
    do_sample: bool = False
    """Whether tokens were sampled; otherwise decoding was greedy."""
    batch_size: int = 1
    """Prompts that were decoded together."""


class Speedup(Part):
    """Speed of a decoder relative to a baseline on the same prompts in the same process."""

    baseline: str
    """Name of the baseline decoder, of the same document."""
    factor: float
    """Tokens per second of the decoder divided by those of the baseline."""


class Agreement(Part):
    """Comparison of a decoder's outputs with those of a baseline, token for token."""

    baseline: str
    """Name of the baseline decoder, of the same document."""
    identical: int
    """Number of prompts whose outputs are equal."""
    total: int
    """Number of prompts that were compared."""
    different: list[int] = Field(default_factory=list)
    """Indices of the prompts whose outputs differ."""

    @classmethod
    def between(
        cls, outputs: Sequence[list[int]], references: Sequence[list[int]], baseline: str = "generate"
    ) -> Self:
        """Compare the output ids of each prompt with those of the baseline."""
        different = [i for i, (a, b) in enumerate(zip(outputs, references, strict=True)) if a != b]
        total = len(outputs)
        return cls(baseline=baseline, identical=total - len(different), total=total, different=different)


class Quality(Part):
    """Score of a model's outputs with its 95 % interval."""

    metric: str
    """Name of the score."""
    value: float
    """The score."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    samples: int
    """Number of problems that were scored."""

    @classmethod
    def of_share(cls, metric: str, right: int, samples: int) -> Self:
        """Return the share of right answers as a score, with the interval of Wilson (1927)."""
        share = right / samples
        spread = _Z * _Z / samples
        centre = (share + spread / 2) / (1 + spread)
        half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
        low = max(0.0, centre - half)
        return cls(metric=metric, value=share, low=low, high=min(1.0, centre + half), samples=samples)


class Measurement(Part):
    """One decoder on one set of prompts. A field is None if it was not measured."""

    decoder: Decoder
    """How the text was generated."""
    prompts: Prompts
    """Prompts that were continued."""
    model: str | None = None
    """Model that was measured, if a document compares several."""
    new_tokens: int | None = None
    """New tokens, all prompts together."""
    forwards: int | None = None
    """Forwards of the full model, prefill included, all prompts together."""
    tokens_per_forward: float | None = None
    """New tokens divided by forwards (TPF)."""
    tokens_per_forward_loop_free: float | None = None
    """New tokens divided by forwards, over the prompts whose output ends in no loop."""
    per_prompt_tokens_per_forward: list[float] | None = None
    """New tokens divided by forwards of each prompt, in order."""
    looping: list[int] | None = None
    """Indices of the prompts whose output ends in a loop."""
    mean_slots: float | None = None
    """Positions that the model computes per decoding forward, on average."""
    seconds: float | None = None
    """Wall time in seconds for all prompts together; the median of the repeats."""
    repeats: int | None = None
    """Number of timed repeats."""
    tokens_per_second: float | None = None
    """New tokens divided by seconds."""
    speedups: list[Speedup] = Field(default_factory=list)
    """Speed relative to each baseline."""
    agreement: Agreement | None = None
    """Comparison of the outputs with those of ordinary decoding."""
    quality: Quality | None = None
    """Score of the outputs."""
    held_out_loss: float | None = None
    """Next-token loss on held-out text, in nats per token."""
    mean_acceptance_length: float | None = None
    """Mean tokens of a step that verified guesses, as vLLM counts: 1 + accepted guesses / such steps."""
    accepted_lengths: dict[int, int] | None = None
    """Number of decoding forwards by the number of tokens that they committed, as in `JacobiStats`."""
    ms_per_forward: dict[int, float] | None = None
    """Wall time of a decoding step in milliseconds, by the number of its slots."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further figures of the program that measured, by name."""


class Cost(Part):
    """Measured cost of something other than decoding, such as training, collecting or memory."""

    name: str
    """Name of the cost, unique within a document."""
    value: float
    """Median of the repeats, in `unit`."""
    unit: str
    """Unit of the value, such as "s", "GiB" or "tokens/s"."""
    repeats: int = 1
    """Number of repeats."""
    baseline: str | None = None
    """Name of another cost of the same document that `factor` refers to."""
    factor: float | None = None
    """Value divided by the value of the baseline."""
    setting: dict[str, Any] = Field(default_factory=dict)
    """Settings that the cost was measured with, by name."""


class Results(Part):
    """Document of measured results: one run of one program on one machine with one model."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    what: str
    """What was measured, in a sentence."""
    command: str
    """Command line of the run, without secrets."""
    created: str
    """When the run started, in ISO 8601 format, UTC."""
    model: str
    """Name or path of the model."""
    parameters: int
    """Number of parameters of the model."""
    dtype: str
    """Dtype of the model's weights."""
    device: str
    """Type of torch device: "cpu", "cuda" and so on."""
    threads: int
    """CPU threads of torch."""
    attention: str
    """Attention implementation of the model."""
    hardware: Hardware
    """Machine of the run."""
    software: Software
    """Software versions of the run."""
    measurements: list[Measurement] = Field(default_factory=list)
    """What was measured of decoding."""
    costs: list[Cost] = Field(default_factory=list)
    """What was measured of training, collecting or memory."""
    training: list[Training] = Field(default_factory=list)
    """Stages of the model's training, the first stage first."""

    @classmethod
    def start(cls, what: str, model: Any, name: str) -> Self:
        """Return a document without measurements that describes the model, the machine and the software.

        Args:
            what: what is measured, in a sentence.
            model: loaded model that is measured.
            name: name or path by which a reader finds the model.
        """
        return cls(
            what=what,
            command=command_line(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=name,
            parameters=model.num_parameters(),
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device.type,
            threads=torch.get_num_threads(),
            attention=attention_of(model.config),
            hardware=Hardware.of(model.device),
            software=Software.installed(),
        )

    def with_measurements(self, measurements: list[Measurement]) -> Self:
        """Return a copy of the document that holds these measurements."""
        return self.model_copy(update={"measurements": measurements})

    def write(self, path: str | Path) -> None:
        """Write the document as JSON; an interruption leaves no half-written file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
            part.write(self.model_dump_json(indent=1, exclude_none=True) + "\n")
        Path(part.name).chmod(0o644)
        Path(part.name).replace(path)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Return the document that a JSON file holds.

        Raises:
            pydantic.ValidationError: a field is unknown or missing, or this package does not know the schema version;
                the error names the field.
        """
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
