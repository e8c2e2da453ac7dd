"""The packed record: how a training sample of Jacobi Forcing is stored (arXiv 2512.14681, section 3.2).

A sample is a prompt and the model's own answer to it. The answer is cut into T blocks of n tokens. Jacobi decoding
knows the first token of a block from the block before. It drafts the other tokens at once and corrects the draft in
several forward passes, until the block no longer changes. So each block has two versions in a record:

- the *clean block* `l_j`: block j when it no longer changes, the fixed point. It equals what ordinary decoding writes.
- the *noisy block* `k_j`: block j as it was after one of the earlier passes. It may still have wrong tokens.

Training teaches the model to predict in the slots of `k_j` what it predicts in the slots of `l_j`
(`jacobi_hf.trainer.forcing.mask` says what each slot sees). In a record, the pairs follow the prompt:

    | prompt | k_0 | l_0 | k_1 | l_1 | ... | k_T-1 | l_T-1 |
    |   P    |  n  |  n  |  n  |  n  |     |   n   |   n   |     P + 2nT tokens

Each token takes one *slot*. Both blocks of a pair are versions of the same part of the answer, so they have the same
position ids. For P = 2, n = 3, T = 2:

    slot         0   1 |  2   3   4 |  5   6   7 |  8   9  10 | 11  12  13
    token       p_0 p_1|     k_0    |     l_0    |     k_1    |     l_1
    position     0   1 |  2   3   4 |  2   3   4 |  5   6   7 |  5   6   7

The first token is no draft, so `k_j` and `l_j` always begin with the same token.

A record may have several *views*. Each view is a noisy version of every block, with states that the noise schedule
chose for that view; the views share the prompt and the clean blocks. A stored row has the first view in the sequence
above and the others in a column of their own. A training row has the other views of a block after its clean block:
`k_0, l_0, k'_0, k''_0, k_1, l_1, ...`.

This module alone knows the order of blocks. Other modules build, check, shorten and take apart records through
`PackedRecord`, and bring values of slots into the order of the layout with `interleave`.

Suffixes of array names: P prompt tokens, M views, T blocks, n tokens of a block, L tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

# Columns of a stored row, named as in the data sets that the paper's authors published.
PROMPT = "prompt_ids"
PROMPT_LENGTH = "prompt_ids_len"
SEQUENCE = "complete_training_sequence_ids"
STATES = "traj_position_indices"
COLUMNS = (PROMPT, PROMPT_LENGTH, SEQUENCE, STATES)
# Column of the views after the first. The published format has no such column; rows with one view do without it.
MORE_VIEWS = "more_noisy_ids"


class BadRecordError(ValueError):
    """A row or record that is not valid. The message has the reason, and for a stored row its name."""


def interleave(noisy_MTn: np.ndarray, clean_Tn: np.ndarray) -> np.ndarray:
    """Return the values of all slots of the blocks in the order of the layout: `k_0, l_0, k'_0, k''_0, k_1, l_1, ...`.

    The values can be token ids or anything else that a slot has, for example its position id.

    Args:
        noisy_MTn: the values of the noisy blocks, for each view. M may be 0; then only the clean blocks are in the
            result.
        clean_Tn: the values of the clean blocks.

    Returns:
        One dimension of (M + 1) * T * n values; the prompt is not among them.
    """
    first_view_1Tn = noisy_MTn[:1]
    other_views_MTn = noisy_MTn[1:]
    versions = np.concatenate([first_view_1Tn, clean_Tn[None], other_views_MTn])
    return versions.swapaxes(0, 1).reshape(-1)


@dataclass(frozen=True, eq=False)
class PackedRecord:
    """One training sample: a prompt, and the noisy and clean versions of each block of the answer.

    `pack` builds records from trajectories, `load_packed` checks those of files, and the collator lays them out in
    training rows. A record that exists is valid: every way to make one checks it. The module's docstring shows the
    layout.

    Attributes:
        prompt_P: token ids of the prompt. P is at least 1.
        noisy_MTn: token ids of the noisy blocks, for each view. M and T are at least 1, n is at least 2.
        clean_Tn: token ids of the clean blocks.
        state_T: for each block, which state its noisy block in the first view is: how many decoding passes it had been
            through (0: the initial draft). Training does not read these numbers.

    Raises:
        BadRecordError: The arrays do not fit together, one of them is empty, n is below 2, an id is negative, or the
            blocks of a pair begin with different tokens.
    """

    prompt_P: np.ndarray
    noisy_MTn: np.ndarray
    clean_Tn: np.ndarray
    state_T: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.prompt_P) or not len(self.clean_Tn):
            raise BadRecordError(_empty(len(self.prompt_P), len(self.clean_Tn)))
        if self.block_size < 2:
            raise BadRecordError(f"its blocks have {self.block_size} tokens; n must be at least 2")
        if self.noisy_MTn.shape[1:] != self.clean_Tn.shape or not self.views:
            raise BadRecordError(f"noisy blocks of shape {self.noisy_MTn.shape} do not fit {self.clean_Tn.shape}")
        if len(self.state_T) != self.blocks:
            raise BadRecordError(f"it has {self.blocks} blocks, but {len(self.state_T)} indices of states")
        if (lowest := min(int(ids.min()) for ids in self._ids())) < 0:
            raise BadRecordError(f"id {lowest} is negative")
        self._check_first_tokens()

    @classmethod
    def build(
        cls,
        prompt: Sequence[int],
        views: Sequence[Sequence[Sequence[int]]],
        clean: Sequence[Sequence[int]],
        states: Sequence[int],
    ) -> PackedRecord:
        """Return the record of a prompt and blocks that are given as lists.

        Args:
            prompt: P token ids.
            views: for each view, its T noisy blocks of n ids.
            clean: the T clean blocks of n ids.
            states: T numbers, see `state_T`.

        Raises:
            BadRecordError: The blocks differ in length or number, or the record is not valid (see the class).
        """
        if len({len(block) for blocks in (*views, clean) for block in blocks}) > 1:
            raise BadRecordError("its blocks differ in length")
        if any(len(blocks) != len(clean) for blocks in views):
            raise BadRecordError("its views differ in the number of blocks")
        return cls(_as_ids(prompt), _as_ids(views), _as_ids(clean), _as_ids(states))

    @classmethod
    def from_row(
        cls,
        row: Mapping[str, Any],
        name: str = "record",
        block_size: int | None = None,
        vocab_size: int | None = None,
    ) -> PackedRecord:
        """Return the record of a stored row. The inverse of `to_row`.

        Args:
            row: a row with the columns `COLUMNS`, and `more_noisy_ids` if it has several views. Other columns are
                ignored.
            name: name of the row in errors.
            block_size: the n that the record must have. None accepts any.
            vocab_size: size of the vocabulary that all ids must be in. None accepts any id.

        Raises:
            BadRecordError: The row breaks the format, or has another block size or vocabulary. The error names the
                row.
        """
        try:
            record = cls._parse(row)
            record._check_fit(block_size, vocab_size)
        except BadRecordError as error:
            raise BadRecordError(f"{name}: {error}") from None
        return record

    def to_row(self) -> dict[str, Any]:
        """Return the record as a row of plain lists, for JSON or parquet files in the published format."""
        row: dict[str, Any] = {
            PROMPT: self.prompt_P.tolist(),
            PROMPT_LENGTH: len(self.prompt_P),
            SEQUENCE: self.sequence.tolist(),
            STATES: self.state_T.tolist(),
        }
        if self.views > 1:
            row[MORE_VIEWS] = self.noisy_MTn[1:].reshape(self.views - 1, -1).tolist()
        return row

    @property
    def blocks(self) -> int:
        """T, the number of blocks of the answer."""
        return len(self.clean_Tn)

    @property
    def block_size(self) -> int:
        """n, the number of tokens of a block."""
        return self.clean_Tn.shape[1]

    @property
    def views(self) -> int:
        """M, the number of noisy versions of each block."""
        return len(self.noisy_MTn)

    @property
    def sequence(self) -> np.ndarray:
        """The P + 2nT ids of the stored sequence, `prompt, k_0, l_0, k_1, l_1, ...`, with the first view only."""
        return np.concatenate([self.prompt_P, interleave(self.noisy_MTn[:1], self.clean_Tn)])

    @property
    def answer(self) -> np.ndarray:
        """The nT ids of the model's answer, from the clean blocks. After its end-of-sequence id it is padded."""
        return self.clean_Tn.reshape(-1)

    @property
    def position_Tn(self) -> np.ndarray:
        """The position ids of the slots of each block, clean or noisy: P + j * n to P + j * n + n - 1 for block j."""
        return len(self.prompt_P) + np.arange(self.clean_Tn.size).reshape(self.clean_Tn.shape)

    @property
    def slots(self) -> int:
        """The number of slots of the whole record with all its views: P + (M + 1)nT, or P + 2nT with one view."""
        return len(self.prompt_P) + (self.views + 1) * self.clean_Tn.size

    def blocks_within(self, slots: int) -> int:
        """Return how many blocks fit into a number of slots, with all their versions and the prompt: 0 to T."""
        return min(self.blocks, max(0, slots - len(self.prompt_P)) // ((self.views + 1) * self.block_size))

    def first_blocks(self, count: int) -> PackedRecord:
        """Return a record with the same prompt and only the first `count` blocks. `count` is 1 to T."""
        return PackedRecord(self.prompt_P, self.noisy_MTn[:, :count], self.clean_Tn[:count], self.state_T[:count])

    @classmethod
    def _parse(cls, row: Mapping[str, Any]) -> PackedRecord:
        """Return the record of a row. Its errors do not name the row."""
        _check_columns(row)
        prompt_P = _as_ids(_without_row_axis(row[PROMPT]))
        sequence_L = _as_ids(row[SEQUENCE])
        state_T = _as_ids(row[STATES])
        length = len(prompt_P)
        blocks = len(state_T)
        if row[PROMPT_LENGTH] not in (length, [length]):
            raise BadRecordError(f"prompt_ids_len is {row[PROMPT_LENGTH]}, but there are {length} prompt ids")
        if not length or not blocks:
            raise BadRecordError(_empty(length, blocks))
        if not np.array_equal(sequence_L[:length], prompt_P):
            raise BadRecordError("the sequence does not begin with the prompt")
        n, rest = divmod(len(sequence_L) - length, 2 * blocks)
        if rest or n < 2:
            raise BadRecordError(
                f"{len(sequence_L)} ids are not P + 2 n T with P={length}, T={blocks} and an integer n of at least 2"
            )
        noisy_Tn, clean_Tn = sequence_L[length:].reshape(blocks, 2, n).swapaxes(0, 1)
        more = row.get(MORE_VIEWS)
        more_views = [_as_ids(view) for view in (() if more is None else more)]
        if any(view.shape != (blocks * n,) for view in more_views):
            raise BadRecordError(f"a view in more_noisy_ids does not have {blocks} blocks of {n} tokens")
        noisy_MTn = np.stack([noisy_Tn, *(view.reshape(blocks, n) for view in more_views)])
        return cls(prompt_P, noisy_MTn, clean_Tn, state_T)

    def _ids(self) -> tuple[np.ndarray, ...]:
        """Return all arrays of token ids."""
        return self.prompt_P, self.noisy_MTn, self.clean_Tn

    def _check_fit(self, block_size: int | None, vocab_size: int | None) -> None:
        """Raise `BadRecordError` if the record has another block size, or ids outside the vocabulary."""
        if block_size is not None and self.block_size != block_size:
            n = self.block_size
            raise BadRecordError(
                f"its blocks have {n} tokens, but block_size={block_size}: set block_size={n} or collect again"
            )
        highest = max(int(ids.max()) for ids in self._ids())
        if vocab_size is not None and highest >= vocab_size:
            raise BadRecordError(
                f"id {highest} is outside the model's vocabulary of {vocab_size}: was it made with another tokenizer?"
            )

    def _check_first_tokens(self) -> None:
        """Raise `BadRecordError` if a noisy block does not begin with the first token of its clean block."""
        differs_MT = self.noisy_MTn[..., 0] != self.clean_Tn[:, 0]
        if differs_MT[0].any():
            raise BadRecordError(
                f"noisy and clean block {int(differs_MT[0].argmax())} begin with different tokens: "
                "the blocks are not in the order k_0, l_0, k_1, l_1, ..."
            )
        if differs_MT.any():
            raise BadRecordError(
                "a view in more_noisy_ids does not begin its blocks with the tokens of the clean ones"
            )


def _empty(prompt_length: int, blocks: int) -> str:
    return f"it has {prompt_length} prompt ids and {blocks} blocks; both must be at least 1"


def _check_columns(row: Mapping[str, Any]) -> None:
    """Raise `BadRecordError` if a column is missing, or if a column of ids is not a list."""
    missing = [column for column in COLUMNS if row.get(column) is None]
    lists = [column for column in COLUMNS if column != PROMPT_LENGTH]
    no_lists = [column for column in lists if not isinstance(row.get(column), Sequence | np.ndarray)]
    if missing or no_lists:
        raise BadRecordError(
            f"the columns {', '.join(missing or no_lists)} are missing; a packed record has {', '.join(COLUMNS)}"
        )


def _without_row_axis(ids: Any) -> Any:
    """Return the ids of a prompt, which some published data sets store as a 2-D array of one row."""
    return ids[0] if len(ids) == 1 and isinstance(ids[0], Sequence | np.ndarray) else ids


def _as_ids(values: Any) -> np.ndarray:
    """Return integers, in lists of any depth, as an int64 array; raise `BadRecordError` if one is not an integer."""
    # NumPy alone would turn True into 1 and 2.5 into 2, so the types are checked before the conversion.
    if not isinstance(values, np.ndarray):
        values = np.array(values, dtype=object)
    kinds = {values.dtype.type} if values.dtype != object else set(map(type, values.flat))
    if not all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        raise BadRecordError("there are ids that are no integers")
    try:
        return values.astype(np.int64)
    except OverflowError:
        raise BadRecordError("there are ids that do not fit into 64 bits") from None
