"""The choice at every slot, greedy or sampled, in blocks of slots.

Sampling is greedy decoding of noisy scores, see `jacobi_hf.decoding.noise`.

The logits of a step can be large, and processors and softmax make several tensors of the same size. So only a block of
slots is processed at a time, and nothing but the logits is as large as the logits.

Shapes: B rows, Q slots of a forward, V vocabulary, I indices of new tokens. R is a number of slots of any rows: the
slots of all rows one after another, or some of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from jacobi_hf.decoding.noise import SamplingNoise

# From this number of scores on, `best` looks at pieces of them.
PIECES_FROM = 1 << 16
PIECE = 128
# Scores of a block. On the CPU, blocks that fit in its caches are fastest. Elsewhere, and in compiled steps, each
# block costs launches or code.
SMALL_BLOCK = 1 << 18
LARGE_BLOCK = 1 << 24
# For each slot of a block, processors and softmax hold up to about eight times the size of its scores. So a block of
# a 16th of the slots takes about half as much memory as the logits.
BLOCKS_OF_THREADS = 16


@dataclass(frozen=True)
class Choice:
    """What the model chooses at every slot.

    Attributes:
        token_BQ: the tokens.
        broken_BQ: whether the scores of a slot are no distribution to sample from; None in greedy decoding.
        ranked_BQR: the best tokens of each slot, the best one first, as many as were asked for; None if none were.
    """

    token_BQ: torch.Tensor
    broken_BQ: torch.Tensor | None = None
    ranked_BQR: torch.Tensor | None = None

    def check(self) -> None:
        """Raise the error of `torch.multinomial` if a token was sampled from scores that are no distribution.

        Raises:
            RuntimeError: a score is NaN, or all scores of a slot are -inf.
        """
        if self.broken_BQ is not None:
            check_samples(bool(self.broken_BQ.any()))


def check_samples(broken: bool) -> None:
    """Raise the error of `torch.multinomial` if a token was sampled from scores that are no distribution.

    Args:
        broken: whether there is such a token.

    Raises:
        RuntimeError: `broken` is True.
    """
    if broken:
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")


def best(scores: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest score along the last dimension; on ties the first one, as `argmax` does.

    On the CPU, `argmax` and `max` with indices go through a vocabulary one by one, but `amax` does not. So among many
    scores, the piece with the largest one is found first. That takes down to a sixth of the time.
    """
    if (
        scores.device.type != "cpu"
        or scores.numel() < PIECES_FROM
        or scores.shape[-1] % PIECE
        or torch.compiler.is_compiling()
    ):
        return scores.max(-1).indices  # on the CPU, six times as fast as argmax in bfloat16
    pieces = scores.unflatten(-1, (-1, PIECE))
    piece = pieces.amax(-1).max(-1, keepdim=True).indices
    inside = pieces.gather(-2, piece[..., None].expand(*piece.shape, PIECE))[..., 0, :].max(-1, keepdim=True).indices
    return (piece * PIECE + inside)[..., 0]


def choose(
    logits_BQV: torch.Tensor,
    index_BQ: torch.Tensor | None = None,
    noise: SamplingNoise | None = None,
    process: Callable[[torch.Tensor, slice | torch.Tensor], torch.Tensor] | None = None,
    ranks: int = 0,
) -> Choice:
    """Return the choice at every slot.

    Args:
        logits_BQV: logits of the model.
        index_BQ: the index of the new token that is chosen at each slot; needed with noise.
        noise: sampling noise, drawn for these indices; None for greedy decoding.
        process: returns the scores of some slots. It gets their logits `(R, V)` and their places among the slots of
            all rows, which follow each other. None if the logits are the scores.
        ranks: how many of the best tokens are wanted of each slot, if not the best one alone.
    """
    if noise is None and process is None:
        return Choice(best(logits_BQV), None, logits_BQV.topk(ranks).indices if ranks else None)
    batch, slots, _ = logits_BQV.shape
    size = block_slots(logits_BQV)
    logits_RV = logits_BQV.flatten(0, 1)
    picked: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = []

    def pick(place_R: slice | torch.Tensor, noise_RV: torch.Tensor | None) -> None:
        scores_RV = logits_RV[place_R]
        picked.append(_pick(scores_RV if process is None else process(scores_RV, place_R), noise_RV, ranks))

    if noise is None or index_BQ is None:
        for first in range(0, batch * slots, size):
            pick(slice(first, first + size), None)
        return _joined(picked, (batch, slots))
    index_R = index_BQ.flatten()
    row_R = torch.arange(batch * slots, device=index_R.device) // slots
    if noise.is_whole:
        for first in range(0, batch * slots, size):
            place_R = slice(first, first + size)
            pick(place_R, noise.at(index_R[place_R], row_R[place_R]))
        return _joined(picked, (batch, slots))
    order = []
    # Noise that is drawn again is needed for all slots of an index at once. Rows that have ended lag.
    for index in index_R[index_R >= noise.first].unique().tolist():
        noise_BV = noise.of(index)
        for place_R in (index_R == index).nonzero()[:, 0].split(size):
            pick(place_R, noise_BV[row_R[place_R]])
            order.append(place_R)
    return _joined(picked, (batch, slots), torch.cat(order))


def block_slots(logits_BQV: torch.Tensor) -> int:
    """Return how many slots are processed at a time.

    On the CPU, processors use a thread for each slot. So a block has no fewer slots than there are threads, unless it
    were larger than a token of ordinary decoding and than a share of the step.
    """
    batch, slots, vocab = logits_BQV.shape
    if logits_BQV.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, LARGE_BLOCK // vocab)
    most = max(batch, batch * slots // BLOCKS_OF_THREADS)
    return max(1, SMALL_BLOCK // vocab, min(torch.get_num_threads(), most))


def _pick(
    scores_RV: torch.Tensor, noise_RV: torch.Tensor | None, ranks: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the choice of some slots: tokens, whether their scores are no distribution, and the best tokens."""
    broken_R = None
    if noise_RV is not None:
        scores_RV = scores_RV.float().softmax(-1)
        broken_R = scores_RV.sum(-1).isnan()
        scores_RV = scores_RV.div_(noise_RV)
    return best(scores_RV), broken_R, scores_RV.topk(ranks).indices if ranks else None


def _joined(
    picked: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]],
    shape: tuple[int, int],
    order_R: torch.Tensor | None = None,
) -> Choice:
    """Return the choice of all slots from those of blocks.

    Args:
        picked: results of `_pick`.
        shape: `(B, Q)`.
        order_R: the places of the slots of all blocks; places that are not among them get zeros. None if the blocks
            are in order.
    """

    def join(parts: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
        if parts[0] is None:
            return None
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)  # type: ignore[arg-type]
        if order_R is not None:
            joined = joined.new_zeros(shape[0] * shape[1], *joined.shape[1:]).index_copy_(0, order_R, joined)
        return joined.unflatten(0, shape)

    token_BQ, broken_BQ, ranked_BQR = (join(parts) for parts in zip(*picked, strict=True))
    assert token_BQ is not None
    return Choice(token_BQ, broken_BQ, ranked_BQR)
