"""Sources of candidate branches: recycled n-grams and n-gram lookup in the text.

A source proposes continuations of the pending token; the decoder verifies them beside the window in the same forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Text:
    """Everything committed so far, prompt included, without pads.

    Attributes:
        ids_BL: ids, `L` at least the longest row.
        length_B: tokens of each row; the last one is pending.
    """

    ids_BL: torch.Tensor
    length_B: torch.Tensor


@dataclass(frozen=True)
class Rejection:
    """What a forward had in its window, for sources that learn from what was not accepted.

    Attributes:
        token_BW1: the pending token and the guesses behind it.
        choice_BW1: the model's choice at each of them; the drafter's, where there is one and the model was not asked.
        accepted_B: guesses confirmed in the window; `width_B`: guesses that were there.
    """

    token_BW1: torch.Tensor
    choice_BW1: torch.Tensor
    accepted_B: torch.Tensor
    width_B: torch.Tensor


@dataclass(frozen=True)
class Drafts:
    """The next step's window, for sources that branch off it.

    Attributes:
        draft_BW: its guesses.
        other_BSK: for its first S guesses, the K ids that the model held likeliest after its choice.
        known_B: guesses that the model itself has made; what is behind them are fillers.
    """

    draft_BW: torch.Tensor
    other_BSK: torch.Tensor
    known_B: torch.Tensor


class CandidateSource(Protocol):
    """What the decoder asks of a source: at most `branches` branches of at most `length` tokens per step.

    Attributes:
        starts: for each branch, the guesses of the window that it follows.
    """

    name: str
    branches: int
    length: int

    @property
    def starts(self) -> tuple[int, ...]:
        """For each branch, the guesses of the window that it follows."""

    def forget(self) -> None:
        """Begin with other texts."""

    def propose(self, text: Text, drafts: Drafts | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`(token_BCL, depth_BC)`: candidates, and how far they reach behind the pending token; 0 is no candidate.

        Args:
            drafts: there where some source branches off the window.
        """

    def learn(self, rejection: Rejection) -> None:
        """Take note of a step's rejected guesses."""


