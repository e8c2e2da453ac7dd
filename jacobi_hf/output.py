"""What a call returns besides the tokens."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from transformers.generation import GenerateDecoderOnlyOutput

from jacobi_hf.integration.compat import CACHE


@dataclass
class JacobiStats:
    """Counts of one call to `generate`.

    Attributes:
        forwards: model calls, prefill included (as one, also where a long prompt went in by parts).
        new_tokens: per row, up to and with its end-of-sequence token.
        row_forwards: per row, the forwards until that row ended.
        accepted_lengths: how often a row committed that many tokens in one decoding forward.
        accepted_from: confirmed guesses by where they came from: "window", "pool", "lookup", "topk".
        drafted: guesses of the window that were sent to the model; `verified` of them were verified (all, without a drafter), and
            `accepted` confirmed.
        slots: positions computed in decoding forwards, per row of the batch.
        seconds_by_width: wall time of each decoding step, from one forward to the next, by the slots of its forward.
        compiled_steps: shapes of steps that this call compiled; 0 when they were kept from an earlier call.
        cuda_graphs: kinds of steps that this call recorded as graphs of the device; 0 when they were kept.
        prefill_seconds, decode_seconds: wall time of the call, split behind the prefill.
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
        """Per row, new tokens over the forwards until it ended; ordinary decoding is 1.0."""
        return [tokens / forwards for tokens, forwards in zip(self.new_tokens, self.row_forwards, strict=True)]

    @property
    def mean_tokens_per_forward(self) -> float:
        """New tokens over forwards, all rows together."""
        return sum(self.new_tokens) / sum(self.row_forwards)

    @property
    def slots_by_width(self) -> Counter[int]:
        """How many decoding forwards had that many slots."""
        return Counter({width: len(times) for width, times in self.seconds_by_width.items()})

    @property
    def slots(self) -> int:
        """Positions computed in decoding forwards, per row of the batch."""
        return sum(width * count for width, count in self.slots_by_width.items())

    @property
    def mean_slots(self) -> float:
        """Positions per decoding forward; 0 when the prefill was the only one."""
        return self.slots / max(1, self.slots_by_width.total())

    @property
    def window_acceptance(self) -> float:
        """Share of the window's verified guesses that the forward confirmed."""
        return self.accepted / max(1, self.verified)


@dataclass
class JacobiDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with the statistics of the decoding.

    It answers to both names of the cache, `cache` (transformers 5.24 on) and `past_key_values`.

    Attributes:
        jacobi_stats: counts of forwards, tokens and guesses.
    """

    jacobi_stats: JacobiStats | None = None


if CACHE != "cache":  # from 5.24 on it is a field, and transformers answers to the old name
    JacobiDecoderOnlyOutput.cache = property(lambda output: output.past_key_values)  # type: ignore[attr-defined]
