"""From what `generate` hands over to a prompt without pads, with the checks that keep a wrong batch from being decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prompt:
    """What is to be prefilled, shifted left so that no row begins with pads.

    Attributes:
        ids_BP: new ids, junk behind each row's end; None when embeddings are given.
        embeds_BPH: new embeddings, or None.
        length_B: valid columns of either.
        pad_B: pads on the left of each row, the part in an earlier turn's cache included.
        past, total: columns of an earlier turn's cache, and of everything before the first new token.
        text_BL: ids that lookup may read, of `text_length_B` tokens per row (none for embeddings without ids).
    """

    ids_BP: torch.Tensor | None
    embeds_BPH: torch.Tensor | None
    length_B: torch.Tensor
    pad_B: torch.Tensor
    past: int
    total: int
    text_BL: torch.Tensor
    text_length_B: torch.Tensor

    @property
    def inputs(self) -> torch.Tensor:
        """Ids or embeddings, whichever is prefilled."""
        inputs = self.ids_BP if self.embeds_BPH is None else self.embeds_BPH
        assert inputs is not None
        return inputs


def read_prompt(
    input_BP: torch.Tensor,
    mask_BT: torch.Tensor | None,
    embeds_BTH: torch.Tensor | None,
    past: int,
    mask_length: int | None,
    vocab_size: int,
) -> Prompt:
    """Check and compact a batch.

    Args:
        input_BP: all ids of prompt and earlier turns, or with a cache the new ones alone.
        mask_BT: 1 for tokens, 0 for left pads, over everything; None for no pads.
        embeds_BTH: embeddings of the whole sequence, given instead of ids.
        past: tokens in an earlier turn's cache.
        mask_length: columns of a mask that was dropped because it held ones alone.
        vocab_size: ids must be below it.

    Raises:
        ValueError: an empty batch, right pads, holes, ids outside the vocabulary, nothing new behind the cache.
    """
    input_BP = input_BP.long()
    batch, columns = input_BP.shape
    given = columns if embeds_BTH is None else embeds_BTH.shape[1]
    if batch == 0 or given == 0:
        raise ValueError(
            f"the batch is empty: {batch} rows of {given} tokens; Jacobi decoding needs at least one token in each row."
        )
    outside = input_BP[(input_BP < 0) | (input_BP >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"input_ids holds {int(outside[0])}, which is outside the model's vocabulary of {vocab_size} ids."
        )
    covered = mask_BT.shape[1] if mask_BT is not None else mask_length if mask_length is not None else given
    if not past and covered != given:
        raise ValueError(f"attention_mask covers {covered} tokens, the prompt has {given}.")
    total = covered
    new = total - past
    if new < 1 or new > given:
        raise ValueError(
            f"the cache holds {past} tokens and the prompt {total}: there must be at least one new token behind those in the cache."
        )
    pad_B = _left_pads(mask_BT, batch, total, input_BP.device)
    new_pad_B = (pad_B - past).clamp(min=0)
    ids_BP = embeds_BPH = None
    if embeds_BTH is None:
        ids_BP = _shift_left(input_BP[:, -new:], new_pad_B)
    else:
        embeds_BPH = _shift_left(embeds_BTH[:, -new:], new_pad_B.to(embeds_BTH.device))
    text_pad_B = pad_B if columns == total else new_pad_B if columns == new else torch.zeros_like(pad_B)
    return Prompt(
        ids_BP,
        embeds_BPH,
        new - new_pad_B,
        pad_B,
        past,
        total,
        _shift_left(input_BP, text_pad_B),
        (columns - text_pad_B).clamp(min=0),
    )


def _left_pads(mask_BT: torch.Tensor | None, batch: int, total: int, device: torch.device) -> torch.Tensor:
    if mask_BT is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    if mask_BT.shape != (batch, total):
        raise ValueError(
            f"attention_mask has shape {tuple(mask_BT.shape)}; it must cover prompt and cache, ({batch}, {total})."
        )
    token_BT = mask_BT != 0
    if not token_BT.any(1).all():
        row = int((~token_BT.any(1)).nonzero()[0])
        raise ValueError(f"attention_mask of row {row} is all zeros: each row needs at least one token.")
    for row in (~token_BT[:, -1]).nonzero().flatten().tolist()[:1]:
        raise ValueError(
            f"row {row} is padded on the right; decoding needs left padding (tokenizer.padding_side = 'left')."
        )
    holes_B = (token_BT[:, :-1] & ~token_BT[:, 1:]).any(1)
    for row in holes_B.nonzero().flatten().tolist()[:1]:
        raise ValueError(
            f"attention_mask of row {row} has holes: zeros are supported to the left of the first token only. "
            "(Where no attention_mask is given, transformers takes every pad_token_id for a pad: give one.)"
        )
    return total - token_BT.sum(1)


def _shift_left(value_BP: torch.Tensor, pad_B: torch.Tensor) -> torch.Tensor:
    columns = value_BP.shape[1]
    if columns == 0:
        return value_BP
    index_BP = (torch.arange(columns, device=value_BP.device) + pad_B[:, None]).clamp(max=columns - 1)
    if value_BP.ndim == 3:
        return value_BP.gather(1, index_BP[..., None].expand_as(value_BP))
    return value_BP.gather(1, index_BP)
