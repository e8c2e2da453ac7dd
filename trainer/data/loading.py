"""Loading of packed records, our own and published ones: every row is checked, and fitted to the length of a row."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from jacobi_hf.trainer.data.record import COLUMNS, MORE_VIEWS, SEQUENCE, BadRecordError, PackedRecord
from jacobi_hf.trainer.data.shards import MANIFEST, ManifestError, checked_shards, read_manifest, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ON_BAD_ROW = ("raise", "skip")
TOO_LONG = ("drop", "truncate")


def load_packed(
    source: str,
    split: str = "train",
    *,
    streaming: bool = False,
    on_bad_row: str = "raise",
    block_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Any:
    """Return the packed records of a JSONL or parquet file, a folder of parquet shards, or a dataset of the Hub.

    Args:
        source: path, or Hub id.
        split: split of a Hub dataset.
        streaming: read the rows while iterating, as a `datasets.IterableDataset`.
        on_bad_row: what happens to a malformed row: `"raise"`, or `"skip"` with a warning.
        block_size: the n that every record must have; None takes the n of the first good record.
        tokenizer: tokenizer of the model; a folder that was packed with another one is refused.
        options: further arguments of `datasets.load_dataset`.

    Raises:
        BadRecordError: a row is malformed and `on_bad_row="raise"`. The error has the number of the row.
        ManifestError: a folder that `pack` wrote is unfinished, damaged, or of another tokenizer.
        FileNotFoundError: there is nothing at the path.
        ValueError: a file is damaged.
    """
    if (Path(source) / MANIFEST).is_file():
        former = read_manifest(source)["settings"].get("tokenizer")
        if tokenizer is not None and former != tokenizer_fingerprint(tokenizer):
            raise ManifestError(
                f"{source} was packed with another tokenizer than the model's: collect and pack again."
            )
        checked_shards(source)
    dataset = open_dataset(source, split, streaming=streaming, **options)
    return checked(dataset, source, on_bad_row=on_bad_row, block_size=block_size)


def open_dataset(source: str, split: str = "train", *, streaming: bool = False, **options: Any) -> Any:
    """Return the rows of a JSONL or parquet file, of a folder of parquet files, or of a dataset of the Hub.

    Args:
        source: path, or Hub id; "owner/name:part" names one of several configurations.
        split: split of a Hub dataset.
        streaming: read the rows while iterating.
        options: further arguments of `datasets.load_dataset`.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: a file is damaged.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = Path(source)
    files: str | list[str] = source
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    kind = "parquet" if path.is_dir() else kinds.get(path.suffix)
    if path.is_dir():
        files = sorted(str(f) for f in path.glob("*.parquet"))
        if not files:
            raise FileNotFoundError(f"the dataset {source} holds no parquet file.")
    is_no_hub_id = kind or path.is_absolute() or source.startswith(".") or source.count("/") > 1
    if not path.exists() and is_no_hub_id:
        raise FileNotFoundError(f"the dataset {source} does not exist.")
    try:
        if kind:
            return load_dataset(kind, data_files=files, split="train", streaming=streaming, **options)
        name, _, part = source.partition(":")
        options = options | ({"name": part} if part else {})
        return load_dataset(name, split=split, streaming=streaming, **options)
    except (DatasetGenerationError, pa.ArrowInvalid) as error:
        raise ValueError(f"the dataset {source} cannot be read: {error.__cause__ or error}") from error


