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
    """A record taken apart: the blocks of each noisy view (N of them) and the clean ones; `end` is the length of the answer."""

    index: int
    prompt: np.ndarray
    noisy_NTn: np.ndarray
    clean_Tn: np.ndarray
    end: int
    ended: bool
    is_replay: bool

    @property
    def blocks(self) -> int:
        return len(self.clean_Tn)

    @property
    def noisy_blocks(self) -> int:
        return len(self.noisy_NTn) * self.blocks

    def labels(self, *, prompt_loss: bool) -> tuple[np.ndarray, np.ndarray]:
        """The next token behind each prompt slot and each slot of the clean blocks."""
        answer = self.clean_Tn.reshape(-1)
        behind = np.full(len(answer), IGNORE)
        behind[: max(0, self.end - 1)] = answer[1 : self.end]
        of_prompt = np.full(len(self.prompt), IGNORE)
        if prompt_loss or self.is_replay:
            of_prompt[:-1] = self.prompt[1:]
        if len(answer):
            of_prompt[-1] = answer[0]
        return of_prompt, behind

    @cached_property
    def kept_NTn(self) -> np.ndarray:
        """Which slots of the noisy blocks carry a consistency loss: from the first wrong one on, where the answer goes on behind."""
        slot_Tn = np.arange(self.clean_Tn.size).reshape(self.clean_Tn.shape)
        wrong_NTn = (self.noisy_NTn != self.clean_Tn) & (slot_Tn < self.end)
        behind = slot_Tn + 1 < self.end if self.ended else slot_Tn < self.end
        kept: np.ndarray = np.logical_or.accumulate(wrong_NTn, axis=2) & behind
        return kept


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
        self._bound = window_of(self.context, self.window)
        # Behind clean context, nothing is lost with slots that carry no loss: before the first wrong one a noisy block is the
        # clean block, and what follows the answer is seen by nobody.
        self._sparse = self._bound == 1
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

    def _read(self, record: Mapping[str, Any], number: int) -> _Sample:
        n, index = self.block_size, int(record.get("index", number))
        empty_Tn = np.empty((0, n), dtype=np.int64)
        if "complete_training_sequence_ids" not in record:
            ids = np.asarray(record["input_ids"], dtype=np.int64)[: self.max_length]
            return _Sample(index, ids, empty_Tn[None], empty_Tn, 0, ended=False, is_replay=True)
        sequence = np.asarray(record["complete_training_sequence_ids"], dtype=np.int64)
        prompt, body = np.split(sequence, [len(record["prompt_ids"])])
        if len(body) % (2 * n):
            raise ValueError(
                f"record {record.get('data_id', index)!r} has {len(body)} ids behind its prompt, which are no pairs of blocks of {n}: "
                "block_size must be that of the data."
            )
        blocks_T2n = body.reshape(-1, 2, n)
        answer = blocks_T2n[:, 1].reshape(-1)
        ends = np.isin(answer, self.eos_token_ids).nonzero()[0]
        end = int(ends[0]) + 1 if len(ends) else len(answer)
        others = np.asarray(record.get("more_noisy_ids") or [], dtype=np.int64).reshape(-1, len(blocks_T2n), n)
        noisy_NTn = np.concatenate([blocks_T2n[None, :, 0], others])
        if not self.noisy:
            noisy_NTn = noisy_NTn[:0]
        return _Sample(index, prompt, noisy_NTn, blocks_T2n[:, 1], end, ended=bool(len(ends)), is_replay=False)

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
        if self._sparse:
            return len(sample.prompt) + sample.end + int(sample.kept_NTn.sum())
        return len(sample.prompt) + sample.noisy_NTn.size + sample.clean_Tn.size

    def _pack(self, sample: _Sample, row: _Row, number: int) -> None:
        n, prompt_length, blocks = self.block_size, len(sample.prompt), sample.blocks
        of_prompt, behind = sample.labels(prompt_loss=self.prompt_loss)
        own, first = row.members, row.length + prompt_length
        row.add(
            sample.prompt,
            np.arange(prompt_length),
            sample.index,
            sample=own,
            labels=of_prompt,
            replay=int(sample.is_replay),
        )
        if blocks:
            kept_NTn = sample.kept_NTn
            views = len(kept_NTn)
            # Per block: the first noisy view, the clean block, the other views; only the first two are the published format's.
            clean_at = min(1, views)
            order = [place for place in range(views + 1) if place != clean_at]

            def laid_out(noisy_NTn: np.ndarray, clean_Tn: np.ndarray) -> np.ndarray:
                whole_TVn = np.empty((blocks, views + 1, n), dtype=np.int64)
                whole_TVn[:, order], whole_TVn[:, clean_at] = noisy_NTn.swapaxes(0, 1), clean_Tn
                return whole_TVn.reshape(-1)

            def everywhere(value_Tn: np.ndarray) -> np.ndarray:
                return laid_out(np.broadcast_to(value_Tn, kept_NTn.shape), value_Tn)

            slot_Tn = np.arange(n * blocks).reshape(blocks, n)
            used = (
                np.flatnonzero(laid_out(kept_NTn, slot_Tn < sample.end))
                if self._sparse
                else np.arange(n * blocks * (views + 1))
            )
            place = np.zeros(n * blocks * (views + 1), dtype=np.int64)
            place[used] = first + np.arange(len(used))
            nothing_NTn, nothing_Tn = np.full(kept_NTn.shape, IGNORE), np.full((blocks, n), -1)
            teacher_NTn = np.where(kept_NTn, (number << 32) | place.reshape(blocks, views + 1, n)[:, clean_at], -1)
            stream_NTn = np.broadcast_to(NOISY + np.arange(views)[:, None, None], kept_NTn.shape)
            begin_NTn = np.broadcast_to(slot_Tn[:, :1], kept_NTn.shape)
            if self._sparse:
                begin_NTn = begin_NTn + kept_NTn.argmax(2)[..., None]
            row.add(
                laid_out(sample.noisy_NTn, sample.clean_Tn)[used],
                everywhere(prompt_length + slot_Tn)[used],
                sample.index,
                sample=own,
                stream=laid_out(stream_NTn, np.full((blocks, n), CLEAN))[used],
                block=everywhere(np.arange(blocks).repeat(n).reshape(blocks, n))[used],
                start=laid_out(
                    prompt_length + begin_NTn, np.broadcast_to(prompt_length + slot_Tn[:, :1], (blocks, n))
                )[used],
                labels=laid_out(nothing_NTn, behind.reshape(blocks, n))[used],
                teacher=laid_out(teacher_NTn, nothing_Tn)[used],
                divisor=max(1, int(kept_NTn.sum()) * blocks),
            )
        row.members += 1
        row.samples += blocks > 0
        row.blocks += sample.noisy_blocks

    def _causal_rows(self, samples: list[_Sample]) -> list[_Row]:
        """Per sample, one clean row `[prompt, l_0, l_1, ..]` and one per window `[prompt, l_.. of earlier windows, k_.. of its own]`."""
        rows: list[_Row] = []
        for sample in samples:
            n, prompt_length, blocks = self.block_size, len(sample.prompt), sample.blocks
            of_prompt, behind = sample.labels(prompt_loss=self.prompt_loss)
            clean_row = len(rows)
            rows.append(_Row(samples=int(blocks > 0), blocks=sample.noisy_blocks))
            ids = np.concatenate([sample.prompt, sample.clean_Tn.reshape(-1)])
            rows[-1].add(
                ids,
                np.arange(len(ids)),
                sample.index,
                labels=np.concatenate([of_prompt, behind]),
                replay=int(sample.is_replay),
            )
            kept_NTn, bound = sample.kept_NTn, self._bound or max(1, blocks)
            for view, first in itertools.product(range(len(kept_NTn)), range(0, blocks, bound)):
                noisy = sample.noisy_NTn[view, first : first + bound].reshape(-1)
                before = prompt_length + first * n
                ids = np.concatenate([sample.prompt, sample.clean_Tn[:first].reshape(-1), noisy])
                column = np.arange(len(ids))
                kept = np.concatenate(
                    [np.zeros(before, dtype=bool), kept_NTn[view, first : first + bound].reshape(-1)]
                )
                rows.append(_Row())
                rows[-1].add(
                    ids,
                    column,
                    sample.index,
                    teacher=np.where(kept, (clean_row << 32) | column, -1),
                    divisor=max(1, int(kept_NTn.sum()) * blocks),
                )
        return rows


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
