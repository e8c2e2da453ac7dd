"""The losses of Jacobi Forcing, from hidden states, without all logits in memory at once.

- AR: next-token cross entropy.
- Consistency (arXiv 2512.14681, eq. 8): cross entropy of the model's distribution at a slot of a noisy block, the
  student, against its own distribution at the same slot of the clean block, the teacher. Both come from one forward
  pass; the teacher has no gradient.
- KL: divergence from the distribution of a frozen model, where there is a label for the AR loss.

`plain_losses` says what they are; `chunked_losses` computes the same with less memory.

Suffixes of tensor names: R rows (all slots of the batch, `B * L`), A rows that are labelled or teach, X rows that are
students, G sums of the AR loss, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100
REDUCTIONS = ("mean", "block_sum", "reference")
# Most numbers in one tensor of a chunk, rows times vocabulary. A handful of such tensors with 4 bytes a number exist
# at once.
CHUNK_NUMBERS = 2**24

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Targets:
    """What each row learns, and with which weight.

    Attributes:
        label_R: id of the next token, `IGNORE` if the row has no AR loss.
        label_weight_RG: weight of the row's AR loss in each of G sums (for example: trajectories, replay).
        teacher_R: for a student, the row of its teacher; -1 for any other row.
        pair_weight_R: weight of the row's consistency loss.
        kl_weight: weight of each labelled row in the sum of the KL divergences.
    """

    label_R: torch.Tensor
    label_weight_RG: torch.Tensor
    teacher_R: torch.Tensor
    pair_weight_R: torch.Tensor
    kl_weight: float | torch.Tensor = 0.0


@dataclass(frozen=True)
class Reference:
    """The frozen model of the KL loss: its LM head, and its hidden states of the same rows."""

    head: Head
    hidden_RH: torch.Tensor

    def logits(self, row_A: torch.Tensor) -> torch.Tensor:
        """Return the logits `(A, V)` of some rows."""
        with torch.no_grad():
            return self.head(self.hidden_RH[row_A]).float()


@dataclass(frozen=True)
class Losses:
    """Weighted sums of the losses over a batch.

    Attributes:
        ar_G, consistency, kl: the losses, with gradient. kl is 0 without a `Reference`.
        agreeing: how many students already choose, greedily, the next token of the clean block.
        judged: how many students there are whose next token is known.
    """

    ar_G: torch.Tensor
    consistency: torch.Tensor
    kl: torch.Tensor
    agreeing: torch.Tensor
    judged: torch.Tensor


def plain_losses(
    logits_RV: torch.Tensor,
    targets: Targets,
    temperature: float = 1.0,
    reference_logits_RV: torch.Tensor | None = None,
) -> Losses:
    """Return the losses from all logits at once. The tests compare `chunked_losses` with it.

    Args:
        logits_RV: logits of the trained model.
        targets: what each row learns.
        temperature: temperature of teacher and student in the consistency loss.
        reference_logits_RV: logits of the frozen model; None for no KL loss.
    """
    logits_RV = logits_RV.float()
    ar_R = F.cross_entropy(logits_RV, targets.label_R, ignore_index=IGNORE, reduction="none")
    student_X = (targets.teacher_R >= 0).nonzero().flatten()
    teacher_X = targets.teacher_R[student_X]
    teacher_XV = (logits_RV[teacher_X].detach() / temperature).softmax(-1)
    student_XV = (logits_RV[student_X] / temperature).log_softmax(-1)
    consistency_X = -(teacher_XV * student_XV).sum(-1)
    judged_X = targets.label_R[teacher_X] != IGNORE
    agreeing_X = judged_X & (student_XV.argmax(-1) == targets.label_R[teacher_X])
    kl = logits_RV.new_zeros(())
    if reference_logits_RV is not None:
        reference_RV = reference_logits_RV.float().log_softmax(-1)
        kl_R = (reference_RV.exp() * (reference_RV - logits_RV.log_softmax(-1))).sum(-1)
        kl = kl_R[targets.label_R != IGNORE].sum() * targets.kl_weight
    consistency = (consistency_X * targets.pair_weight_R[student_X]).sum()
    return Losses(ar_R @ targets.label_weight_RG, consistency, kl, agreeing_X.sum(), judged_X.sum())


def chunked_losses(
    head: Head,
    hidden_RH: torch.Tensor,
    targets: Targets,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_numbers: int = CHUNK_NUMBERS,
    reference: Reference | None = None,
) -> Losses:
    """Return the losses from hidden states, with the logits of one chunk of rows in memory at a time.

    Only rows that are labelled, teach or learn from a teacher go through the head. A chunk has teachers together with
    their students, so a row goes through the head once if no teacher has more than one student. With several chunks,
    the backward pass computes the logits of each chunk again instead of keeping them.

    Args:
        head: LM head, from hidden states `(A, H)` to logits `(A, V)`.
        hidden_RH: hidden states of the trained model.
        targets: what each row learns.
        vocab_size: V.
        temperature: temperature of teacher and student in the consistency loss.
        chunk_numbers: most numbers in a chunk's logits; with V it gives the rows of a chunk.
        reference: the frozen model of the KL loss; None for no KL loss.
    """
    student_X = (targets.teacher_R >= 0).nonzero().flatten()
    teacher_X = targets.teacher_R[student_X]
    by_teacher_X = teacher_X.argsort(stable=True)
    student_X = student_X[by_teacher_X]
    teacher_X = teacher_X[by_teacher_X]
    in_head_R = targets.label_R != IGNORE
    in_head_R = in_head_R.scatter(0, teacher_X, torch.ones_like(teacher_X, dtype=torch.bool))
    row_A = in_head_R.nonzero().flatten()
    # Index of each student's teacher among row_A. Both are in order, so the students of a chunk are neighbours.
    taught_X = torch.searchsorted(row_A, teacher_X)
    rows = max(1, chunk_numbers // vocab_size // 2)
    firsts = list(range(0, len(row_A), rows))
    begins = torch.searchsorted(taught_X, torch.tensor(firsts, dtype=torch.long, device=taught_X.device)).tolist()
    totals = hidden_RH.new_zeros(targets.label_weight_RG.shape[1] + 4, dtype=torch.float32)
    for first, begin, end in zip(firsts, begins, [*begins[1:], len(taught_X)], strict=False):
        # If a chunk has more students than rows, further rounds take the others and compute their teachers again.
        for start in range(begin, max(end, begin + 1), rows):
            stop = min(end, start + rows)
            chunk = (row_A[first : first + rows], taught_X[start:stop] - first, student_X[start:stop])
            arguments = (head, hidden_RH, *chunk, targets, start == begin, temperature, reference)
            if len(row_A) + len(student_X) > 2 * rows and torch.is_grad_enabled():
                part: torch.Tensor = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                part = _chunk(*arguments)
            totals = totals + part
    *_, consistency, kl, agreeing, judged = totals
    return Losses(totals[:-4], consistency, kl, agreeing.detach(), judged.detach())


def _chunk(
    head: Head,
    hidden_RH: torch.Tensor,
    row_A: torch.Tensor,
    taught_X: torch.Tensor,
    student_X: torch.Tensor,
    targets: Targets,
    with_ar: bool,
    temperature: float,
    reference: Reference | None,
) -> torch.Tensor:
    """Return `[*ar_G, consistency, kl, agreeing, judged]` of one chunk.

    Args:
        row_A: rows of the chunk that are labelled or teach.
        taught_X: for each student of the chunk, the index of its teacher in row_A.
        student_X: rows of the students.
        with_ar: whether to add the AR and KL losses of row_A; a further round of a chunk leaves them out.
        head, hidden_RH, targets, temperature, reference: as in `chunked_losses`.
    """
    logits = head(hidden_RH[torch.cat([row_A, student_X])]).float()
    logits_AV, student_XV = logits.split([len(row_A), len(student_X)])
    label_A = targets.label_R[row_A]
    ar_G = torch.zeros_like(targets.label_weight_RG[0])
    kl = logits.new_zeros(())
    if with_ar:
        log_AV = logits_AV.log_softmax(-1)
        ar_A = F.nll_loss(log_AV, label_A, ignore_index=IGNORE, reduction="none")
        ar_G = ar_A @ targets.label_weight_RG[row_A]
        if reference is not None:
            log_reference_AV = reference.logits(row_A).log_softmax(-1)
            kl_A = torch.linalg.vecdot(log_reference_AV.exp(), log_reference_AV - log_AV)
            kl = kl_A[label_A != IGNORE].sum() * targets.kl_weight
    if temperature != 1.0:
        student_XV = student_XV / temperature
    teacher_XV = (logits_AV.detach()[taught_X] / temperature).softmax(-1)
    consistency_X = F.cross_entropy(student_XV, teacher_XV, reduction="none")
    consistency = (consistency_X * targets.pair_weight_R[student_X]).sum()
    label_X = label_A[taught_X]
    judged_X = label_X != IGNORE
    agreeing = (judged_X & (student_XV.detach().argmax(-1) == label_X)).sum()
    return torch.cat([ar_G, torch.stack([consistency, kl, agreeing.float(), judged_X.sum().float()])])
