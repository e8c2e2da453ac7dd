"""Loading packed trajectories, ours and the published ones, with every row checked; and mixing in replay."""

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
    """Packed records from a JSONL or parquet file, a folder of parquet shards, or a dataset of the Hub.

    Args:
        source: path or Hub id.
        split: of a Hub dataset.
        streaming: read while iterating (`datasets.IterableDataset`) instead of converting first.
        on_bad_row: `"raise"` or `"skip"` (with a warning per bad row).
        block_size: the n that every record must have; None takes that of the first good one.
        tokenizer: that of the model; a folder that was packed for another one is refused.
        options: go to `datasets.load_dataset`.

    Raises:
        BadRecordError: a bad row, named by index and reason, under `on_bad_row="raise"`.
        ManifestError: a folder of ours that is unfinished, damaged, or of another tokenizer.
        FileNotFoundError: a path of which nothing is there.
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
    """Rows of a JSONL or parquet file, of a folder of parquet files, or of a dataset of the Hub.

    Raises:
        FileNotFoundError: a path of which nothing is there.
        ValueError: a file that is damaged.
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
    elif not path.is_file() and (
        kind or path.is_absolute() or source.startswith(".") or source.count("/") > 1
    ):  # no Hub id
        raise FileNotFoundError(f"the dataset {source} does not exist.")
    try:
        if kind:
            return load_dataset(kind, data_files=files, split="train", streaming=streaming, **options)
        return load_dataset(source, split=split, streaming=streaming, **options)
    except (DatasetGenerationError, pa.ArrowInvalid) as error:
        raise ValueError(f"the dataset {source} cannot be read: {error.__cause__ or error}") from error


def checked(
    dataset: Any, name: str, *, on_bad_row: str = "raise", block_size: int | None = None, vocab_size: int | None = None
) -> Any:
    """`dataset` with every row checked by `PackedRecord.from_row`, bad ones raising or left out.

    Takes a `datasets.Dataset`, a `datasets.IterableDataset` (checked while it is read) or a list of records.
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
    # An IterableDataset is filtered while it is read; of a Dataset, a cached result would skip the check's warnings.
    options = {"load_from_cache_file": False} if isinstance(dataset, Sized) else {}
    return dataset.filter(good, with_indices=True, **options)


def fit(row: Mapping[str, Any], max_length: int, too_long: str) -> dict[str, Any] | None:
    """Return a row whose record takes at most `max_length` slots, or None.

    Args:
        row: a row with a packed record.
        max_length: most slots of the record, its further views included.
        too_long: what happens to a longer record: `"truncate"` leaves out its last blocks, `"drop"` gives None.

    Returns:
        The row with plain lists, shortened if needed; None if the record is dropped, or if not even its first block fits.
    """
    record = PackedRecord.from_row(row)
    if record.slots > max_length:
        blocks = record.blocks_within(max_length) if too_long == "truncate" else 0
        if not blocks:
            return None
        record = record.first_blocks(blocks)
    return {**row, **record.to_row()}


class _Mixture:
    """Records that are fitted, and replay rows in a fixed shuffle (a part of them is a fair sample), over and over.

    Args:
        records: packed records.
        max_length, too_long: see `fit`.
        replay: rows with `input_ids`, or None.
        replay_ratio: replay rows per trajectory row.

    Raises:
        ValueError: an unknown `too_long`, or a replay set without rows.
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
    """Map-style training set: trajectories that fit, and `replay_ratio` rows of replay for each. Arguments: `_Mixture`.

    Attributes:
        dropped: how many records were too long, and how many were truncated.

    Raises:
        ValueError: nothing is left.
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
                f"no record is left: {self.dropped['dropped']} of {len(lengths)} are longer than max_length={self._max_length}"
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
        """What an error calls the record."""
        return str(self[index].get("data_id", f"record {index}"))


class StreamedRecords(_Mixture, torch.utils.data.IterableDataset[dict[str, Any]]):
    """The same of records that are read while training (`datasets.IterableDataset`), in their order. Arguments: `_Mixture`.

    Raises:
        ValueError: nothing is left, when the stream has ended.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Workers read a part of the stream each, and number what they give among themselves.
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
            given, owed = given + 1, owed + self._replay_ratio
            while owed >= 1:
                yield numbered(self._replayed(first + stride * replayed))
                given, replayed, owed = given + 1, replayed + 1, owed - 1
        if dropped:
            logger.warning(
                "of %d streamed records, %d were dropped (max_length=%d)",
                given - replayed + dropped,
                dropped,
                self._max_length,
            )
        if not given and (dropped or worker is None):  # a worker may be without a part
            raise ValueError(
                f"no record is left: all {dropped} of the stream are longer than max_length={self._max_length}."
            )

    def name(self, index: int) -> str:
        """What an error calls the record."""
        return f"row {index} of the stream, replay rows counted"


def _slots(records: Any) -> Iterator[int]:
    """Yield `PackedRecord.slots` of each row, from the lengths of its lists alone: arrow need not become Python lists."""
    if isinstance(records, list):
        yield from (PackedRecord.from_row(row).slots for row in records)
        return
    columns = [name for name in (SEQUENCE, MORE_VIEWS) if name in records.column_names]
    for batch in records.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        lengths = pc.list_value_length(batch[SEQUENCE]).to_numpy()
        if MORE_VIEWS in columns:
            lengths = lengths + np.array([sum(map(len, views or [])) for views in batch[MORE_VIEWS].to_pylist()])
        yield from map(int, lengths)


def tokenized_replay(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, max_length: int, vocab_size: int | None = None
) -> list[dict[str, list[int]]]:
    """Replay rows as `input_ids`, from a dataset with `input_ids`, `text` or `messages`; longer texts are cut into several rows.

    Raises:
        ValueError: none of these columns, or text without a tokenizer.
    """
    rows: list[dict[str, list[int]]] = []
    for number, row in enumerate(dataset):
        if row.get("input_ids") is not None:
            ids = list(row["input_ids"])
            if vocab_size is not None and ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(
                    f"row {number} of replay_dataset has ids outside the model's vocabulary of {vocab_size}."
                )
        elif row.get("text") is None and row.get("messages") is None:
            raise ValueError(
                f"row {number} of replay_dataset has none of the columns input_ids, text, messages; it has {', '.join(row)}."
            )
        elif tokenizer is None:
            raise ValueError("replay_dataset holds text: give processing_class (the tokenizer) as well.")
        elif row.get("text") is not None:
            ids = tokenizer(row["text"])["input_ids"]
            ids = [*ids, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids
        else:
            ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        rows += [{"input_ids": ids[start : start + max_length]} for start in range(0, len(ids) - 1, max_length)]
    return rows