def checked(
    dataset: Any, name: str, *, on_bad_row: str = "raise", block_size: int | None = None, vocab_size: int | None = None
) -> Any:
    """Return a data set whose rows are valid packed records.

    Args:
        dataset: a `datasets.Dataset`, a `datasets.IterableDataset`, which is checked while it is read, or a list of
            rows.
        name: name of the data set in errors.
        on_bad_row: what happens to a malformed row: `"raise"`, or `"skip"` with a warning.
        block_size: the n that every record must have; None takes the n of the first good record.
        vocab_size: size of the vocabulary that all ids must be in; None accepts any id.

    Raises:
        BadRecordError: a column is missing, or a row is malformed and `on_bad_row="raise"`.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row={on_bad_row!r} must be one of {', '.join(map(repr, ON_BAD_ROW))}.")
    found: list[int | None] = [block_size]

    def good(record: Mapping[str, Any], index: int) -> bool:
        try:
            found[0] = PackedRecord.from_row(record, f"row {index} of {name}", found[0], vocab_size).block_size
        except BadRecordError as error:
            if on_bad_row == "raise":
                raise
            logger.warning("%s (skipped)", error)
            return False
        return True

    if isinstance(dataset, list):
        return [record for index, record in enumerate(dataset) if good(record, index)]
    columns = getattr(dataset, "column_names", None)
    missing = [] if columns is None else [column for column in COLUMNS if column not in columns]
    if columns is not None and missing:
        raise BadRecordError(f"{name} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}.")
    # A cached result of a Dataset would skip the warnings.
    options = {"load_from_cache_file": False} if isinstance(dataset, Sized) else {}
    return dataset.filter(good, with_indices=True, **options)


def fit(row: Mapping[str, Any], max_length: int, too_long: str) -> dict[str, Any] | None:
    """Return a row whose record takes at most `max_length` slots, or None.

    Args:
        row: a row with a packed record.
        max_length: most slots of the record, its further views included.
        too_long: what happens to a longer record: `"truncate"` leaves out its last blocks, `"drop"` gives None.

    Returns:
        The row with plain lists, shortened if needed; None if the record is dropped, or if not even its first block
        fits.
    """
    record = PackedRecord.from_row(row)
    if record.slots > max_length:
        blocks = record.blocks_within(max_length) if too_long == "truncate" else 0
        if not blocks:
            return None
        record = record.first_blocks(blocks)
    return {**row, **record.to_row()}


class _Mixture:
    """Base of the training sets: records that fit, and replay rows.

    Replay rows come in a shuffled order, which starts again when all were used.

    Args:
        records: rows with packed records.
        max_length: most slots of a record.
        too_long: what happens to a longer record: `"drop"` or `"truncate"`, see `fit`.
        replay: rows with `input_ids`, or None.
        replay_ratio: replay rows for each record.

    Raises:
        ValueError: too_long is unknown, or replay has no rows.
    """

    def __init__(
        self,
        records: Any,
        max_length: int,
        too_long: str = "drop",
        replay: Sequence[Mapping[str, Any]] | None = None,
        replay_ratio: float = 1.0,
    ) -> None:
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long={too_long!r} must be one of {', '.join(map(repr, TOO_LONG))}.")
        if replay is not None and not len(replay):
            raise ValueError("replay_dataset is empty.")
        self._records = records
        self._max_length = max_length
        self._too_long = too_long
        self._replay = replay or ()
        self._replay_ratio = replay_ratio if replay else 0.0
        self._order = random.Random(0).sample(range(len(self._replay)), len(self._replay))

    def _fitted(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        return fit(record, self._max_length, self._too_long)

    def _replayed(self, number: int) -> dict[str, Any]:
        row = self._order[number % len(self._order)]
        return {"input_ids": self._replay[row]["input_ids"][: self._max_length], "data_id": f"replay {row}"}


class TrainingRecords(_Mixture, torch.utils.data.Dataset[dict[str, Any]]):
    """A training set with a length: the records that fit, and after them the replay rows. Arguments: see `_Mixture`.

    Attributes:
        dropped: how many records were "dropped", and how many were "truncated".

    Raises:
        ValueError: no record is left.
    """

    def __init__(self, records: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(records, *args, **kwargs)
        lengths = list(_slots(records))
        may_cut = self._too_long == "truncate"
        self._kept = [
            number
            for number, length in enumerate(lengths)
            if length <= self._max_length or (may_cut and self._fitted(records[number]) is not None)
        ]
        truncated = sum(lengths[number] > self._max_length for number in self._kept)
        self.dropped = Counter({"dropped": len(lengths) - len(self._kept), "truncated": truncated})
        if not self._kept:
            raise ValueError(
                f"no record is left: {self.dropped['dropped']} of {len(lengths)} are longer than "
                f"max_length={self._max_length}"
                f"{' even with a single block' if may_cut else ''}. "
                f"Raise max_length{'' if may_cut else ', or set too_long=' + repr('truncate')}."
            )
        if self.dropped.total():
            counts = (len(lengths), self.dropped["dropped"], truncated, self._max_length)
            logger.warning("of %d records, %d were dropped and %d truncated (max_length=%d)", *counts)

    def __len__(self) -> int:
        return len(self._kept) + round(self._replay_ratio * len(self._kept))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self._kept):
            return {**self._replayed(index - len(self._kept)), "index": index}
        record = self._fitted(self._records[self._kept[index]])
        assert record is not None
        return {**record, "index": index}

    def name(self, index: int) -> str:
        """Return the name of a row in errors."""
        return str(self[index].get("data_id", f"record {index}"))


class StreamedRecords(_Mixture, torch.utils.data.IterableDataset[dict[str, Any]]):
    """A training set without a length: records that are read while training, in their order, and replay rows.

    Arguments: see `_Mixture`, with records as a `datasets.IterableDataset`.

    Raises:
        ValueError: no record was left when the stream ended.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Each worker reads a part of the stream. The numbers of the rows must differ between workers.
        worker = torch.utils.data.get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        given = replayed = dropped = 0
        owed = 0.0

        def numbered(record: dict[str, Any]) -> dict[str, Any]:
            return {**record, "index": first + stride * given}

        for row in self._records:
            record = self._fitted(row)
            if record is None:
                dropped += 1
                continue
            yield numbered(record)
            given += 1
            owed += self._replay_ratio
            while owed >= 1:
                yield numbered(self._replayed(first + stride * replayed))
                given += 1
                replayed += 1
                owed -= 1
        if dropped:
            logger.warning(
                "of %d streamed records, %d were dropped (max_length=%d)",
                given - replayed + dropped,
                dropped,
                self._max_length,
            )
        if not given and (dropped or worker is None):  # a worker may have no part of the stream
            raise ValueError(
                f"no record is left: all {dropped} of the stream are longer than max_length={self._max_length}."
            )

    def name(self, index: int) -> str:
        """Return the name of a row in errors."""
        return f"row {index} of the stream, replay rows counted"


def _slots(records: Any) -> Iterator[int]:
    """Yield `PackedRecord.slots` of each record. For a `datasets.Dataset` the lengths of its lists are enough."""
    if isinstance(records, list):
        yield from (PackedRecord.from_row(row).slots for row in records)
        return
    columns = [name for name in (SEQUENCE, MORE_VIEWS) if name in records.column_names]
    for batch in records.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        lengths = pc.list_value_length(batch[SEQUENCE]).to_numpy()
        if MORE_VIEWS in columns:
            lengths = lengths + np.array([sum(map(len, views or [])) for views in batch[MORE_VIEWS].to_pylist()])
        yield from map(int, lengths)
