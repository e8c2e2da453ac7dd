"""The collator: from packed records and replay rows to the tensors of a training batch.

A replay row has `input_ids` alone. It is ordinary text for the AR loss.

Suffixes of array names: P prompt tokens, M views, T blocks, n tokens of a block; B rows, L slots of a row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jacobi_hf.trainer.data.batch import FILL, Row
from jacobi_hf.trainer.data.record import SEQUENCE, PackedRecord, interleave
from jacobi_hf.trainer.forcing.losses import IGNORE
from jacobi_hf.trainer.forcing.mask import CLEAN, NOISY, blocks_per_window

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LAYOUTS = ("packed", "rows")


@dataclass(frozen=True)
class _Sample:
    """A record or replay row, ready to be laid out.

    Attributes:
        index: number of the row in the data set.
        prompt_P: token ids of the prompt, or of the whole text of a replay row.
        noisy_MTn, clean_Tn, position_Tn: as in `PackedRecord`; M is 0 if no noisy block is wanted, T is 0 in a replay
            row.
        end: length of the answer in tokens, its end-of-sequence id included.
        ended: whether the answer has an end-of-sequence id.
        is_replay: whether it is a replay row.
    """

    index: int
    prompt_P: np.ndarray
    noisy_MTn: np.ndarray
    clean_Tn: np.ndarray
    position_Tn: np.ndarray
    end: int
    ended: bool
    is_replay: bool

    @property
    def blocks(self) -> int:
        return len(self.clean_Tn)

    @property
    def noisy_blocks(self) -> int:
        return len(self.noisy_MTn) * self.blocks

    @cached_property
    def offset_Tn(self) -> np.ndarray:
        """The offset of each slot of the clean blocks in the answer: 0 to nT - 1."""
        return self.position_Tn - len(self.prompt_P)

    def labels(self, *, prompt_loss: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels of the AR loss: the next token of each slot, or `IGNORE`.

        Args:
            prompt_loss: whether the slots of the prompt have labels. The last one always has.

        Returns:
            The labels of the prompt `(P,)`, and those of the clean blocks one after the other `(nT,)`.
        """
        answer = self.clean_Tn.reshape(-1)
        after_answer = np.full(len(answer), IGNORE)
        after_answer[: max(0, self.end - 1)] = answer[1 : self.end]
        after_prompt_P = np.full(len(self.prompt_P), IGNORE)
        if prompt_loss or self.is_replay:
            after_prompt_P[:-1] = self.prompt_P[1:]
        if len(answer):
            after_prompt_P[-1] = answer[0]
        return after_prompt_P, after_answer

    @cached_property
    def kept_MTn(self) -> np.ndarray:
        """Whether a slot of a noisy block has a consistency loss.

        It has from the first wrong token of its block on, if the answer goes on after it.
        """
        wrong_MTn = (self.noisy_MTn != self.clean_Tn) & (self.offset_Tn < self.end)
        goes_on_Tn = self.offset_Tn + 1 < self.end if self.ended else self.offset_Tn < self.end
        kept_MTn: np.ndarray = np.logical_or.accumulate(wrong_MTn, axis=2) & goes_on_Tn
        return kept_MTn


