"""The prompt of a call, without its pads, and the checks that keep a wrong batch from being decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch


class NotServedError(Exception):
    """A model or an input that ordinary decoding takes and Jacobi decoding does not; the message says what it is.

    Nothing has been decoded when it is raised, so the call goes on in the ordinary way.
    """


@dataclass(frozen=True)
class Prompt:
    """The prompt of a call, each row without its pads, wherever these stand.

    Attributes:
        ids_BP: ids to prefill, arbitrary after the end of a row; None if embeddings are given.
        embeds_BPH: embeddings to prefill, or None.
        length_B: tokens of each row to prefill.
        place_BL: for each column of cache and prompt, the place of its token in its row; negative for a pad.
        cached_B: tokens of each row in the cache of an earlier turn.
        past: columns in the cache of an earlier turn.
        total: columns before the first new token, with those in the cache.
        has_gaps: whether a row has pads between its tokens.
        text_BL: ids that draft sources may read: all that are known, of earlier turns too. None are known if
            embeddings are given without ids.
        text_length_B: tokens of each row in `text_BL`.
    """

    ids_BP: torch.Tensor | None
    embeds_BPH: torch.Tensor | None
    length_B: torch.Tensor
    place_BL: torch.Tensor
    cached_B: torch.Tensor
    past: int
    total: int
    has_gaps: bool
    text_BL: torch.Tensor
    text_length_B: torch.Tensor

    @property
    def inputs(self) -> torch.Tensor:
        """The ids or the embeddings to prefill."""
        inputs = self.ids_BP if self.embeds_BPH is None else self.embeds_BPH
        assert inputs is not None
        return inputs

    @property
    def tokens_B(self) -> torch.Tensor:
        """Tokens of each row before the first new one, with those in the cache."""
        return self.cached_B + self.length_B

    def new_places(self, generated: int) -> torch.Tensor:
        """Return the place of the token of each column after the cache of an earlier turn, 0 for a pad.

        Args:
            generated: how many new tokens have a column.
        """
        new_BI = self.tokens_B[:, None] + torch.arange(generated, device=self.tokens_B.device)
        return torch.cat([self.place_BL[:, self.past :].clamp(min=0), new_BI], 1)


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
        past: columns in the cache of an earlier turn.
        mask_length: columns of an attention mask that was dropped because it was all ones.
        vocab_size: number of ids that the model knows.

    Raises:
        ValueError: the batch is empty, the mask does not cover it, or a new id is outside the vocabulary. Ordinary
            decoding fails too.
        NotServedError: a row ends with a pad or has no token, the mask has other values than 0 and 1 or covers more
            than cache and prompt, embeddings do not cover the cache, or there is no token beyond those in it.
    """
    input_BP = input_BP.long()
    batch, columns = input_BP.shape
    given = columns if embeds_BLH is None else embeds_BLH.shape[1]
    if batch == 0 or given == 0:
        raise ValueError(f"the batch is empty: {batch} rows of {given} tokens; each row needs at least one token.")
    total = _covered_columns(mask_BL, mask_length, given, past)
    if past and embeds_BLH is not None and total != given:
        raise NotServedError(f"embeddings of {given} tokens where cache and prompt have {total}")
    new = total - past
    if mask_BL is not None:
        mask_BL = mask_BL.to(input_BP.device)
    place_BL, has_gaps = _places(mask_BL, batch, total, input_BP.device)
    cached_B = (place_BL[:, :past] >= 0).sum(1)
    new_place_BP = place_BL[:, past:] - cached_B[:, None]

    def in_place(value_BP: torch.Tensor, place_BP: torch.Tensor) -> torch.Tensor:
        return value_BP if mask_BL is None else _without_pads(value_BP, place_BP.to(value_BP.device))

    if embeds_BLH is None:
        _check_ids(input_BP[:, -new:], vocab_size)
    # A cached id may be anything, for example one that stands for an image; a guess must be an id of the model.
    text_BL = input_BP.clamp(0, vocab_size - 1)
    text_length_B = torch.full_like(cached_B, columns)
    if columns in (total, new):
        text_place_BL = place_BL if columns == total else new_place_BP
        text_BL = in_place(text_BL, text_place_BL)
        text_length_B = (text_place_BL >= 0).sum(1)
    return Prompt(
        ids_BP=in_place(input_BP[:, -new:], new_place_BP) if embeds_BLH is None else None,
        embeds_BPH=None if embeds_BLH is None else in_place(embeds_BLH[:, -new:], new_place_BP),
        length_B=(place_BL[:, past:] >= 0).sum(1),
        place_BL=place_BL,
        cached_B=cached_B,
        past=past,
        total=total,
        has_gaps=has_gaps,
        text_BL=text_BL,
        text_length_B=text_length_B,
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
    if not past and total < given:
        raise ValueError(f"attention_mask covers {total} tokens, the prompt has {given}.")
    if total > past + given:
        raise NotServedError(f"an attention_mask of {total} tokens where cache and prompt have {past} and {given}")
    if total <= past:
        raise NotServedError(
            f"a cache of {past} tokens before a prompt of {total} "
            "(input_ids or attention_mask must cover the cache and at least one new token)"
        )
    return total


def _places(mask_BL: torch.Tensor | None, batch: int, total: int, device: torch.device) -> tuple[torch.Tensor, bool]:
    """Return the place of each column's token in its row, negative for a pad, and whether pads stand between tokens.

    Raises:
        ValueError: the mask has another shape than cache and prompt.
        NotServedError: the mask has other values than 0 and 1, or a row without a token, or one that ends with a pad.
    """
    if mask_BL is None:
        return torch.arange(total, device=device).expand(batch, -1), False
    if mask_BL.shape != (batch, total):
        raise ValueError(
            f"attention_mask has shape {tuple(mask_BL.shape)}; it must cover prompt and cache, ({batch}, {total})."
        )
    is_token_BL = mask_BL != 0
    ends_with_pad_B = ~is_token_BL[:, -1]
    is_empty_B = ~is_token_BL.any(1)
    gap_BL = is_token_BL[:, :-1] & ~is_token_BL[:, 1:]
    facts = torch.stack([(mask_BL != is_token_BL).any(), is_empty_B.any(), ends_with_pad_B.any(), gap_BL.any()])
    has_values, has_empty, has_pad_at_end, has_gaps = facts.tolist()  # one wait for the device
    if has_values:
        raise NotServedError("an attention_mask with other values than 0 and 1")
    if has_empty:
        raise NotServedError(f"row {_first_row(is_empty_B)} of the batch, which has no token")
    if has_pad_at_end:
        raise NotServedError(
            f"row {_first_row(ends_with_pad_B)} of the batch, which ends with a pad "
            "(tokenizer.padding_side = 'left' puts pads in front)"
        )
    return (is_token_BL.cumsum(1) - 1).masked_fill(~is_token_BL, -1), has_gaps


def _first_row(is_wrong_B: torch.Tensor) -> int:
    return int(is_wrong_B.nonzero()[0])


def _without_pads(value_BP: torch.Tensor, place_BP: torch.Tensor) -> torch.Tensor:
    """Return ids or embeddings with each token moved to its place; the last value fills the free columns.

    Args:
        value_BP: ids `(B, P)` or embeddings `(B, P, H)`.
        place_BP: the place of each column's token, negative for a pad.
    """
    columns = value_BP.shape[1]
    column_P = torch.arange(columns, device=value_BP.device)
    column_BP = column_P.new_full((len(value_BP), columns + 1), columns - 1)
    column_BP.scatter_(1, place_BP.masked_fill(place_BP < 0, columns), column_P.expand_as(place_BP))
    column_BP = column_BP[:, :columns]
    if value_BP.ndim == 3:
        return value_BP.gather(1, column_BP[..., None].expand_as(value_BP))
    return value_BP.gather(1, column_BP)
