"""N-gram lookup: guesses copied from the text itself, on the device for all rows at once or on the host row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from jacobi_hf.config import MULTIBLOCK, JacobiConfig
from jacobi_hf.drafts.base import DraftSource, SourceShape

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jacobi_hf.drafts.base import ProposalContext

MAX_NGRAM = 3


class NgramIndex:
    """A text with the place of each of its n-grams, to look up on the host what `NgramLookup` looks up on the device.

    Args:
        max_ngram: the most tokens of an n-gram.
    """

    def __init__(self, max_ngram: int = MAX_NGRAM) -> None:
        self._max_ngram = max_ngram
        self._ids: list[int] = []
        self._place: dict[tuple[int, ...], int] = {}  # where each n-gram ended last, before the end of the text

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens to the text."""
        text = self._ids
        for token in ids:
            last = len(text)
            for order in range(1, min(self._max_ngram, last) + 1):
                self._place[tuple(text[last - order :])] = last - 1
            text.append(token)

    def match(self) -> tuple[int, int]:
        """Return where the longest n-gram at the end of the text ended before, and its length; 0 and 0 for none."""
        text = self._ids
        for order in range(min(self._max_ngram, len(text)), 0, -1):
            place = self._place.get(tuple(text[-order:]))
            if place is not None:
                return place, order
        return 0, 0

    def after(self, place: int, count: int) -> list[int]:
        """Return the `count` tokens after a place; where the text ends, they begin again after that place."""
        text = self._ids
        found = text[place + 1 : place + 1 + count]
        while len(found) < count:
            found += found[: count - len(found)]
        return found


class NgramLookup(DraftSource):
    """One branch: the tokens that followed the last few tokens where these occurred before, in prompt or output.

    This is prompt lookup decoding (Saxena, 2023). The longest match wins; among matches of equal length the latest
    wins. If fewer than `length` tokens follow the match, the branch repeats them: a text that has begun to repeat goes
    on repeating.

    On a CPU, the host looks up the tokens (`jacobi_hf.decoding.host_lookup`), because it can read the text at no cost.

    Args:
        length: tokens of the branch.
        max_ngram: the most tokens that a match compares.
    """

    ON_HOST: tuple[str, ...] = ("cpu",)  # devices whose tensors the host reads at no cost
    name = "lookup"
    reads_text_alone = True

    def __init__(self, length: int, max_ngram: int = MAX_NGRAM) -> None:
        self.shape = SourceShape(lengths=(length,))
        self._length = length
        self._max_ngram = max_ngram

    @classmethod
    def for_call(cls, config: JacobiConfig, model: Any) -> Self | None:
        """Return a lookup if `jacobi_lookup_tokens` asks for one."""
        wanted = config.decoding == MULTIBLOCK and config.jacobi_lookup_tokens
        return cls(config.jacobi_lookup_tokens) if wanted else None

    def allocate(self, rows: int, columns: int, capacity: int, device: torch.device) -> None:
        """Choose host or device; see `DraftSource.allocate`."""
        self.is_on_host = device.type in self.ON_HOST
        if not self.is_on_host:
            self.order_B = torch.zeros(rows, dtype=torch.long, device=device)

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
        order_B1 = matched_BL.gather(1, found_B1)
        if self.order_B is not None:
            self.order_B.copy_(order_B1[:, 0])
        length_B1 = torch.where(order_B1 > 0, self._length, 0)
        return token_BN[:, None], length_B1
