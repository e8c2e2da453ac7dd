"""Watching a generation forward by forward: what was guessed, and what became text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from transformers.generation import BaseStreamer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from jacobi_hf.decoding.step import Slots


@dataclass(frozen=True)
class Candidate:
    """Guesses for the tokens behind the text, as they went into a forward.

    Attributes:
        source: "window", or the branch's "lookup", "pool" or "topk".
        token_ids: the guesses, in the order of the text.
        verified: so many of them, the first ones, were verified; all, but for the window under a drafter.
    """

    source: str
    token_ids: tuple[int, ...]
    verified: int

    def accepted(self, token_ids: Sequence[int]) -> int:
        """How many of the guesses became text, where a forward committed `token_ids`."""
        pairs = zip(self.token_ids[: self.verified], token_ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass(frozen=True)
class StepEvent:
    """What one forward did.

    Attributes:
        token_ids: the tokens that it committed; as many as its best draft had confirmed, and the model's own next one.
        drafts: what it was given to verify, the window first. None in the prefill and in ordinary decoding.
    """

    token_ids: tuple[int, ...]
    drafts: tuple[Candidate, ...] = ()


class StepStreamer(BaseStreamer):
    """A `streamer=` of `generate` that is told of forwards, not of tokens; subclasses define `step`.

    It follows one sequence. With Jacobi decoding there is one call of `step` for each forward, the prefill included, so the tokens of
    all calls are the output and their number is `jacobi_stats.forwards`. With ordinary decoding each token is a step of its own.

    Raises:
        ValueError: `generate` was called with more than one sequence.
    """

    def step(self, step: StepEvent) -> None:
        """A forward is over. What is raised here ends the call of `generate`."""
        raise NotImplementedError

    def put(self, value: torch.Tensor) -> None:
        """The prompt, and a token of ordinary decoding; called by `generate`."""
        if len(value) != 1:
            raise ValueError(f"{type(self).__name__} follows one sequence; this call generates {len(value)}.")
        if value.dim() == 1:  # the prompt has a dimension more
            self.step(StepEvent(tuple(value.tolist())))

    def end(self) -> None:
        """The text is complete; called by `generate`."""


def candidates_of(slots: Slots, names: Sequence[str]) -> tuple[Candidate, ...]:
    """What the first row has to verify in a forward; `names` are those of the segments that contend."""
    layout, token_Q = slots.layout, slots.token_BQ[0].tolist()
    segments = zip(layout.path_SD.tolist(), slots.length_BS[0].tolist(), strict=True)
    chains = [tuple(token_Q[slot] for slot in path[1 : 1 + length]) for path, length in segments]
    drafts = [Candidate(name, chain, len(chain)) for name, chain in zip(names, chains, strict=False)]
    if (
        layout.draft_slots
    ):  # the stream that drafts has the whole window, of which as much is verified as the other one has
        drafts[0] = Candidate("window", chains[layout.draft_segment], len(chains[0]))
    return tuple(draft for draft in drafts if draft.token_ids)
