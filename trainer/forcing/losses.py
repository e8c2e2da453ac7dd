"""The two losses of Jacobi Forcing, computed from hidden states without a vocabulary-sized tensor beyond one chunk.

AR: next-token cross entropy. Consistency (arXiv 2512.14681, eq. 8): cross entropy of the model's distribution at a slot of a
noisy block against its own detached distribution at the same slot of the clean block, in the same forward. KL: divergence from a
frozen model's distribution where AR has a label.

Shapes: R rows of hidden states flattened over the batch (`R = B * L`), H hidden size, V vocabulary, N rows that carry a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100
REDUCTIONS = ("mean", "block_sum", "reference")
# Vocabulary-sized tensors of a chunk hold at most this many numbers (times a handful of copies, of 4 bytes each).
CHUNK_NUMBERS = 2**24

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Targets:
    """What each of R rows is to learn.

    Attributes:
        label_R: the next token, `IGNORE` where there is none.
        label_weight_RG: float weights of that cross entropy in G sums (trajectories and replay, say).
        teacher_R: for a row of a noisy block that carries a consistency loss, the row of its clean counterpart; else -1.
        pair_weight_R: float weight of that consistency loss.
        kl_weight: of each labelled row, in the sum of KL divergences.
    """

    label_R: torch.Tensor
    label_weight_RG: torch.Tensor
    teacher_R: torch.Tensor
    pair_weight_R: torch.Tensor
    kl_weight: float | torch.Tensor = 0.0


@dataclass(frozen=True)
class Reference:
    """The frozen model that KL is measured from: its hidden states, of the same rows, and its LM head."""

    head: Head
    hidden_RH: torch.Tensor

    def logits(self, row_N: torch.Tensor) -> torch.Tensor:
        """Of some rows, `(N, V)`."""
        with torch.no_grad():
            return self.head(self.hidden_RH[row_N]).float()


@dataclass(frozen=True)
class Losses:
    """Weighted sums over a batch.

    Attributes:
        ar_G, consistency, kl: the losses, with gradient; `kl` is 0 without a `Reference`.
        agreeing, judged: student rows whose greedy choice already is the fixed point's next token, out of those where that
            token is known.
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
    """The losses from all logits at once: what `chunked_losses` is checked against."""
    logits_RV = logits_RV.float()
    ar_R = F.cross_entropy(logits_RV, targets.label_R, ignore_index=IGNORE, reduction="none")
    pupil_N = (targets.teacher_R >= 0).nonzero().flatten()
    teacher_N = targets.teacher_R[pupil_N]
    teacher_NV = (logits_RV[teacher_N].detach() / temperature).softmax(-1)
    student_NV = (logits_RV[pupil_N] / temperature).log_softmax(-1)
    consistency_N = -(teacher_NV * student_NV).sum(-1)
    judged_N = targets.label_R[teacher_N] != IGNORE
    agreeing_N = judged_N & (student_NV.argmax(-1) == targets.label_R[teacher_N])
    kl = logits_RV.new_zeros(())
    if reference_logits_RV is not None:
        reference_RV = reference_logits_RV.float().log_softmax(-1)
        kl_R = (reference_RV.exp() * (reference_RV - logits_RV.log_softmax(-1))).sum(-1)
        kl = kl_R[targets.label_R != IGNORE].sum() * targets.kl_weight
    consistency = (consistency_N * targets.pair_weight_R[pupil_N]).sum()
    return Losses(ar_R @ targets.label_weight_RG, consistency, kl, agreeing_N.sum(), judged_N.sum())


