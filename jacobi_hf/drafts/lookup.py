"""N-gram lookup: guesses copied from the text itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from jacobi_hf.config import MULTIBLOCK, JacobiConfig
from jacobi_hf.drafts.base import DraftSource, SourceShape

if TYPE_CHECKING:
    from jacobi_hf.drafts.base import ProposalContext


class NgramLookup(DraftSource):
    """One branch: the tokens that followed the last few tokens where these occurred before, in prompt or output.

    This is prompt lookup decoding (Saxena, 2023). The longest match wins; among matches of equal length the latest
    wins. If fewer than `length` tokens follow the match, the branch repeats them: a text that has begun to repeat goes
    on repeating.

    Args:
        length: tokens of the branch.
        max_ngram: the most tokens that a match compares.
    """

    name = "lookup"

    def __init__(self, length: int, max_ngram: int = 3) -> None:
        self.shape = SourceShape(lengths=(length,))
        self._length = length
        self._max_ngram = max_ngram

    @classmethod
    def for_call(cls, config: JacobiConfig, model: Any) -> Self | None:
        """Return a lookup if `jacobi_lookup_tokens` asks for one."""
        wanted = config.decoding == MULTIBLOCK and config.jacobi_lookup_tokens
        return cls(config.jacobi_lookup_tokens) if wanted else None

    def propose(self, context: ProposalContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one branch for each row; its length is 0 where the last token has not occurred before."""
        text_BL = context.text_BL
        last_B1 = context.text_length_B[:, None] - 1
        place_L = torch.arange(text_BL.shape[1], device=text_BL.device)
        run_BL = place_L < last_B1  # the last `order` tokens up to this place equal the text's last ones
        matched_BL = torch.zeros_like(text_BL)
        for order in range(min(self._max_ngram, text_BL.shape[1])):
            wanted_B1 = text_BL.gather(1, (last_B1 - order).clamp(min=0)) if order else context.pending_B1
            equal_BL = (text_BL == wanted_B1) & (last_B1 >= order)
            run_BL = run_BL & (place_L >= order) & equal_BL.roll(order, 1)
            matched_BL += run_BL
        found_B1 = (matched_BL * text_BL.shape[1] + place_L).argmax(1, keepdim=True)
        period_B1 = (last_B1 - found_B1).clamp(min=1)
        index_BN = found_B1 + 1 + torch.arange(self._length, device=text_BL.device) % period_B1
        token_BN = text_BL.gather(1, index_BN.clamp(max=text_BL.shape[1] - 1))
        length_B1 = torch.where(matched_BL.gather(1, found_B1) > 0, self._length, 0)
        return token_BN[:, None], length_B1
