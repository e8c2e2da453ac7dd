"""The n-gram pool: guesses recycled from rejected ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from jacobi_hf.config import MULTIBLOCK, JacobiConfig
from jacobi_hf.drafts.base import DraftSource, SourceShape

if TYPE_CHECKING:
    from jacobi_hf.drafts.base import ProposalContext, StepOutcome


class NgramPool(DraftSource):
    """Branches made of n-grams from earlier steps (rejection recycling, arXiv 2512.14681, section 3.3).

    The forward also computes what the model would say after a rejected guess. That guess and the choices from there on
    are an n-gram. When the guess turns up as the pending token, the pool proposes the choices.

    Args:
        branches: proposals in each step: the newest n-grams, each with another first token.
        length: the most tokens of a proposal.
        capacity: n-grams that are kept for each row; the oldest are overwritten.
    """

    name = "pool"

    def __init__(self, branches: int, length: int, capacity: int = 1024) -> None:
        self.shape = SourceShape(lengths=(length,) * branches)
        self._branches = branches
        self._length = length
        self._capacity = capacity

    @classmethod
    def for_call(cls, config: JacobiConfig, model: Any) -> Self | None:
        """Return a pool if `jacobi_pool_size` asks for one and there is a backbone to learn from."""
        wanted = config.decoding == MULTIBLOCK and config.jacobi_pool_size and config.window_width
        return cls(config.jacobi_pool_size, config.jacobi_branch_length) if wanted else None

    def allocate(self, rows: int, columns: int, capacity: int, device: torch.device) -> None:
        """Make the buffers; see `DraftSource.allocate`."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        # G places for n-grams. The last one is for n-grams that are not to be kept.
        places = self._capacity + 1
        self._key_BG = zeros(rows, places) - 1
        self._token_BGN = zeros(rows, places, self._length)
        self._length_BG = zeros(rows, places)
        self._number_BG = zeros(rows, places)
        self._learnt_B = zeros(rows)

    def reset(self) -> None:
        """Drop all n-grams."""
        self._key_BG.fill_(-1)
        self._learnt_B.zero_()

    def observe(self, outcome: StepOutcome) -> None:
        """Add the n-grams that begin at rejected guesses of the backbone."""
        if outcome.chain_choice_BD.shape[1] > 1:
            accepted_B = outcome.acceptance.accepted_BS[:, 0]
            self.learn(outcome.chain_token_BD, model_choices(outcome), accepted_B, outcome.chain_length_B1)

    def learn(
        self, token_BD: torch.Tensor, choice_BD: torch.Tensor, accepted_B: torch.Tensor, length_B1: torch.Tensor
    ) -> None:
        """Add the n-grams of a chain of guesses.

        Args:
            token_BD: the pending token and the guesses after it.
            choice_BD: the choice after each of them.
            accepted_B: guesses that were accepted.
            length_B1: guesses that are valid.
        """
        depth_D = torch.arange(token_BD.shape[1], device=token_BD.device)
        rejected_BD = (depth_D > accepted_B[:, None]) & (depth_D <= length_B1)
        number_BD = self._learnt_B[:, None] + rejected_BD.long().cumsum(1)  # counts all n-grams of the row, from 1
        place_BD = torch.where(rejected_BD, (number_BD - 1) % self._capacity, self._capacity)
        depth_DN = (depth_D[:, None] + torch.arange(self._length, device=depth_D.device)).clamp(max=len(depth_D) - 1)
        self._token_BGN.scatter_(1, place_BD[..., None].expand(-1, -1, self._length), choice_BD[:, depth_DN])
        self._length_BG.scatter_(1, place_BD, (length_B1 - depth_D + 1).clamp(0, self._length))
        self._number_BG.scatter_(1, place_BD, number_BD)
        self._key_BG.scatter_(1, place_BD, token_BD)
        self._key_BG[:, -1].fill_(-1)
        self._learnt_B += rejected_BD.sum(1)

    def propose(self, context: ProposalContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the newest n-grams whose first guess is the pending token, each with another first token."""
        age_BG = torch.where(self._key_BG == context.pending_B1, self._number_BG + 1, 0)
        tokens = []
        lengths = []
        for _ in range(self._branches):
            newest_B1 = age_BG.argmax(1, keepdim=True)
            token_BN = self._token_BGN.gather(1, newest_B1[..., None].expand(-1, -1, self._length))[:, 0]
            length_B1 = self._length_BG.gather(1, newest_B1)
            tokens.append(token_BN)
            lengths.append(torch.where(age_BG.gather(1, newest_B1) > 0, length_B1, 0)[:, 0])
            age_BG = age_BG.masked_fill(self._token_BGN[:, :, 0] == token_BN[:, :1], 0)
        return torch.stack(tokens, 1), torch.stack(lengths, 1)


def model_choices(outcome: StepOutcome) -> torch.Tensor:
    """Return the choice after each token of the draft chain, by the model itself wherever it was asked.

    With draft slots the chain's choices are the drafter's. The model has verified the first guesses of the same chain,
    and what follows a refuted guess is for the model to say.
    """
    layout = outcome.layout
    if not layout.draft_slots:
        return outcome.chain_choice_BD
    depths = outcome.chain_choice_BD.shape[1]
    verified_BD = layout.offset_D[:depths] <= outcome.inputs.length_BS[:, :1]
    model_BD = outcome.acceptance.choice_BQ[:, layout.path_SD[0, :depths]]
    return torch.where(verified_BD, model_BD, outcome.chain_choice_BD)
