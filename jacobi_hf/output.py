"""Output of a call with Jacobi decoding: the fields of transformers, and statistics."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from transformers.generation import GenerateDecoderOnlyOutput

from jacobi_hf.integration.compat import CACHE

if TYPE_CHECKING:
    from collections.abc import Mapping


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
        guesses: guesses that decoding steps verified, those of window and branches together.
        accepted_guesses: histogram of accepted guesses, over the steps that verified at least one guess of a row:
            `accepted_guesses[3] == 7` means that 7 times a step accepted 3 guesses of a row. Guesses after the end of
            a text count too.
        steps_by_shape: decoding steps by their shape: "1" is the pending token alone, and "window 16 + lookup 8" has
            16 guesses of the window and 8 of the lookup.
        seconds_by_shape: seconds of all decoding steps of each shape together.
        probing_seconds: seconds beyond those of one slot, of steps that tried a source which does not seem to pay. 0
            with the constant schedule.
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
    guesses: int = 0
    accepted_guesses: Counter[int] = field(default_factory=Counter)
    steps_by_shape: Counter[str] = field(default_factory=Counter)
    seconds_by_shape: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    probing_seconds: float = 0.0
    seconds_by_width: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    compiled_steps: int = 0
    cuda_graphs: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def __str__(self) -> str:
        """Return three lines: how fast the call was, what was accepted, and which shapes the steps had."""
        seconds = self.prefill_seconds + self.decode_seconds
        tokens, forwards = sum(self.new_tokens), sum(self.row_forwards)
        unit = "tokens per forward" + (" and row" if len(self.new_tokens) > 1 else "")
        rate = f"{tokens / forwards:.2f} {unit}" if forwards else "no forward"
        speed = f"{tokens} tokens in {seconds:.2f} s ({self.prefill_seconds:.2f} s of it prefill), {rate}"
        sources = ", ".join(f"{source} {count}" for source, count in self.accepted_from.most_common())
        share = f"{sum(self.accepted_from.values())} of {self.guesses} guesses accepted"
        length = f"acceptance length {self.mean_acceptance_length:.2f}"
        accepted = f"{length}, {share}" + (f": {sources}" if sources else "")
        return f"{speed}\n{accepted}\nsteps: {steps_in_words(self.steps_by_shape) or 'none'}"

    def note_step(self, shape: str, seconds: float) -> None:
        """Count a decoding step.

        Args:
            shape: the shape in words, as in `steps_by_shape`.
            seconds: seconds that the step took.
        """
        self.steps_by_shape[shape] += 1
        self.seconds_by_shape[shape] += seconds

    def note_row(self, guesses: int, accepted: int) -> None:
        """Count what a decoding step did for a row that had not ended.

        Args:
            guesses: guesses of all segments that were verified. A step without guesses changes nothing.
            accepted: guesses that were accepted in the segment that won.
        """
        if guesses:
            self.guesses += guesses
            self.accepted_guesses[accepted] += 1

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
    def mean_acceptance_length(self) -> float:
        """Mean tokens of a row in a step that verified guesses, as vLLM counts: 1 + accepted guesses / such steps.

        1 if no step verified a guess.
        """
        return acceptance_length_of(self.accepted_guesses)

    @property
    def draft_acceptance_rate(self) -> float:
        """Share of all verified guesses that were accepted, as in vLLM; 0 if none was verified."""
        accepted = sum(length * steps for length, steps in self.accepted_guesses.items())
        return accepted / max(1, self.guesses)

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the steps with guesses that accepted the first guess, the second and so on, as in vLLM.

        The list ends at the last position at which a guess was accepted. Its sum is `mean_acceptance_length - 1`.
        """
        steps = self.accepted_guesses.total()
        counts = [self.accepted_guesses[length] for length in range(max(self.accepted_guesses, default=0), 0, -1)]
        return [reached / steps for reached in accumulate(counts)][::-1]

    @property
    def window_acceptance(self) -> float:
        """Share of the window's verified guesses that were accepted; 0 if none was verified."""
        return self.accepted / max(1, self.verified)


def steps_in_words(steps_by_shape: Mapping[str, int], most: int = 4) -> str:
    """Return the shapes that steps had most often: "6 of one slot, 3 of lookup 16 and 2 more shapes"."""
    usual = sorted(steps_by_shape.items(), key=lambda one: -one[1])
    shown = [f"{count} of {'one slot' if shape == '1' else shape}" for shape, count in usual[:most]]
    more = len(usual) - most
    return ", ".join(shown) + (f" and {more} more shape{'s' * (more > 1)}" if more > 0 else "")


def acceptance_length_of(accepted_guesses: Counter[int]) -> float:
    """Return 1 + accepted guesses / steps that verified guesses, from a histogram as in `JacobiStats`."""
    guesses = sum(accepted * steps for accepted, steps in accepted_guesses.items())
    return 1 + guesses / max(1, accepted_guesses.total())


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
