"""The loss of a drafter: weighted cross entropy, in chunks that bound the memory of the logits.

Shapes: X rows of hidden states that carry a loss, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from jacobi_hf.decoding.choice import best

Head = Callable[[torch.Tensor], torch.Tensor]


def plain_loss(
    logits_XV: torch.Tensor, label_X: torch.Tensor, weight_X: torch.Tensor, teacher_XV: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weighted sum of cross entropies; the tests compare `drafting_loss` with it.

    Args:
        logits_XV: logits of the drafter.
        label_X: the model's choices, which are the targets without `teacher_XV`.
        weight_X: weight of each row.
        teacher_XV: logits of the model, whose distributions are the targets; None for hard targets.
    """
    target = label_X if teacher_XV is None else teacher_XV.softmax(-1)
    return F.cross_entropy(logits_XV.float(), target, reduction="none") @ weight_X


def drafting_loss(
    head: Head,
    hidden_XH: torch.Tensor,
    label_X: torch.Tensor,
    weight_X: torch.Tensor,
    teacher_XH: torch.Tensor | None,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of `plain_loss` from hidden states, and the drafter's choices `(X,)`.

    With more than one chunk, the backward pass computes a chunk's logits again instead of keeping them.

    Args:
        head: the LM head, from hidden states to logits.
        hidden_XH: hidden states of the drafter.
        label_X: the model's choices.
        weight_X: weight of each row.
        teacher_XH: hidden states of the model, for soft targets; None for hard targets.
        rows: rows of a chunk.
    """
    loss = hidden_XH.new_zeros((), dtype=torch.float32)
    choices = []
    for first in range(0, len(hidden_XH), rows):
        chunk = slice(first, first + rows)
        teacher = None if teacher_XH is None else teacher_XH[chunk]
        arguments = (head, hidden_XH[chunk], label_X[chunk], weight_X[chunk], teacher)
        if len(hidden_XH) > rows and torch.is_grad_enabled():
            part, choice_X = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            part, choice_X = _chunk(*arguments)
        loss = loss + part
        choices.append(choice_X)
    return loss, torch.cat(choices) if choices else label_X


def _chunk(
    head: Head,
    hidden_XH: torch.Tensor,
    label_X: torch.Tensor,
    weight_X: torch.Tensor,
    teacher_XH: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the choices of a chunk of rows."""
    logits_XV = head(hidden_XH).float()
    teacher_XV = None
    if teacher_XH is not None:
        with torch.no_grad():
            teacher_XV = head(teacher_XH).float()
    return plain_loss(logits_XV, label_X, weight_X, teacher_XV), best(logits_XV.detach())
