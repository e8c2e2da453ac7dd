"""Windows of draft tokens in a clean text, and how a decoding step moves them.

A *window* is a place in an answer, given by the position of its pending token, and the W draft tokens after it. In a
training step many windows of one text make decoding steps side by side, all with the keys and values of the same text.

Shapes: B rows, L text columns, M windows of a row, W draft tokens of a window, Q = M * W slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jacobi_hf.drafts.window import ids_of_the_text

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass(frozen=True)
class CleanText:
    """A batch of prompts with their answers, and what the model computes for them.

    Attributes:
        ids_BL: prompt and answer, padded on the right.
        prompt_B: tokens of the prompt.
        length_B: tokens of prompt and answer.
        choice_BL: the model's choice after the prompt's last token and after each token of the answer; 0 elsewhere.
        cache: keys and values of the text.
        hidden_BLH: the model's last hidden states, for soft targets.
    """

    ids_BL: torch.Tensor
    prompt_B: torch.Tensor
    length_B: torch.Tensor
    choice_BL: torch.Tensor
    cache: DynamicCache
    hidden_BLH: torch.Tensor


@dataclass(frozen=True)
class Windows:
    """Draft tokens in flight, in M windows of each text.

    Attributes:
        pending_BM: position of each window's pending token.
        draft_BMW: the draft tokens; number w is a guess for position `pending + 1 + w`.
    """

    pending_BM: torch.Tensor
    draft_BMW: torch.Tensor

    @property
    def position_BMW(self) -> torch.Tensor:
        """Positions of the draft tokens in the text."""
        return _positions(self.pending_BM, self.draft_BMW.shape[-1])


@dataclass(frozen=True)
class WindowStep:
    """Outcome of one decoding step of all windows.

    Attributes:
        loss: weighted sum over the kept slots, with gradient.
        weight: sum of the weights of the kept slots.
        kept: number of kept slots, those that the drafter learns from.
        agreeing: number of kept slots at which the drafter's choice is the model's.
        accepted_BM: draft tokens that the model accepts in each window.
        next_BMW: the drafter's choice at each kept slot; 0 at the others.
    """

    loss: torch.Tensor
    weight: torch.Tensor
    kept: torch.Tensor
    agreeing: torch.Tensor
    accepted_BM: torch.Tensor
    next_BMW: torch.Tensor


def fresh_windows(text: CleanText, pending_BM: torch.Tensor, width: int) -> Windows:
    """Return windows as the decoder begins them, with fillers for all draft tokens."""
    return Windows(pending_BM, _fillers(text, pending_BM, _positions(pending_BM, width)))


def random_windows(text: CleanText, count: int, width: int) -> Windows:
    """Return `count` fresh windows at random places of each answer, each with at least one token to predict."""
    room_B1 = (text.length_B - 1 - text.prompt_B).clamp(min=1)[:, None]
    drawn_BM = torch.rand(len(room_B1), count, device=room_B1.device)
    return fresh_windows(text, text.prompt_B[:, None] + (drawn_BM * room_B1).long(), width)


def advanced(text: CleanText, windows: Windows, step: WindowStep) -> Windows:
    """Return the windows after a step.

    The accepted tokens and one more leave each window. The drafter's choices move up, and fillers follow them.
    """
    width = windows.draft_BMW.shape[-1]
    pending_BM = windows.pending_BM + step.accepted_BM + 1
    source_BMW = step.accepted_BM[..., None] + torch.arange(width, device=pending_BM.device)
    chosen_BMW = step.next_BMW.gather(-1, source_BMW.clamp(max=width - 1))
    filler_BMW = _fillers(text, pending_BM, _positions(pending_BM, width))
    return Windows(pending_BM, torch.where(source_BMW < width, chosen_BMW, filler_BMW))


def _positions(pending_BM: torch.Tensor, width: int) -> torch.Tensor:
    """Return the positions `(B, M, W)` after each pending token."""
    return pending_BM[..., None] + 1 + torch.arange(width, device=pending_BM.device)


def _fillers(text: CleanText, pending_BM: torch.Tensor, position_BMW: torch.Tensor) -> torch.Tensor:
    """Return the tokens that the decoder puts at these positions, if it knows the text up to the pending token."""
    rows, columns = text.ids_BL.shape
    known_BMW = (pending_BM + 1).clamp(max=columns)[..., None].expand_as(position_BMW)
    index_BMW = position_BMW - text.prompt_B[:, None, None]
    filler_BQ = ids_of_the_text(index_BMW.reshape(rows, -1), text.ids_BL, known_BMW.reshape(rows, -1))
    return filler_BQ.view_as(position_BMW)


def window_mask(windows: Windows, columns: int, sliding_window: int | None = None) -> torch.Tensor:
    """Return the mask of a step: a draft token attends to the text up to its pending token, and to its own window.

    Args:
        windows: M windows of W draft tokens in each row.
        columns: L, columns of the text. The Q = M * W slots of the forward follow them.
        sliding_window: positions that a query attends to, its own included; None for no limit.

    Returns:
        bool `(B, 1, Q, L + Q)`.
    """
    rows, count, width = windows.draft_BMW.shape
    position_BQ = windows.position_BMW.reshape(rows, -1)
    column_L = torch.arange(columns, device=position_BQ.device)
    text_BQL = column_L <= windows.pending_BM.repeat_interleave(width, 1)[..., None]
    index_Q = torch.arange(count * width, device=position_BQ.device)
    own_QQ = (index_Q[:, None] // width == index_Q // width) & (index_Q[:, None] >= index_Q)
    own_BQQ = own_QQ.expand(rows, -1, -1)
    if sliding_window is not None:
        first_BQ1 = (position_BQ - sliding_window)[..., None]
        text_BQL = text_BQL & (column_L > first_BQ1)
        own_BQQ = own_BQQ & (position_BQ[:, None] > first_BQ1)
    return torch.cat([text_BQL, own_BQQ], 2)[:, None]
