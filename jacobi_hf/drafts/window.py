"""The drafts in flight: a chain of blocks behind the pending token.

New tokens are numbered from 0. A row has `generated` tokens, the last of which is pending, and guesses for the indices
`generated .. end - 1`. Block b covers the indices `b*n .. (b+1)*n - 1`, so `end` is a multiple of n, a fresh first block has n-1
guesses behind its verified first token, and the real-active block is the one that the next token falls into.
"""

from __future__ import annotations

import math

import torch

from jacobi_hf.config import JACOBI, JacobiConfig


class Window:
    """Guesses of a batch and the rule by which blocks are appended.

    Attributes:
        front_BX: what a forward begins with, `X = 1 + W`, `W = K * n`: the pending token, then guesses, the first for index `generated_B`.
        end_B: first index behind the guesses.
        waits: whether a block is appended only when enough of the newest one agrees.

    Both tensors keep their address. `columns` is the most new tokens of a row.
    """

    def __init__(self, config: JacobiConfig, batch_size: int, columns: int, device: torch.device) -> None:
        width = config.window_width
        self._block = n = config.jacobi_block_size
        self._blocks = width // n
        self._needed = math.ceil(config.jacobi_activation_ratio * n)
        restarts = config.decoding == JACOBI
        self.waits = bool(self._needed and self._blocks and not restarts)
        self._offset_X, self._offset_n = torch.arange(-1, width, device=device), torch.arange(n, device=device)
        index_T = torch.arange(columns + width, device=device)
        self.scattered_T = scattered(index_T)
        # The end by the number of tokens. Where decoding restarts, a finished block is followed by the next one only when the first
        # token of that is verified.
        self.end_T = -(-index_T // n) * n if restarts else (index_T // n + self._blocks) * n
        self.front_BX = torch.zeros(batch_size, 1 + width, dtype=torch.long, device=device)
        self.end_B = torch.zeros(batch_size, dtype=torch.long, device=device)

    @property
    def draft_BW(self) -> torch.Tensor:
        """The guesses, a view."""
        return self.front_BX[:, 1:]

    def append_blocks(self, before_B: torch.Tensor, generated_B: torch.Tensor, agrees_BD: torch.Tensor | None) -> None:
        """Move `end_B` on after a step that brought a row from `before_B` to `generated_B` tokens.

        Args:
            agrees_BD: whether the window's guess for index `before_B + d - 1` was there and equalled the model's choice, d = 1..D; may
                be None unless this window `waits`.
        """
        if not self.waits:
            torch.index_select(self.end_T, 0, generated_B, out=self.end_B)
            return
        assert agrees_BD is not None
        n = self._block
        front_B = generated_B // n * n
        end_B = torch.maximum(self.end_B, front_B)
        end_B = torch.where(end_B == front_B, end_B + n, end_B)
        index_Bn = end_B[:, None] - n + self._offset_n
        depth_Bn = index_Bn - before_B[:, None]
        agrees_Bn = index_Bn < generated_B[:, None]
        if agrees_BD.shape[1]:
            within_Bn = (depth_Bn >= 0) & (depth_Bn < agrees_BD.shape[1])
            agrees_Bn = agrees_Bn | (within_Bn & agrees_BD.gather(1, depth_Bn.clamp(0, agrees_BD.shape[1] - 1)))
        run_B = agrees_Bn.long().cumprod(1).sum(1)
        appends_B = (run_B >= self._needed) & (end_B - front_B < self._blocks * n)
        self.end_B.copy_(torch.where(appends_B, end_B + n, end_B))

    def redraft(
        self,
        generated_B: torch.Tensor,
        count_B: torch.Tensor,
        choices: list[tuple[torch.Tensor, torch.Tensor]],
        text_BL: torch.Tensor,
        text_length_B: torch.Tensor,
    ) -> None:
        """The Jacobi update: every guess becomes the model's newest choice, and what has none an id of the text so far.

        Args:
            generated_B, count_B: new tokens of each row by now, and those of them that were committed in this step.
            choices: `(choice_BD, length_B1)`, best first: `choice_BD[:, d]` is the choice for the d-th token behind the former
                pending one, and there is one for `d <= length_B1`. That for `count_B - 1` is the new pending token; it is there in all
                rows that have not halted (the others' are never used).
        """
        depth_BX = count_B[:, None] + self._offset_X
        front_BX = text_BL.gather(
            1, self.scattered_T.take(generated_B[:, None] + self._offset_X) % text_length_B[:, None]
        )
        for choice_BD, length_B1 in reversed(choices):
            known_BX = depth_BX <= length_B1
            front_BX = torch.where(known_BX, choice_BD.gather(1, depth_BX.clamp(0, choice_BD.shape[1] - 1)), front_BX)
        self.front_BX.copy_(front_BX)


def ids_of_the_text(index_BW: torch.Tensor, text_BL: torch.Tensor, text_length_BW: torch.Tensor) -> torch.Tensor:
    """Ids drawn from the text with replacement, by a hash of the index: no generator, and the same in any batch.

    Args:
        index_BW: new-token indices to fill.
        text_BL: prompt and output so far, of which the first `text_length_BW` ids count, per row or per index.
    """
    return text_BL.gather(1, scattered(index_BW) % text_length_BW)


def scattered(index: torch.Tensor) -> torch.Tensor:
    """A hash of each index, in 31 bits."""
    mixed = (index * 2654435761 + 974711) & 0x7FFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0x7FFFFFFF
    return mixed ^ (mixed >> 13)
