"""The prompt of a call, without pads on the left, and the checks that keep a wrong batch from being decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prompt:
    """The prompt of a call, shifted left so that no row begins with pads.

    Attributes:
        ids_BP: ids to prefill, arbitrary after the end of a row; None if embeddings are given.
        embeds_BPH: embeddings to prefill, or None.
        length_B: tokens of each row to prefill.
        pad_B: pads on the left of each row, as the caller gave it, with those in the cache of an earlier turn.
        past: columns in the cache of an earlier turn.
        total: columns before the first new token, with those in the cache.
        text_BL: ids that draft sources may read: all that are known, of earlier turns too. None are known if
            embeddings are given without ids.
        text_length_B: tokens of each row in `text_BL`.
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
        """The ids or the embeddings to prefill."""
        inputs = self.ids_BP if self.embeds_BPH is None else self.embeds_BPH
        assert inputs is not None
        return inputs


def read_prompt(
    input_BP: torch.Tensor,
    mask_BL: torch.Tensor | None,
    embeds_BLH: torch.Tensor | None,
    past: int,
    mask_length: int | None,
    vocab_size: int,
) -> Prompt:
    """Return the prompt of a call, after checking it.

    Args:
        input_BP: all ids of the prompt and of earlier turns; or, with a cache, the new ones alone.
        mask_BL: 1 for tokens and 0 for pads, for the cache too; None if there are no pads.
        embeds_BLH: embeddings that take the place of ids, of the whole sequence; or None.
        past: tokens in the cache of an earlier turn.
        mask_length: columns of an attention mask that was dropped because it was all ones.
        vocab_size: number of ids that the model knows.

    Raises:
        ValueError: the batch is empty; a row has pads on the right, holes or no token; an id is outside the
            vocabulary; or there is no token beyond those in the cache.
    """
    input_BP = input_BP.long()
    batch, columns = input_BP.shape
    given = columns if embeds_BLH is None else embeds_BLH.shape[1]
    if batch == 0 or given == 0:
        raise ValueError(f"the batch is empty: {batch} rows of {given} tokens; each row needs at least one token.")
    _check_ids(input_BP, vocab_size)
    total = _covered_columns(mask_BL, mask_length, given, past)
    new = total - past
    pad_B = _left_pads(mask_BL, batch, total, input_BP.device)
    new_pad_B = (pad_B - past).clamp(min=0)
    ids_BP = None
    embeds_BPH = None
    if embeds_BLH is None:
        ids_BP = _shift_left(input_BP[:, -new:], new_pad_B)
    else:
        embeds_BPH = _shift_left(embeds_BLH[:, -new:], new_pad_B.to(embeds_BLH.device))
    text_pad_B = pad_B if columns == total else new_pad_B if columns == new else torch.zeros_like(pad_B)
    return Prompt(
        ids_BP=ids_BP,
        embeds_BPH=embeds_BPH,
        length_B=new - new_pad_B,
        pad_B=pad_B,
        past=past,
        total=total,
        text_BL=_shift_left(input_BP, text_pad_B),
        text_length_B=(columns - text_pad_B).clamp(min=0),
    )


def _check_ids(input_BP: torch.Tensor, vocab_size: int) -> None:
    outside = input_BP[(input_BP < 0) | (input_BP >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"input_ids holds {int(outside[0])}, which is outside the model's vocabulary of {vocab_size} ids."
        )


def _covered_columns(mask_BL: torch.Tensor | None, mask_length: int | None, given: int, past: int) -> int:
    """Return the columns of cache and prompt together, by the mask if there is one, else by the `given` columns."""
    total = given if mask_length is None else mask_length
    if mask_BL is not None:
        total = mask_BL.shape[1]
    if not past and total != given:
        raise ValueError(f"attention_mask covers {total} tokens, the prompt has {given}.")
    if total > past + given:
        raise ValueError(f"attention_mask covers {total} tokens; the cache has {past} and the prompt {given}.")
    if total <= past:
        raise ValueError(
            f"the cache holds {past} tokens and the prompt {total}: "
            "pass at least one new token after those in the cache."
        )
    return total


def _left_pads(mask_BL: torch.Tensor | None, batch: int, total: int, device: torch.device) -> torch.Tensor:
    """Return the number of pads on the left of each row; raise `ValueError` for a mask with other zeros than these."""
    if mask_BL is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    if mask_BL.shape != (batch, total):
        raise ValueError(
            f"attention_mask has shape {tuple(mask_BL.shape)}; it must cover prompt and cache, ({batch}, {total})."
        )
    token_BL = mask_BL != 0
    row = _first_row(~token_BL.any(1))
    if row is not None:
        raise ValueError(f"attention_mask of row {row} is all zeros: each row needs at least one token.")
    row = _first_row(~token_BL[:, -1])
    if row is not None:
        raise ValueError(
            f"row {row} is padded on the right; decoding needs left padding (tokenizer.padding_side = 'left')."
        )
    row = _first_row((token_BL[:, :-1] & ~token_BL[:, 1:]).any(1))
    if row is not None:
        raise ValueError(
            f"attention_mask of row {row} has holes: zeros are supported to the left of the first token only. "
            "(Without an attention_mask, transformers takes every pad_token_id for a pad: pass one.)"
        )
    return total - token_BL.sum(1)


def _first_row(is_wrong_B: torch.Tensor) -> int | None:
    rows = is_wrong_B.nonzero().flatten().tolist()
    return rows[0] if rows else None


def _shift_left(value_BP: torch.Tensor, pad_B: torch.Tensor) -> torch.Tensor:
    """Return ids or embeddings with each row moved left by its pads; its last value fills the free columns."""
    columns = value_BP.shape[1]
    if columns == 0:
        return value_BP
    index_BP = (torch.arange(columns, device=value_BP.device) + pad_B[:, None]).clamp(max=columns - 1)
    if value_BP.ndim == 3:
        return value_BP.gather(1, index_BP[..., None].expand_as(value_BP))
    return value_BP.gather(1, index_BP)
