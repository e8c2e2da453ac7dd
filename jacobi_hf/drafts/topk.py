"""Top-k branches: the model's second and third choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from jacobi_hf.config import MULTIBLOCK, JacobiConfig
from jacobi_hf.drafts.base import DraftSource, SourceShape

if TYPE_CHECKING:
    from jacobi_hf.drafts.base import ProposalContext

PER_GUESS = 2  # branches that stand in for the same guess


class TopKBranches(DraftSource):
    """Branches of two tokens that replace one of the first backbone guesses.

    Branch c replaces guess `c // 2 + 1`, by the model's second choice where c is even and by its third choice where c
    is odd. Its second token is the next guess of the backbone.

    Args:
        branches: branches in each step, at most two for each guess of the backbone.
        width: guesses of the backbone.
    """

    name = "topk"

    def __init__(self, branches: int, width: int) -> None:
        count = min(branches, PER_GUESS * width)
        starts = tuple(branch // PER_GUESS for branch in range(count))
        self.shape = SourceShape(lengths=(2,) * count, starts=starts, ranks=1 + PER_GUESS)
        self._count = count

    @classmethod
    def for_call(cls, config: JacobiConfig, model: Any) -> Self | None:
        """Return the branches if `jacobi_topk_branches` asks for some and there is a backbone to branch from."""
        wanted = config.decoding == MULTIBLOCK and config.jacobi_topk_branches and config.window_width
        return cls(config.jacobi_topk_branches, config.window_width) if wanted else None

    def allocate(self, rows: int, columns: int, capacity: int, device: torch.device) -> None:
        """Make the index tensors; see `DraftSource.allocate`."""
        number_S = torch.arange(self._count, device=device)
        self._start_S = number_S // PER_GUESS
        self._rank_S = number_S % PER_GUESS
        self._row_B1 = torch.arange(rows, device=device)[:, None]
        self._offset_N = torch.arange(1 + max(self.shape.starts), device=device)

    def propose(self, context: ProposalContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return branches from the scores at the slots that the first guesses of the backbone come from.

        A branch is proposed only where the guess that it replaces is the model's own choice.
        """
        outcome = context.outcome
        layout = outcome.layout
        backbone_BW = context.backbone_BW
        assert backbone_BW is not None
        last = backbone_BW.shape[1] - 1
        count_B = outcome.acceptance.count_B
        path_D = layout.path_SD[layout.draft_segment]
        depth_BN = count_B[:, None] + self._offset_N
        slot_BN = path_D[depth_BN.clamp(max=path_D.shape[0] - 1)]
        ranked_BQR = outcome.acceptance.ranked_BQR
        assert ranked_BQR is not None
        ranked_BNR = ranked_BQR[self._row_B1, slot_BN]
        other_BS = ranked_BNR[:, self._start_S, 1 + self._rank_S]
        next_BS = backbone_BW[:, (self._start_S + 1).clamp(max=last)]
        known_B1 = (outcome.chain_length_B1 + 1 - count_B[:, None]).clamp(min=0)
        length_S = torch.where(self._start_S < last, self._start_S + 2, self._start_S + 1)
        length_BS = torch.where(self._start_S < known_B1, length_S, 0)
        return torch.stack([other_BS, next_BS], 2), length_BS
