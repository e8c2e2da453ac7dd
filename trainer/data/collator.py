"""From packed records to the compact integer tensors that masks and losses are built from on the device.

A *record* is a row of the published format, `prompt, k_0, l_0, k_1, l_1, ...` (noisy block, clean block), or a replay row with
`input_ids` alone, which is ordinary text for the AR loss.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jacobi_hf.trainer.data.record import SEQUENCE, PackedRecord, interleave
from jacobi_hf.trainer.forcing.losses import IGNORE
from jacobi_hf.trainer.forcing.mask import CLEAN, NOISY, PADDING, PROMPT, window_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LAYOUTS = ("packed", "rows")
COUNTS = ("labels", "replay labels", "pairs", "blocks", "samples")

_FILL = {
    "input_ids": 0,
    "position_ids": 0,
    "sample": PADDING,
    "stream": PROMPT,
    "block": 0,
    "start": 0,
    "labels": IGNORE,
    "replay": 0,
    "teacher": -1,
    "divisor": 1,
    "index": -1,
    "attention_mask": 0,
}


@dataclass
class _Row:
    """One row under construction: an array per tensor, and what a whole row counts."""

    parts: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in _FILL})
    length: int = 0
    members: int = 0
    samples: int = 0  # those with blocks
    blocks: int = 0  # noisy ones, of all views

    def add(self, ids: np.ndarray, positions: np.ndarray, index: int, **tensors: np.ndarray | int) -> None:
        given = {"input_ids": ids, "position_ids": positions, "index": index, "attention_mask": 1, **tensors}
        for name, fill in _FILL.items():
            value = given.get(name, fill)
            self.parts[name].append(value if isinstance(value, np.ndarray) else np.full(len(ids), value))
        self.length += len(ids)


@dataclass(frozen=True)
class _Sample:
    """What a row of training data holds, ready to be laid out.

    Attributes:
        index: number of the row in the data set.
        prompt_P: token ids of the prompt, or of the whole text of a replay row.
        noisy_MTn, clean_Tn, position_Tn: as in `PackedRecord`; M is 0 if no noisy block is wanted, T is 0 in a replay row.
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
        """Return the token after each slot of the prompt, and after each slot of the clean blocks; `IGNORE` where there is no AR loss."""
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
        """Which slots of the noisy blocks have a consistency loss: from the first wrong token on, if the answer goes on after them."""
        wrong_MTn = (self.noisy_MTn != self.clean_Tn) & (self.offset_Tn < self.end)
        goes_on_Tn = self.offset_Tn + 1 < self.end if self.ended else self.offset_Tn < self.end
        kept_MTn: np.ndarray = np.logical_or.accumulate(wrong_MTn, axis=2) & goes_on_Tn
        return kept_MTn


