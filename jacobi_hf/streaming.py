"""Watching a call of `generate` forward by forward: which guesses were verified, and which tokens were committed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from transformers.generation import BaseStreamer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from jacobi_hf.decoding.step import StepInputs


@dataclass(frozen=True)
class Candidate:
    """A continuation of the text that went into a forward: the window or a branch.

    Attributes:
        source: name of the draft source, such as "window", "drafter", "lookup", "pool" or "topk".
        token_ids: the guesses, in the order of the text.
        verified: how many of the guesses the model verified, counted from the first. All of them, except for the
            window of a drafter.
        is_backbone: whether it is the backbone of the step rather than a branch.
    """

    source: str
    token_ids: tuple[int, ...]
    verified: int
    is_backbone: bool = False

    def accepted(self, token_ids: Sequence[int]) -> int:
        """Return how many guesses were accepted by a forward that committed `token_ids`."""
        pairs = zip(self.token_ids[: self.verified], token_ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass(frozen=True)
class StepEvent:
    """Report of one forward: what it verified, and what it added to the text.

    Attributes:
        token_ids: tokens that the forward committed: the accepted guesses of its best candidate, then one token of the
            model's own.
        candidates: continuations that the forward verified, the window first; none in the prefill and in ordinary
            decoding.
        shape: the shape of the step, as in `JacobiStats.steps_by_shape`; empty for the prefill and for ordinary
            decoding.
    """

    token_ids: tuple[int, ...]
    candidates: tuple[Candidate, ...] = ()
    shape: str = ""


class StepStreamer(BaseStreamer):
    """Base class of a `streamer=` for `generate` that receives forwards instead of tokens. Subclasses define `step`.

    A step streamer follows one sequence. With Jacobi decoding, `step` is called once for each forward, prefill
    included. So the tokens of all calls together are the output, and the number of calls is `jacobi_stats.forwards`.
    With ordinary decoding `step` is called once for each token.

    Raises:
        ValueError: `generate` was called for more than one sequence.
    """

    def step(self, step: StepEvent) -> None:
        """Receive the report of a forward, after the forward. An exception ends the call of `generate`.

        Args:
            step: what the forward verified and committed.
        """
        raise NotImplementedError

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, or a token of ordinary decoding; `generate` calls this.

        Args:
            value: int `(1, P)` for the prompt, `(1,)` for a token.
        """
        if len(value) != 1:
            raise ValueError(f"{type(self).__name__} follows one sequence; this call generates {len(value)}.")
        if value.dim() == 1:  # the prompt has one dimension more
            self.step(StepEvent(tuple(value.tolist())))

    def end(self) -> None:
        """Receive the end of the text; `generate` calls this."""


def candidates_of(inputs: StepInputs, names: Sequence[str]) -> tuple[Candidate, ...]:
    """Return the candidates of the first row of a forward, without those that have no guess.

    Args:
        inputs: the tokens of the step.
        names: sources of the segments that are verified, in their order.
    """
    layout = inputs.layout
    token_Q = inputs.token_BQ[0].tolist()
    segments = zip(layout.path_SD.tolist(), inputs.length_BS[0].tolist(), strict=True)
    guesses = [tuple(token_Q[slot] for slot in path[1 : 1 + length]) for path, length in segments]
    candidates = [
        Candidate(name, chain, len(chain), is_backbone=segment == 0)
        for segment, (name, chain) in enumerate(zip(names, guesses, strict=False))
    ]
    if layout.draft_slots:  # these hold the whole backbone; the first segment holds the part that is verified
        candidates[0] = Candidate(names[0], guesses[layout.draft_segment], len(guesses[0]), is_backbone=True)
    return tuple(candidate for candidate in candidates if candidate.token_ids)