class NgramPool:
    """Rejection recycling (arXiv 2512.14681, section 3.3): n-grams of rejected tails, kept as long as the sequence.

    Behind every rejected guess the forward still computed what the model would say next; that guess and the choices from there
    on are an n-gram. When the guess turns up as the pending token, the n-gram is proposed.

    Args:
        branches: proposals per step, the newest first, no two alike.
        length: tokens of a proposal.
        capacity: n-grams kept per row; the oldest are overwritten.
    """

    name = "pool"

    def __init__(
        self, branches: int, length: int, batch_size: int, device: torch.device, capacity: int = 1024
    ) -> None:
        self.branches, self.length, self.capacity = branches, length, capacity
        # One place more than the capacity, for what is not to be kept.
        self._key_BP = torch.full((batch_size, capacity + 1), -1, dtype=torch.long, device=device)
        self._gram_BPL = torch.zeros(batch_size, capacity + 1, length, dtype=torch.long, device=device)
        self._length_BP = torch.zeros(batch_size, capacity + 1, dtype=torch.long, device=device)
        self._age_BP = torch.zeros(batch_size, capacity + 1, dtype=torch.long, device=device)
        self._learnt_B = torch.zeros(batch_size, dtype=torch.long, device=device)

    def forget(self) -> None:
        """Drop all n-grams."""
        self._key_BP.fill_(-1)
        self._learnt_B.zero_()

    def learn(self, rejection: Rejection) -> None:
        """Add the n-grams that begin at the rejected guesses."""
        slot_W1 = torch.arange(rejection.token_BW1.shape[1], device=self._key_BP.device)
        width_B1 = rejection.width_B[:, None]
        rejected_BW1 = (slot_W1 > rejection.accepted_B[:, None]) & (slot_W1 <= width_B1)
        number_BW1 = self._learnt_B[:, None] + rejected_BW1.long().cumsum(
            1
        )  # of all that the row has learnt, from 1 on
        place_BW1 = torch.where(rejected_BW1, (number_BW1 - 1) % self.capacity, self.capacity)
        following_W1L = (slot_W1[:, None] + torch.arange(self.length, device=slot_W1.device)).clamp(
            max=len(slot_W1) - 1
        )
        self._gram_BPL.scatter_(
            1, place_BW1[..., None].expand(-1, -1, self.length), rejection.choice_BW1[:, following_W1L]
        )
        self._length_BP.scatter_(1, place_BW1, (width_B1 - slot_W1 + 1).clamp(0, self.length))
        self._age_BP.scatter_(1, place_BW1, number_BW1)
        self._key_BP.scatter_(1, place_BW1, rejection.token_BW1)
        self._key_BP[:, -1].fill_(-1)
        self._learnt_B += rejected_BW1.sum(1)

    @property
    def starts(self) -> tuple[int, ...]:
        """All hang on the pending token."""
        return (0,) * self.branches

    def propose(self, text: Text, drafts: Drafts | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The newest n-grams whose key is the pending token, each with another first token."""
        pending_B1 = text.ids_BL.gather(1, text.length_B[:, None] - 1)
        age_BP = torch.where(self._key_BP == pending_B1, self._age_BP + 1, 0)
        tokens, lengths = [], []
        for _ in range(self.branches):
            newest_B1 = age_BP.argmax(1, keepdim=True)
            gram_BL = self._gram_BPL.gather(1, newest_B1[..., None].expand(-1, -1, self.length))[:, 0]
            tokens.append(gram_BL)
            lengths.append(torch.where(age_BP.gather(1, newest_B1) > 0, self._length_BP.gather(1, newest_B1), 0)[:, 0])
            age_BP = age_BP.masked_fill(self._gram_BPL[:, :, 0] == gram_BL[:, :1], 0)
        return torch.stack(tokens, 1), torch.stack(lengths, 1)


class NgramLookup:
    """Prompt lookup (Saxena, 2023): what followed the last few tokens when they occurred before, in prompt or output.

    The longest match wins, of equals the latest. A match so late that fewer than `length` tokens follow it is continued with its
    own beginning: text that has begun to repeat goes on repeating.
    """

    name = "lookup"
    branches = 1

    def __init__(self, length: int, max_ngram: int = 3) -> None:
        self.length, self.max_ngram = length, max_ngram

    def forget(self) -> None:
        """Nothing: there is no memory."""

    def learn(self, rejection: Rejection) -> None:
        """Nothing: lookup knows the text alone."""

    @property
    def starts(self) -> tuple[int, ...]:
        """It hangs on the pending token."""
        return (0,)

    def propose(self, text: Text, drafts: Drafts | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """One branch per row, none where the last token is new."""
        ids_BL, last_B1 = text.ids_BL, text.length_B[:, None] - 1
        place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        run_BL = place_L < last_B1  # the last `order` tokens before and at this place equal the text's last ones
        matched_BL = torch.zeros_like(ids_BL)
        for order in range(min(self.max_ngram, ids_BL.shape[1])):
            wanted_B1 = ids_BL.gather(1, (last_B1 - order).clamp(min=0))
            equal_BL = (ids_BL == wanted_B1) & (last_B1 >= order)
            run_BL = run_BL & (place_L >= order) & equal_BL.roll(order, 1)
            matched_BL += run_BL
        found_B1 = (matched_BL * ids_BL.shape[1] + place_L).argmax(1, keepdim=True)
        period_B1 = (last_B1 - found_B1).clamp(min=1)
        index_BN = found_B1 + 1 + torch.arange(self.length, device=ids_BL.device) % period_B1
        length_B = torch.where(matched_BL.gather(1, found_B1)[:, 0] > 0, self.length, 0)
        return ids_BL.gather(1, index_BN.clamp(max=ids_BL.shape[1] - 1))[:, None], length_B[:, None]


class OtherChoices:
    """Short branches off the window: at each of its first guesses, what the model held likely beside its choice, and then the window's
    next guess.

    Branch c stands in for guess `c // 2 + 1`, with the model's second choice where c is even and its third where c is odd.

    Args:
        branches: at most so many, two for each guess.
        width: of the window.
    """

    name, length = "topk", 2
    PER_GUESS = 2

    def __init__(self, branches: int, width: int) -> None:
        self.branches = min(branches, self.PER_GUESS * width)

    @property
    def starts(self) -> tuple[int, ...]:
        """The guesses before the one that a branch stands in for."""
        return tuple(c // self.PER_GUESS for c in range(self.branches))

    def forget(self) -> None:
        """Nothing: there is no memory."""

    def learn(self, rejection: Rejection) -> None:
        """Nothing: what the model held likely comes with the drafts."""

    def propose(self, text: Text, drafts: Drafts | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Branches where the window's guess is the model's own."""
        assert drafts is not None
        start_C = torch.arange(self.branches, device=drafts.draft_BW.device) // self.PER_GUESS
        number_C = torch.arange(self.branches, device=start_C.device) % self.PER_GUESS
        last = drafts.draft_BW.shape[1] - 1
        next_BC = drafts.draft_BW[:, (start_C + 1).clamp(max=last)]
        token_BCL = torch.stack([drafts.other_BSK[:, start_C, number_C], next_BC], 2)
        depth_C = torch.where(start_C < last, start_C + 2, start_C + 1)
        return token_BCL, torch.where(start_C < drafts.known_B[:, None], depth_C, 0)