@dataclass
class JacobiForcingCollator:
    """Lays records and replay rows out as a training batch, in packed rows or in plain causal rows.

    Call it with a list of rows, as a `DataLoader` does.

    Parameters:
        block_size: n of the records.
        eos_token_ids: an answer ends with the first of these ids. Slots after it have no loss.
        pad_token_id: id of the padding on the right.
        layout: `"packed"`, the rows of `jacobi_hf.trainer.data.record`, which need the mask of
            `jacobi_hf.trainer.forcing.mask`; or `"rows"`, plain causal rows, for any attention.
        context, context_window: what noisy blocks see, see `jacobi_hf.trainer.forcing.mask`.
        max_length: most slots of a packed row. Short samples share a row, which gets no longer than the longest sample
            of the batch. With the clean context, noisy slots without a loss are left out.
        prompt_loss: whether the AR loss covers the prompt.
        noisy: whether noisy blocks are laid out. Only the consistency loss needs them.
        pad_to_multiple_of: the length of the rows is rounded up to a multiple of this.

    Returns (of a call): int tensors `(B, L)`, if not said otherwise.
        input_ids, position_ids: inputs of the model.
        sample, stream, block, start: what the slots are, see `Slots`; only in packed rows.
        attention_mask: 1, and 0 for padding; only in plain rows.
        labels: the next token of each slot, for the AR loss, or `IGNORE`. They are shifted already.
        replay: 1 in replay rows.
        teacher: for a noisy slot with a consistency loss, the index of its clean slot in the flattened batch; else -1.
        divisor: T times the number of slots of the sample with a consistency loss.
        index: number of the row in the data set.
        blocks_in_row, samples_in_row: `(B,)`, the noisy blocks and the records of each row.

    Raises:
        ValueError: the layout is unknown, `layout="rows"` comes with the clean context, or a record is too long.
        BadRecordError: a record is malformed or has another block size.
    """

    block_size: int
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    layout: str = "packed"
    context: str = "clean"
    context_window: int | None = None
    max_length: int = 2048
    prompt_loss: bool = True
    noisy: bool = True
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} must be one of {', '.join(map(repr, LAYOUTS))}.")
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size} must be at least 2.")
        self._blocks_per_window = blocks_per_window(self.context, self.context_window)
        # With the clean context, noisy slots without a loss can be left out: before its first wrong token a noisy
        # block equals the clean block, and no slot sees what comes after the answer.
        self._sparse = self._blocks_per_window == 1
        if self.layout == "rows" and self.context == "clean":
            raise ValueError(
                "layout='rows' has no clean context: each noisy block would need a row of its own. "
                "Use layout='packed', or context='noisy' or 'window'."
            )

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch of packed records and replay rows."""
        samples = [self._read(record, number) for number, record in enumerate(records)]
        rows = self._packed_rows(samples) if self.layout == "packed" else self._causal_rows(samples)
        length = max(row.length for row in rows)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        fill = {**FILL, "input_ids": self.pad_token_id}
        dropped = {"attention_mask"} if self.layout == "packed" else {"sample", "stream", "block", "start"}
        batch = {
            name: np.full((len(rows), length), fill[name], dtype=np.int64) for name in FILL if name not in dropped
        }
        for number, row in enumerate(rows):
            for name, target in batch.items():
                target[number, : row.length] = np.concatenate(row.parts[name])
        # Teachers are (row, column) in one number until here, since the length of the rows was not known.
        teacher = batch["teacher"]
        batch["teacher"] = np.where(teacher < 0, -1, (teacher >> 32) * length + (teacher & 0xFFFFFFFF))
        batch["blocks_in_row"] = np.array([row.blocks for row in rows])
        batch["samples_in_row"] = np.array([row.samples for row in rows])
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _read(self, row: Mapping[str, Any], number: int) -> _Sample:
        """Return the sample of a row with a packed record, or of a replay row, which has `input_ids` alone."""
        n = self.block_size
        index = int(row.get("index", number))
        if SEQUENCE not in row:
            ids = np.asarray(row["input_ids"], dtype=np.int64)[: self.max_length]
            empty_Tn = np.empty((0, n), dtype=np.int64)
            return _Sample(index, ids, empty_Tn[None], empty_Tn, empty_Tn, end=0, ended=False, is_replay=True)
        record = PackedRecord.from_row(row, f"record {row.get('data_id', index)!r}", block_size=n)
        ends = np.isin(record.answer, self.eos_token_ids).nonzero()[0]
        return _Sample(
            index,
            record.prompt_P,
            record.noisy_MTn if self.noisy else record.noisy_MTn[:0],
            record.clean_Tn,
            record.position_Tn,
            end=int(ends[0]) + 1 if len(ends) else len(record.answer),
            ended=bool(len(ends)),
            is_replay=False,
        )

    def _packed_rows(self, samples: list[_Sample]) -> list[Row]:
        """Return packed rows, which short samples share: the longest samples first, each in the first row with room.

        No row gets longer than the longest sample, since the cost of attention grows with the square of the length.
        """
        rows: list[Row] = []
        lengths = [self._packed_length(sample) for sample in samples]
        for length, sample in sorted(zip(lengths, samples, strict=True), key=lambda pair: -pair[0]):
            if length > self.max_length:
                raise ValueError(
                    f"record {sample.index} needs {length} slots, more than max_length={self.max_length}: drop or "
                    "truncate such records, as JacobiForcingTrainer does with too_long."
                )
            number = next((i for i, row in enumerate(rows) if row.length + length <= max(lengths)), len(rows))
            if number == len(rows):
                rows.append(Row())
            self._pack(sample, rows[number], number)
        return rows

    def _packed_length(self, sample: _Sample) -> int:
        """Return how many slots a sample takes in a packed row."""
        if self._sparse:
            return len(sample.prompt_P) + sample.end + int(sample.kept_MTn.sum())
        return len(sample.prompt_P) + sample.noisy_MTn.size + sample.clean_Tn.size

    def _pack(self, sample: _Sample, row: Row, row_number: int) -> None:
        """Add a sample to a packed row: its prompt, then its blocks."""
        after_prompt_P, after_answer = sample.labels(prompt_loss=self.prompt_loss)
        row.add(
            sample.prompt_P,
            np.arange(len(sample.prompt_P)),
            sample.index,
            sample=row.members,
            labels=after_prompt_P,
            replay=int(sample.is_replay),
        )
        if sample.blocks:
            self._pack_blocks(sample, row, row_number, after_answer.reshape(sample.clean_Tn.shape))
        row.members += 1
        row.samples += sample.blocks > 0
        row.blocks += sample.noisy_blocks

    def _pack_blocks(self, sample: _Sample, row: Row, row_number: int, label_Tn: np.ndarray) -> None:
        """Add the blocks of a sample, in the order of the packed layout, to a row that ends with its prompt.

        Args:
            sample: the sample.
            row: the row.
            row_number: number of the row in the batch.
            label_Tn: labels of the clean blocks.
        """
        kept_MTn = sample.kept_MTn
        offset_Tn = sample.offset_Tn
        position_Tn = sample.position_Tn
        used = np.full(kept_MTn.size + offset_Tn.size, fill_value=True)
        if self._sparse:
            used = interleave(kept_MTn, offset_Tn < sample.end)

        def laid_out(noisy: np.ndarray | int, clean: np.ndarray | int) -> np.ndarray:
            return interleave(np.broadcast_to(noisy, kept_MTn.shape), np.broadcast_to(clean, offset_Tn.shape))[used]

        # Columns of the slots in the row. A clean slot that is left out is no teacher, so its column does not matter.
        column = row.length + np.cumsum(used) - 1
        is_clean = interleave(np.zeros_like(kept_MTn), np.ones_like(offset_Tn, dtype=bool))
        teacher_Tn = (row_number << 32) | column[is_clean].reshape(offset_Tn.shape)
        # A sparse noisy block begins at its first slot with a loss.
        start_MTn = position_Tn[:, :1] + (kept_MTn.argmax(2)[..., None] if self._sparse else 0)
        row.add(
            laid_out(sample.noisy_MTn, sample.clean_Tn),
            laid_out(position_Tn, position_Tn),
            sample.index,
            sample=row.members,
            stream=laid_out(NOISY + np.arange(len(kept_MTn))[:, None, None], CLEAN),
            block=laid_out(offset_Tn // self.block_size, offset_Tn // self.block_size),
            start=laid_out(start_MTn, position_Tn[:, :1]),
            labels=laid_out(IGNORE, label_Tn),
            teacher=laid_out(np.where(kept_MTn, teacher_Tn, -1), -1),
            divisor=max(1, int(kept_MTn.sum()) * sample.blocks),
        )

    def _causal_rows(self, samples: list[_Sample]) -> list[Row]:
        """Return plain causal rows, which have the same logits as packed rows.

        Each sample has one clean row `[prompt, l_0, l_1, ...]`. For each view and each window of blocks it has a row
        with the prompt, the clean blocks of earlier windows and the noisy blocks of this window.
        """
        rows: list[Row] = []
        for sample in samples:
            after_prompt_P, after_answer = sample.labels(prompt_loss=self.prompt_loss)
            clean_row = len(rows)
            rows.append(Row(samples=int(sample.blocks > 0), blocks=sample.noisy_blocks))
            ids = np.concatenate([sample.prompt_P, sample.clean_Tn.reshape(-1)])
            rows[-1].add(
                ids,
                np.arange(len(ids)),
                sample.index,
                labels=np.concatenate([after_prompt_P, after_answer]),
                replay=int(sample.is_replay),
            )
            window = self._blocks_per_window or max(1, sample.blocks)
            for view, first in itertools.product(range(len(sample.noisy_MTn)), range(0, sample.blocks, window)):
                rows.append(Row())
                self._add_noisy_row(sample, rows[-1], clean_row, view, slice(first, first + window))
        return rows

    def _add_noisy_row(self, sample: _Sample, row: Row, clean_row: int, view: int, window: slice) -> None:
        """Fill a plain causal row with the noisy blocks of one view and window, and what they follow."""
        before = np.concatenate([sample.prompt_P, sample.clean_Tn[: window.start].reshape(-1)])
        ids = np.concatenate([before, sample.noisy_MTn[view, window].reshape(-1)])
        column = np.arange(len(ids))
        kept = np.concatenate([np.zeros(len(before), dtype=bool), sample.kept_MTn[view, window].reshape(-1)])
        row.add(
            ids,
            column,
            sample.index,
            teacher=np.where(kept, (clean_row << 32) | column, -1),
            divisor=max(1, int(sample.kept_MTn.sum()) * sample.blocks),
        )