def chunked_losses(
    head: Head,
    hidden_RH: torch.Tensor,
    targets: Targets,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_numbers: int = CHUNK_NUMBERS,
    reference: Reference | None = None,
) -> Losses:
    """The same losses from hidden states.

    Only rows that carry a loss or teach reach the head, in chunks that hold teachers together with their students, so that
    with one student a teacher each row passes through the head once. With more than one chunk, the backward pass computes a
    chunk's logits again instead of keeping them.

    Args:
        head: hidden states `(N, H)` to logits `(N, V)`.
        vocab_size: V, which with `chunk_numbers` gives the rows per chunk.
        reference: what KL is measured from; None for no KL.
    """
    student_N = (targets.teacher_R >= 0).nonzero().flatten()
    teacher_N = targets.teacher_R[student_N]
    student_N, teacher_N = student_N[teacher_N.argsort(stable=True)], teacher_N.sort(stable=True).values
    is_base_R = targets.label_R != IGNORE
    is_base_R = is_base_R.scatter(0, teacher_N, torch.ones_like(teacher_N, dtype=torch.bool))
    base_N = is_base_R.nonzero().flatten()
    # Where each student's teacher stands among the base rows; both are in order, so a chunk's students are neighbours.
    place_N = torch.searchsorted(base_N, teacher_N)
    rows = max(1, chunk_numbers // vocab_size // 2)
    firsts = list(range(0, len(base_N), rows))
    begins = torch.searchsorted(place_N, torch.tensor(firsts, dtype=torch.long, device=place_N.device)).tolist()
    totals = hidden_RH.new_zeros(targets.label_weight_RG.shape[1] + 4, dtype=torch.float32)
    for first, begin, end in zip(firsts, begins, [*begins[1:], len(place_N)], strict=False):
        # Students beyond the size of a chunk come in rounds of their own, with their teachers computed again.
        for start in range(begin, max(end, begin + 1), rows):
            stop = min(end, start + rows)
            base_C = base_N[first : first + rows]
            rows_of_chunk = (base_C, place_N[start:stop] - first, student_N[start:stop])
            arguments = (head, hidden_RH, *rows_of_chunk, targets, start == begin, temperature, reference)
            if len(base_N) + len(student_N) > 2 * rows and torch.is_grad_enabled():
                part: torch.Tensor = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                part = _chunk(*arguments)
            totals = totals + part
    *_, consistency, kl, agreeing, judged = totals
    return Losses(totals[:-4], consistency, kl, agreeing.detach(), judged.detach())


def _chunk(
    head: Head,
    hidden_RH: torch.Tensor,
    base_C: torch.Tensor,
    taught_S: torch.Tensor,
    student_S: torch.Tensor,
    targets: Targets,
    with_ar: bool,
    temperature: float,
    reference: Reference | None,
) -> torch.Tensor:
    """`[*ar_G, consistency, kl, agreeing, judged]` of the rows `base_C` and of the students `student_S` of `base_C[taught_S]`."""
    logits_NV = head(hidden_RH[torch.cat([base_C, student_S])]).float()
    base_CV, student_SV = logits_NV[: len(base_C)], logits_NV[len(base_C) :]
    label_C = targets.label_R[base_C]
    kl = logits_NV.new_zeros(())
    if with_ar:
        log_base_CV = base_CV.log_softmax(-1)
        ar_C = F.nll_loss(log_base_CV, label_C, ignore_index=IGNORE, reduction="none")
        ar_G = ar_C @ targets.label_weight_RG[base_C]
        if reference is not None:
            log_reference_CV = reference.logits(base_C).log_softmax(-1)
            kl_C = torch.linalg.vecdot(log_reference_CV.exp(), log_reference_CV - log_base_CV)
            kl = kl_C[label_C != IGNORE].sum() * targets.kl_weight
    else:
        ar_G = torch.zeros_like(targets.label_weight_RG[0])
    if temperature != 1.0:
        student_SV = student_SV / temperature
    teacher_SV = (base_CV.detach()[taught_S] / temperature).softmax(-1)
    consistency_S = F.cross_entropy(student_SV, teacher_SV, reduction="none")
    consistency = (consistency_S * targets.pair_weight_R[student_S]).sum()
    label_S = label_C[taught_S]
    judged_S = label_S != IGNORE
    agreeing = (judged_S & (student_SV.detach().argmax(-1) == label_S)).sum()
    return torch.cat([ar_G, torch.stack([consistency, kl, agreeing.float(), judged_S.sum().float()])])
