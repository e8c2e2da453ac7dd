"""The Jacobi window: a rolling chain of blocks, each guess refined by the model's own choice in every step.

New tokens are numbered from 0. A row has `generated` new tokens, and the window holds guesses for the indices
`generated .. end - 1`. Block b covers the indices `b*n .. (b+1)*n - 1`, so `end` is a multiple of n. The block that
the next token falls into is the *front* block; the others are drafted ahead of it (arXiv 2512.14681, section 3.3).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import torch

from jacobi_hf.config import JACOBI, JacobiConfig
from jacobi_hf.drafts.base import DraftSource, SourceShape

if TYPE_CHECKING:
    from jacobi_hf.drafts.base import ProposalContext, StepOutcome


class JacobiWindow(DraftSource):
    """Guesses for the next `W = K * n` tokens, as the backbone of every step.

    Each guess becomes the model's choice at the slot before it (the Jacobi iteration). A place that has no such choice
    yet gets an id from the text so far.

    Attributes:
        end_B: for each row, the index of the first new token after the window.
        waits: whether a block is appended only when enough guesses of the newest block agree with the model.
    """

    name = "window"

    def __init__(self, config: JacobiConfig) -> None:
        width = config.window_width
        self.shape = SourceShape(lengths=(width,), is_backbone=True)
        self._width = width
        self._block = config.jacobi_block_size
        self._blocks = width // self._block
        self._needed = math.ceil(config.jacobi_activation_ratio * self._block)
        self._restarts = config.decoding == JACOBI
        self.waits = bool(self._needed) and not self._restarts

    @classmethod
    def for_call(cls, config: JacobiConfig, model: Any) -> Self | None:
        """Return a window unless the config asks for none (`jacobi_max_blocks=0`)."""
        return cls(config) if config.window_width else None

    def allocate(self, rows: int, columns: int, capacity: int, device: torch.device) -> None:
        """Make the buffers; see `DraftSource.allocate`."""
        self._offset_W = torch.arange(self._width, device=device)
        self._offset_n = torch.arange(self._block, device=device)
        self.end_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.grow(columns, capacity)

    def grow(self, columns: int, capacity: int) -> None:
        """Make the tables by index of new token; see `DraftSource.grow`."""
        index_L = torch.arange(columns + self._width, device=self.end_B.device)
        self.scattered_L = scattered(index_L)
        # The end for each number of new tokens, where the window never waits. In plain Jacobi decoding the next block
        # starts only when its first token is verified.
        first_L = index_L // self._block * self._block
        self.end_L = -(-index_L // self._block) * self._block if self._restarts else first_L + self._width

    def sized_by_length(self) -> list[tuple[torch.Tensor, int]]:
        """Return the tables by index of new token; see `DraftSource.sized_by_length`."""
        return [(self.scattered_L, 0), (self.end_L, 0)]

    def reset(self) -> None:
        """Begin with an empty window."""
        self.end_B.zero_()

    def observe(self, outcome: StepOutcome) -> None:
        """Move `end_B` to where the window ends after the step."""
        if not self.waits:
            torch.index_select(self.end_L, 0, outcome.generated_B, out=self.end_B)
            return
        layout = outcome.layout
        agrees_BN = outcome.acceptance.agrees_BSN[:, layout.draft_segment]
        self.append_blocks(
            outcome.before_B, outcome.generated_B, agrees_BN & (layout.offset_D[:-1] < outcome.chain_length_B1)
        )

    def append_blocks(self, before_B: torch.Tensor, generated_B: torch.Tensor, agrees_BN: torch.Tensor) -> None:
        """Append a block to each row whose newest block has enough guesses that agree with the model.

        Args:
            before_B, generated_B: new tokens of each row before and after the step.
            agrees_BN: whether the guess for index `before_B + i` was there and equals the model's choice, `i < N`.
        """
        n = self._block
        front_B = generated_B // n * n
        end_B = torch.maximum(self.end_B, front_B)
        end_B = torch.where(end_B == front_B, end_B + n, end_B)
        index_Bn = end_B[:, None] - n + self._offset_n
        place_Bn = index_Bn - before_B[:, None]
        agrees_Bn = index_Bn < generated_B[:, None]
        if agrees_BN.shape[1]:
            within_Bn = (place_Bn >= 0) & (place_Bn < agrees_BN.shape[1])
            agrees_Bn = agrees_Bn | (within_Bn & agrees_BN.gather(1, place_Bn.clamp(0, agrees_BN.shape[1] - 1)))
        run_B = agrees_Bn.long().cumprod(1).sum(1)
        appends_B = (run_B >= self._needed) & (end_B - front_B < self._blocks * n)
        self.end_B.copy_(torch.where(appends_B, end_B + n, end_B))

    def restart(
        self, generated_B: torch.Tensor, text_BL: torch.Tensor, length_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a window of ids of the text; see `DraftSource.restart`."""
        if self.waits:
            front_B = generated_B // self._block * self._block
            self.end_B.copy_(torch.where(self.end_B > front_B, self.end_B, front_B + self._block))
        else:
            torch.index_select(self.end_L, 0, generated_B, out=self.end_B)
        filler_BW = self._fillers(generated_B, text_BL, length_B)
        return filler_BW[:, None], (self.end_B - generated_B)[:, None]

    def _fillers(self, generated_B: torch.Tensor, text_BL: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        index_BW = generated_B[:, None] + self._offset_W
        return text_BL.gather(1, self.scattered_L.take(index_BW) % length_B[:, None])

    def propose(self, context: ProposalContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the window for the next step: the newest choice for each place, and ids of the text for the rest."""
        generated_B = context.outcome.generated_B
        filler_BW = self._fillers(generated_B, context.text_BL, context.text_length_B)
        guess_BW = newest_choices(context.outcome, self._offset_W, filler_BW)
        return guess_BW[:, None], (self.end_B - generated_B)[:, None]


def newest_choices(outcome: StepOutcome, offset_W: torch.Tensor, filler_BW: torch.Tensor) -> torch.Tensor:
    """Return the choice of the step for each of the next `W` tokens, and a filler where the step has made none.

    The segment that won comes first, because the guesses of the draft chain were refuted there. Where the backbone
    itself won and has draft slots, the choices in these come first: the model has chosen no token after the committed
    ones.

    Args:
        outcome: what the step did.
        offset_W: 0, 1, 2, ..
        filler_BW: ids for the places without a choice.
    """
    acceptance = outcome.acceptance
    layout = outcome.layout
    depth_BW = acceptance.count_B[:, None] + offset_W
    guess_BW = _chosen(outcome.chain_choice_BD, outcome.chain_length_B1, depth_BW, filler_BW)
    if layout.verified_segments == 1 and not layout.draft_slots:
        return guess_BW
    best_B1 = acceptance.best_B[:, None]
    length_B1 = outcome.inputs.length_BS.gather(1, best_B1)
    if layout.draft_slots:
        length_B1 = torch.where(best_B1 > 0, length_B1, acceptance.count_B[:, None] - 1)
    return _chosen(acceptance.run_BD, length_B1, depth_BW, guess_BW)


def _chosen(
    choice_BD: torch.Tensor, length_B1: torch.Tensor, depth_BW: torch.Tensor, else_BW: torch.Tensor
) -> torch.Tensor:
    """Return the choices at the given depths as far as there are valid ones, else `else_BW`."""
    choice_BW = choice_BD.gather(1, depth_BW.clamp(max=choice_BD.shape[1] - 1))
    return torch.where(depth_BW <= length_B1, choice_BW, else_BW)


def ids_of_the_text(index_BW: torch.Tensor, text_BL: torch.Tensor, text_length_BW: torch.Tensor) -> torch.Tensor:
    """Return ids drawn from the text with replacement, by a hash of the index.

    No generator is used, and a row gets the same ids in any batch.

    Args:
        index_BW: indices of the new tokens to fill.
        text_BL: prompt and output so far.
        text_length_BW: tokens of the text that may be drawn, for each row or index.
    """
    return text_BL.gather(1, scattered(index_BW) % text_length_BW)


def scattered(index: torch.Tensor) -> torch.Tensor:
    """Return a hash of each index, in 31 bits."""
    mixed = (index * 2654435761 + 974711) & 0x7FFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0x7FFFFFFF
    return mixed ^ (mixed >> 13)
