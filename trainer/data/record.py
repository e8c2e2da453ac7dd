"""The packed layout of Jacobi Forcing, and the only module that knows it (arXiv 2512.14681, section 3.2).

A training sample is a prompt and the model's answer to it. The answer is cut into T blocks of n tokens. Each block is there twice:

- the *clean block* `l_j` is the model's own output, the fixed point of Jacobi decoding;
- the *noisy block* `k_j` is a guess at `l_j` that Jacobi decoding went through before it reached `l_j`.

The model learns to predict from `k_j` what it predicts from `l_j`. A record stores both, one pair after the other:

    | prompt | k_0 | l_0 | k_1 | l_1 | ... | k_T-1 | l_T-1 |
    |   P    |  n  |  n  |  n  |  n  |     |   n   |   n   |     P + 2nT tokens

Both blocks of a pair stand for the same part of the answer, so they have the same position ids. With P = 2, n = 3, T = 2:

    slot         0   1 |  2   3   4 |  5   6   7 |  8   9  10 | 11  12  13
    token       p_0 p_1|     k_0    |     l_0    |     k_1    |     l_1
    position     0   1 |  2   3   4 |  2   3   4 |  5   6   7 |  5   6   7

The first token of a block is verified before the block is drafted. So `k_j` and `l_j` always begin with the same token.

A record may hold several *views*: further noisy versions of every block, which share the prompt and the clean blocks. In a training row
the further views of a block come after its clean block: `k_0, l_0, k'_0, k''_0, k_1, l_1, ...`.

Shapes: P prompt tokens, M views, T blocks, n tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

# Columns of a stored row, as in the data sets that the authors of the paper published.
PROMPT = "prompt_ids"
PROMPT_LENGTH = "prompt_ids_len"
SEQUENCE = "complete_training_sequence_ids"
STATES = "traj_position_indices"
COLUMNS = (PROMPT, PROMPT_LENGTH, SEQUENCE, STATES)
# Column of the views after the first. The published format has one view, so rows with one view have no such column.
MORE_VIEWS = "more_noisy_ids"


class BadRecordError(ValueError):
    """A row that is not a valid packed record. The message names the row and the reason."""


def interleave(noisy_MTn: np.ndarray, clean_Tn: np.ndarray) -> np.ndarray:
    """Return values of the noisy and clean blocks in the order of the layout: `k_0, l_0, k'_0, .., k_1, l_1, k'_1, ..`.

    The values may be token ids or anything else that each slot has: a position, a block number, a label.

    Args:
        noisy_MTn: one value per slot of the noisy blocks, for each of M views. M may be 0: then only clean blocks are laid out.
        clean_Tn: one value per slot of the clean blocks.

    Returns:
        An array of `(M + 1) * T * n` values, without the prompt.
    """
    first_view_1Tn, more_views_MTn = noisy_MTn[:1], noisy_MTn[1:]
    columns = np.concatenate([first_view_1Tn, clean_Tn[None], more_views_MTn])
    return columns.swapaxes(0, 1).reshape(-1)


@dataclass(frozen=True, eq=False)
class PackedRecord:
    """One valid training sample: a prompt, and the noisy and clean version of each block of its answer.

    It is what the schedule builds, what loading checks and shortens, and what the collator lays out in training rows. See the module's
    docstring for the layout.

    Attributes:
        prompt_P: token ids of the prompt; P is at least 1.
        noisy_MTn: token ids of the noisy blocks, for each of M views; M and T are at least 1, and n is at least 2.
        clean_Tn: token ids of the clean blocks.
        state_T: for each block, which state of its trajectory the first view is (0: the initial draft). Kept for analysis; training
            does not read it.

    Raises:
        BadRecordError: the arrays do not fit together, an id is negative, or the blocks of a pair begin with different tokens.
    """

    prompt_P: np.ndarray
    noisy_MTn: np.ndarray
    clean_Tn: np.ndarray
    state_T: np.ndarray

    def __post_init__(self) -> None:
        if self.clean_Tn.ndim != 2 or not len(self.prompt_P) or not len(self.clean_Tn):
            raise BadRecordError(
                f"it has {len(self.prompt_P)} prompt ids and {len(self.clean_Tn)} blocks; both must be at least 1"
            )
        if self.block_size < 2:
            raise BadRecordError(f"its blocks have {self.block_size} tokens; n must be at least 2")
        if self.noisy_MTn.shape[1:] != self.clean_Tn.shape or not self.views:
            raise BadRecordError(f"noisy blocks of shape {self.noisy_MTn.shape} do not fit {self.clean_Tn.shape}")
        if len(self.state_T) != self.blocks:
            raise BadRecordError(f"it has {self.blocks} blocks, but {len(self.state_T)} indices of states")
        if self._lowest_id() < 0:
            raise BadRecordError(f"id {self._lowest_id()} is negative")
        self._check_first_tokens()

    @classmethod
    def build(
        cls,
        prompt: Sequence[int],
        views: Sequence[Sequence[Sequence[int]]],
        clean: Sequence[Sequence[int]],
        states: Sequence[int],
    ) -> PackedRecord:
        """Return the record of a prompt and its blocks.

        Args:
            prompt: token ids of the prompt.
            views: for each view, its T noisy blocks of n ids.
            clean: T clean blocks of n ids.
            states: for each block, which state of its trajectory the first view is.

        Raises:
            BadRecordError: the blocks differ in length, or see the class.
        """
        if len({len(block) for blocks in (*views, clean) for block in blocks}) > 1:
            raise BadRecordError("its blocks differ in length")
        if any(len(blocks) != len(clean) for blocks in views):
            raise BadRecordError("its views differ in the number of blocks")
        return cls(_ids(prompt), _ids(views), _ids(clean), _ids(states))

    @classmethod
    def from_row(
        cls,
        row: Mapping[str, Any],
        name: str = "record",
        block_size: int | None = None,
        vocab_size: int | None = None,
    ) -> PackedRecord:
        """Return the record that a stored row holds (`to_row` is the inverse).

        Args:
            row: a row with the columns `COLUMNS`, and `more_noisy_ids` if it has more than one view. Other columns are ignored.
            name: what an error calls the row.
            block_size: the n that the record must have; None accepts any.
            vocab_size: every id must be below it; None accepts any id.

        Raises:
            BadRecordError: the row breaks the format, or has another block size or vocabulary.
        """
        try:
            record = cls._parse(row)
            record._demand(block_size, vocab_size)
        except BadRecordError as error:
            raise BadRecordError(f"{name}: {error}") from None
        return record

    def to_row(self) -> dict[str, Any]:
        """Return the record as a row of plain lists, with the columns of the published data sets."""
        row = {
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
        """The ids in the published order, `prompt, k_0, l_0, k_1, l_1, ..`: P + 2nT of them, with the first view only."""
        return np.concatenate([self.prompt_P, interleave(self.noisy_MTn[:1], self.clean_Tn)])

    @property
    def answer(self) -> np.ndarray:
        """The ids of the clean blocks one after the other: the model's answer, nT ids, with its padding after the end."""
        return self.clean_Tn.reshape(-1)

    @property
    def position_Tn(self) -> np.ndarray:
        """The position id of each slot of a clean block, and of the same slot of a noisy block: `P + j * n + (0 .. n-1)`."""
        return len(self.prompt_P) + np.arange(self.clean_Tn.size).reshape(self.clean_Tn.shape)

    @property
    def slots(self) -> int:
        """The slots that the whole record takes in a training row: P + (M + 1)nT, so P + 2nT with one view."""
        return len(self.prompt_P) + (self.views + 1) * self.clean_Tn.size

    def blocks_within(self, slots: int) -> int:
        """Return how many whole blocks, with all their views, fit into so many slots beside the prompt: 0 to T."""
        return min(self.blocks, max(0, slots - len(self.prompt_P)) // ((self.views + 1) * self.block_size))

    def first_blocks(self, count: int) -> PackedRecord:
        """Return the record of the same prompt with only the first `count` blocks; `count` is 1 to T."""
        return PackedRecord(self.prompt_P, self.noisy_MTn[:, :count], self.clean_Tn[:count], self.state_T[:count])

    @classmethod
    def _parse(cls, row: Mapping[str, Any]) -> PackedRecord:
        """Return the record of a row, with errors that do not name the row."""
        _check_columns(row)
        prompt_P = _ids(_without_row_axis(row[PROMPT]))
        sequence_L = _ids(row[SEQUENCE])
        state_T = _ids(row[STATES])
        length = len(prompt_P)
        blocks = len(state_T)
        if row[PROMPT_LENGTH] not in (length, [length]):
            raise BadRecordError(f"prompt_ids_len is {row[PROMPT_LENGTH]}, but there are {length} prompt ids")
        if not length or not blocks:
            raise BadRecordError(f"it has {length} prompt ids and {blocks} blocks; both must be at least 1")
        if not np.array_equal(sequence_L[:length], prompt_P):
            raise BadRecordError("the sequence does not begin with the prompt")
        n, rest = divmod(len(sequence_L) - length, 2 * blocks)
        if rest or n < 2:
            raise BadRecordError(
                f"{len(sequence_L)} ids are not P + 2 n T with P={length}, T={blocks} and an integer n of at least 2"
            )
        noisy_Tn, clean_Tn = sequence_L[length:].reshape(blocks, 2, n).swapaxes(0, 1)
        more_views = [_ids(view) for view in row.get(MORE_VIEWS) or []]
        if any(len(view) != blocks * n for view in more_views):
            raise BadRecordError(f"a view in more_noisy_ids does not have {blocks} blocks of {n} tokens")
        noisy_MTn = np.stack([noisy_Tn, *(view.reshape(blocks, n) for view in more_views)])
        return cls(prompt_P, noisy_MTn, clean_Tn, state_T)

    def _demand(self, block_size: int | None, vocab_size: int | None) -> None:
        """Raise `BadRecordError` if the record has another block size, or ids outside the vocabulary."""
        if block_size is not None and self.block_size != block_size:
            n = self.block_size
            raise BadRecordError(
                f"its blocks have {n} tokens, but block_size={block_size}: set block_size={n} or collect again"
            )
        highest = max(int(ids.max()) for ids in (self.prompt_P, self.noisy_MTn, self.clean_Tn))
        if vocab_size is not None and highest >= vocab_size:
            raise BadRecordError(
                f"id {highest} is outside the model's vocabulary of {vocab_size}: was it made with another tokenizer?"
            )

    def _lowest_id(self) -> int:
        return min(int(ids.min()) for ids in (self.prompt_P, self.noisy_MTn, self.clean_Tn))

    def _check_first_tokens(self) -> None:
        """Raise `BadRecordError` if a noisy block begins with another token than its clean block."""
        differs_MT = self.noisy_MTn[..., 0] != self.clean_Tn[:, 0]
        if differs_MT[0].any():
            raise BadRecordError(
                f"noisy and clean block {int(differs_MT[0].argmax())} begin with different tokens: "
                "the blocks are not in the order k_0, l_0, k_1, l_1, .."
            )
        if differs_MT.any():
            raise BadRecordError(
                "a view in more_noisy_ids does not begin its blocks with the tokens of the clean ones"
            )


def _check_columns(row: Mapping[str, Any]) -> None:
    """Raise `BadRecordError` if a column of the format is missing, or is no list where the format has one."""
    missing = [column for column in COLUMNS if row.get(column) is None]
    lists = [column for column in COLUMNS if column != PROMPT_LENGTH]
    no_lists = [column for column in lists if not isinstance(row.get(column), Sequence | np.ndarray)]
    if missing or no_lists:
        raise BadRecordError(
            f"the columns {', '.join(missing or no_lists)} are missing; a packed record has {', '.join(COLUMNS)}"
        )


def _without_row_axis(ids: Any) -> Any:
    """Return the ids of a prompt that may be stored as one row of a 2-D array, as in some published sets."""
    return ids[0] if len(ids) == 1 and isinstance(ids[0], Sequence | np.ndarray) else ids


def _ids(values: Any) -> np.ndarray:
    """Return token ids, or nested lists of them, as int64; raise `BadRecordError` if any is not an integer.

    NumPy alone would turn `True` into 1 and cut 2.5 down to 2.
    """
    if not isinstance(values, np.ndarray):
        values = np.array(values, dtype=object)
    kinds = {values.dtype.type} if values.dtype != object else set(map(type, values.flat))
    if not all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        raise BadRecordError("there are ids that are no integers")
    try:
        return values.astype(np.int64)
    except OverflowError:
        raise BadRecordError("there are ids that do not fit into 64 bits") from None