@dataclass
class JacobiForcingCollator:
    """Lays a batch of records out as packed rows (`layout="packed"`) or as plain causal rows (`layout="rows"`).

    Parameters:
        block_size: n of the records.
        eos_token_ids: an answer ends with the first of these; what follows carries no loss.
        pad_token_id: of the padding on the right.
        layout: `"packed"` needs the mask of `jacobi_hf.trainer.forcing.mask`; `"rows"` needs none and runs with any attention.
        context, window: what noisy blocks see, see `jacobi_hf.trainer.forcing.mask`.
        max_length: most slots of a row. In packed rows, short samples share a row no longer than the longest of the batch; with the
            clean context, slots that neither carry a loss nor are context of one are left out.
        prompt_loss: whether the AR loss covers the prompt.
        noisy: whether noisy blocks are laid out at all; without a consistency loss nothing needs them.
        pad_to_multiple_of: round the row length up.

    Returns (calling it with a list of records):
        int tensors `(B, L)`: `input_ids`, `position_ids`, `labels` (already shifted: the token behind each slot), `replay`, `teacher` (for
        a noisy slot with a consistency loss, its clean counterpart as an index into the flattened batch, else -1), `divisor`
        (T times the kept slots of the sample), `index` (of the record in the dataset), and `sample`, `stream`, `block`, `start` (packed) or
        `attention_mask` (rows); and `blocks_in_row`, `samples_in_row` (those with blocks) `(B,)`.

    Raises:
        ValueError: an unknown layout, `layout="rows"` with the clean context, a record that does not fit.
    """

    block_size: int
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    layout: str = "packed"
    context: str = "clean"
    window: int | None = None
    max_length: int = 2048
    prompt_loss: bool = True
    noisy: bool = True
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} must be one of {', '.join(map(repr, LAYOUTS))}.")
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size} must be at least 2.")
        self._blocks_per_window = window_of(self.context, self.window)
        # Behind clean context, nothing is lost with slots that carry no loss: before the first wrong one a noisy block is the
        # clean block, and what follows the answer is seen by nobody.
        self._sparse = self._blocks_per_window == 1
        if self.layout == "rows" and self.context == "clean":
            raise ValueError(
                "layout='rows' has no clean context: each noisy block would need a row of its own. Use layout='packed', or context='noisy' "
                "or 'window'."
            )

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of `records`, see the class."""
        samples = [self._read(record, number) for number, record in enumerate(records)]
        rows = self._packed_rows(samples) if self.layout == "packed" else self._causal_rows(samples)
        length = max(row.length for row in rows)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        fill = {**_FILL, "input_ids": self.pad_token_id}
        dropped = {"attention_mask"} if self.layout == "packed" else {"sample", "stream", "block", "start"}
        batch = {
            name: np.full((len(rows), length), fill[name], dtype=np.int64) for name in _FILL if name not in dropped
        }
        for number, row in enumerate(rows):
            for name, target in batch.items():
                target[number, : row.length] = np.concatenate(row.parts[name])
        # A teacher was noted as (row, column); rows had no common length yet.
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

    def _packed_rows(self, samples: list[_Sample]) -> list[_Row]:
        """First fit, longest first: samples share rows as long as the longest of them, since attention costs a row's length squared."""
        rows: list[_Row] = []
        lengths = [self._packed_length(sample) for sample in samples]
        for length, sample in sorted(zip(lengths, samples, strict=True), key=lambda pair: -pair[0]):
            if length > self.max_length:
                raise ValueError(
                    f"record {sample.index} needs {length} slots, more than max_length={self.max_length}: drop or "
                    "truncate such records (JacobiForcingTrainer does, see too_long)."
                )
            number = next((i for i, row in enumerate(rows) if row.length + length <= max(lengths)), len(rows))
            if number == len(rows):
                rows.append(_Row())
            self._pack(sample, rows[number], number)
        return rows

    def _packed_length(self, sample: _Sample) -> int:
        """Return how many slots a sample takes in a packed row."""
        if self._sparse:
            return len(sample.prompt_P) + sample.end + int(sample.kept_MTn.sum())
        return len(sample.prompt_P) + sample.noisy_MTn.size + sample.clean_Tn.size

    def _pack(self, sample: _Sample, row: _Row, row_number: int) -> None:
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

    def _pack_blocks(self, sample: _Sample, row: _Row, row_number: int, label_Tn: np.ndarray) -> None:
        """Add the noisy and clean blocks of a sample, in the order of the packed layout, to a row that ends with its prompt."""
        kept_MTn = sample.kept_MTn
        offset_Tn = sample.offset_Tn
        position_Tn = sample.position_Tn
        used = np.full(kept_MTn.size + offset_Tn.size, fill_value=True)
        if self._sparse:
            used = interleave(kept_MTn, offset_Tn < sample.end)

        def laid_out(noisy: np.ndarray | int, clean: np.ndarray | int) -> np.ndarray:
            return interleave(np.broadcast_to(noisy, kept_MTn.shape), np.broadcast_to(clean, offset_Tn.shape))[used]

        # Columns of the clean slots in the row. Clean slots that are not used teach nobody, so any column does for them.
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

    def _causal_rows(self, samples: list[_Sample]) -> list[_Row]:
        """Return plain causal rows that give the packed row's logits.

        Each sample has one clean row, `[prompt, l_0, l_1, ..]`, and for each view and window of blocks a row
        `[prompt, clean blocks of earlier windows, noisy blocks of this window]`.
        """
        rows: list[_Row] = []
        for sample in samples:
            after_prompt_P, after_answer = sample.labels(prompt_loss=self.prompt_loss)
            clean_row = len(rows)
            rows.append(_Row(samples=int(sample.blocks > 0), blocks=sample.noisy_blocks))
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
                rows.append(_Row())
                self._add_noisy_row(sample, rows[-1], clean_row, view, slice(first, first + window))
        return rows

    def _add_noisy_row(self, sample: _Sample, row: _Row, clean_row: int, view: int, window: slice) -> None:
        """Fill a plain causal row with one window of noisy blocks, after the prompt and the clean blocks of earlier windows."""
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


def clean_part(batch: Mapping[str, torch.Tensor], multiple: int = 1) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch without its noisy slots, for models that only read clean text.

    Args:
        batch: what `JacobiForcingCollator` returned, in either layout.
        multiple: round the row length up, no further than the batch's own.

    Returns:
        the layout's tensors `(B', L')`, and where each of those B' L' slots lies in the flattened batch, -1 for padding.
    """
    length = batch["input_ids"].shape[1]
    home_BL = torch.arange(batch["input_ids"].numel(), device=batch["input_ids"].device).view(batch["input_ids"].shape)
    if "stream" not in batch:  # plain rows are noisy or clean as a whole
        clean_B = (batch["labels"] != IGNORE).any(1)
        part = {name: batch[name][clean_B] for name in ("input_ids", "position_ids", "attention_mask")}
        return part, home_BL[clean_B].masked_fill(part["attention_mask"] == 0, -1).flatten()
    clean_BL = (batch["sample"] != PADDING) & (batch["stream"] < NOISY)
    width = min(length, -(-int(clean_BL.sum(1).max()) // multiple) * multiple)
    first_BL = (~clean_BL).long().argsort(dim=1, stable=True)[:, :width]
    is_padding_BL = ~clean_BL.gather(1, first_BL)
    part = {
        name: batch[name].gather(1, first_BL)
        for name in ("input_ids", "position_ids", "sample", "stream", "block", "start")
    }
    part["sample"] = part["sample"].masked_fill(is_padding_BL, PADDING)
    return part, home_BL.gather(1, first_BL).masked_fill(is_padding_BL, -1).flatten()


def counts_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the losses of a batch are averaged over, int `(5,)` in the order of `COUNTS`."""
    labelled, replayed = batch["labels"] != IGNORE, batch["replay"] != 0
    counted = (
        labelled & ~replayed,
        labelled & replayed,
        batch["teacher"] >= 0,
        batch["blocks_in_row"],
        batch["samples_in_row"],
    )
    return torch.stack([c.sum() for c in counted])
