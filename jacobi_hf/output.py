"""Output of a call with Jacobi decoding: the fields of transformers, and statistics."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from transformers.generation import GenerateDecoderOnlyOutput

from jacobi_hf.integration.compat import CACHE


@dataclass
class JacobiStats:
    """Counts and times of one call of `generate`.

    A *slot* is a position that a forward computes, for the last token of the text or for a guess. TPF (tokens per
    forward) is 1.0 in ordinary decoding.

    Attributes:
        forwards: forwards of the model. The prefill counts as one, also if a long prompt is prefilled in parts.
        new_tokens: new tokens of each row, its end-of-sequence token included.
        row_forwards: forwards of each row until it ended, the prefill included.
        accepted_lengths: histogram of tokens per step: `accepted_lengths[3] == 7` means that 7 times a row got 3
            tokens from one decoding forward.
        accepted_from: accepted guesses by their source: "window", "drafter", "pool", "lookup" or "topk".
        drafted: guesses of the window that went into forwards.
        verified: guesses of the window that the model verified; all that were drafted, unless a drafter is used.
        accepted: guesses of the window that were accepted.
        seconds_by_width: seconds of each decoding step, from one forward to the next, by the number of slots of its
            forward.
        compiled_steps: shapes of steps that this call compiled; 0 if all were kept from earlier calls.
        cuda_graphs: CUDA graphs that this call recorded; 0 if all were kept from earlier calls.
        prefill_seconds: seconds of the call up to the end of the prefill.
        decode_seconds: seconds of the call after the prefill.
    """

    forwards: int = 0
    new_tokens: list[int] = field(default_factory=list)
    row_forwards: list[int] = field(default_factory=list)
    accepted_lengths: Counter[int] = field(default_factory=Counter)
    accepted_from: Counter[str] = field(default_factory=Counter)
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    seconds_by_width: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    compiled_steps: int = 0
    cuda_graphs: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> list[float]:
        """TPF of each row: its new tokens divided by the forwards until it ended."""
        return [tokens / forwards for tokens, forwards in zip(self.new_tokens, self.row_forwards, strict=True)]

    @property
    def mean_tokens_per_forward(self) -> float:
        """TPF of all rows together: the sum of their new tokens divided by the sum of their forwards."""
        return sum(self.new_tokens) / sum(self.row_forwards)

    @property
    def slots_by_width(self) -> Counter[int]:
        """Histogram of slots per row: `slots_by_width[17] == 4` means that 4 decoding forwards had 17 slots."""
        return Counter({width: len(times) for width, times in self.seconds_by_width.items()})

    @property
    def slots(self) -> int:
        """Slots of all decoding forwards together, for one row of the batch."""
        return sum(width * count for width, count in self.slots_by_width.items())

    @property
    def mean_slots(self) -> float:
        """Mean slots of a decoding forward; 0 if the prefill was the only forward."""
        return self.slots / max(1, self.slots_by_width.total())

    @property
    def window_acceptance(self) -> float:
        """Share of the window's verified guesses that were accepted; 0 if none was verified."""
        return self.accepted / max(1, self.verified)


@dataclass
class JacobiDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """Output of `generate` with Jacobi decoding and `return_dict_in_generate=True`: the usual fields and statistics.

    The cache has both of its names in every supported release: `cache` (from transformers 5.24 on) and
    `past_key_values`.

    Attributes:
        jacobi_stats: counts and times of the call.
    """

    jacobi_stats: JacobiStats | None = None


if CACHE != "cache":  # from 5.24 on it is a field, and transformers itself adds the old name
    JacobiDecoderOnlyOutput.cache = property(lambda output: output.past_key_values)  # type: ignore[attr-defined]
