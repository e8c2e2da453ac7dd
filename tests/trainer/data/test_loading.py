"""Loading, checking, fitting and mixing packed records."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset

from jacobi_hf.trainer import BadRecordError, PackedRecord, load_packed
from jacobi_hf.trainer.data.loading import (
    StreamedRecords,
    TrainingRecords,
    checked,
    fit,
)
from jacobi_hf.trainer.data.replay import tokenized_replay
from tests.helpers.records import records

N = 4


@pytest.fixture
def data():
    return records(6, N, seed=2)


@pytest.fixture(params=["jsonl", "parquet", "folder"])
def stored(request, data, tmp_path):
    if request.param == "jsonl":
        path = tmp_path / "packed.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in data))
        return path
    path = tmp_path / ("packed.parquet" if request.param == "parquet" else "folder/part.parquet")
    path.parent.mkdir(exist_ok=True)
    Dataset.from_list(data).to_parquet(path)
    return path if request.param == "parquet" else path.parent


@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_loads_the_same_rows(stored, data, streaming):
    loaded = list(load_packed(str(stored), streaming=streaming, block_size=N))
    assert [{k: row[k] for k in data[0]} for row in loaded] == data


def test_bad_rows_are_fatal_or_skipped(data, tmp_path, caplog):
    data[2]["prompt_ids_len"] += 1
    path = tmp_path / "packed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in data))
    with pytest.raises(BadRecordError, match=r"row 2 of .*packed.jsonl: prompt_ids_len"):
        load_packed(str(path))
    with caplog.at_level(logging.WARNING):
        assert len(load_packed(str(path), on_bad_row="skip")) == 5
    assert "row 2 of" in caplog.text
    with pytest.raises(ValueError, match="on_bad_row='ignore'"):
        load_packed(str(path), on_bad_row="ignore")


def test_a_dataset_of_two_block_sizes_is_refused():
    with pytest.raises(BadRecordError, match="row 2 of mixed: its blocks have 6 tokens, but block_size=4"):
        checked([*records(2, 4), *records(1, 6)], "mixed")


def test_missing_columns_and_files_are_named(tmp_path):
    with pytest.raises(BadRecordError, match="lacks the columns prompt_ids_len"):
        checked(Dataset.from_list([{"prompt_ids": [1]}]), "it")
    for path in ("none.jsonl", "none.parquet"):
        with pytest.raises(FileNotFoundError, match="none"):
            load_packed(str(tmp_path / path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no parquet file"):
        load_packed(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_packed(str(tmp_path / "not" / "there"))


def test_fit_drops_or_truncates_whole_blocks():
    (row,) = records(1, N, blocks=3, prompt=5)
    assert fit(row, 29, "drop") == row
    assert fit(row, 28, "drop") is None
    assert fit(row, 28, "truncate") == row | PackedRecord.from_row(row).first_blocks(2).to_row()
    assert fit(row, 12, "truncate") is None


def test_further_views_count_when_records_are_fitted():
    (row,) = records(1, N, blocks=3, prompt=5, views=3)
    assert fit(row, 5 + 4 * 2 * N, "truncate") == row | PackedRecord.from_row(row).first_blocks(2).to_row()
    for stored in ([row], Dataset.from_list([row])):
        assert len(TrainingRecords(stored, 5 + 4 * 3 * N)) == 1
        with pytest.raises(ValueError, match="no record is left"):
            TrainingRecords(stored, 5 + 4 * 3 * N - 1)


def test_replay_is_mixed_in_by_ratio():
    data = records(10, N)
    mixed = TrainingRecords(data, 64, replay=[{"input_ids": [1, 2]}, {"input_ids": [3, 4]}], replay_ratio=0.5)
    assert len(mixed) == 15
    assert all("complete_training_sequence_ids" in mixed[i] for i in range(10))
    assert {tuple(mixed[i]["input_ids"]) for i in range(10, 15)} == {(1, 2), (3, 4)}
    assert mixed.name(11).startswith("replay ")
    assert [mixed[i]["index"] for i in range(15)] == list(range(15))
    with pytest.raises(ValueError, match="replay_dataset is empty"):
        TrainingRecords(data, 64, replay=[])
    with pytest.raises(ValueError, match="too_long='cut'"):
        TrainingRecords(data, 64, too_long="cut")


class Letters:
    """A tokenizer whose ids are the letters' code points."""

    eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, return_dict):
        return [ord(c) for m in messages for c in m["content"]]


def test_replay_takes_text_messages_and_ids():
    rows = [{"text": "abcde"}, {"messages": [{"role": "user", "content": "xy"}]}, {"input_ids": [1, 2, 3]}]
    tokenized = tokenized_replay(rows, Letters(), 4)
    assert [row["input_ids"] for row in tokenized] == [[97, 98, 99, 100], [101, 0], [120, 121], [1, 2, 3]]
    with pytest.raises(ValueError, match="row 0 of replay_dataset has none of the columns"):
        tokenized_replay([{"other": 1}], Letters(), 4)
    with pytest.raises(ValueError, match="give processing_class"):
        tokenized_replay([{"text": "a"}], None, 4)


def test_streamed_records_are_the_same_in_order():
    from datasets import Dataset as Arrow

    data, replay = records(9, N, seed=3), [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]
    longest = max(len(r["complete_training_sequence_ids"]) for r in data)
    whole = TrainingRecords(data, longest - 1, "truncate", replay, 0.5)
    arrow = TrainingRecords(Arrow.from_list(data), longest - 1, "truncate", replay, 0.5)
    assert [arrow[i] for i in range(len(arrow))] == [whole[i] for i in range(len(whole))]
    streamed = list(StreamedRecords(Arrow.from_list(data).to_iterable_dataset(), longest - 1, "truncate", replay, 0.5))
    sequences = [r["complete_training_sequence_ids"] for r in streamed if "complete_training_sequence_ids" in r]
    assert sequences == [whole[i]["complete_training_sequence_ids"] for i in range(9)]
    assert [r["input_ids"] for r in streamed if "input_ids" in r] == [whole[i]["input_ids"] for i in range(9, 13)]
    assert [r["index"] for r in streamed] == list(range(13))


def test_workers_share_a_stream():
    """The second worker has nothing of a stream of one part. Rows of two workers have different numbers."""
    from datasets import Dataset as Arrow
    from torch.utils.data import DataLoader

    data, replay = records(8, N, seed=3), [{"input_ids": [1, number]} for number in range(4)]
    for parts in (1, 2):
        stream = StreamedRecords(
            Arrow.from_list(data).to_iterable_dataset(num_shards=parts), 128, "drop", replay, 0.25
        )
        rows = list(DataLoader(stream, batch_size=None, num_workers=2, collate_fn=lambda row: row))
        assert sorted(str(row["complete_training_sequence_ids"]) for row in rows if "prompt_ids" in row) == sorted(
            str(record["complete_training_sequence_ids"]) for record in data
        )
        assert len({tuple(row["input_ids"]) for row in rows if "input_ids" in row}) == 2
        assert len({row["index"] for row in rows}) == 10


def test_a_stream_without_a_record_that_fits_is_refused():
    from datasets import Dataset as Arrow

    with pytest.raises(ValueError, match="all 3 of the stream are longer than max_length=4"):
        list(StreamedRecords(Arrow.from_list(records(3, N)).to_iterable_dataset(), 4))


def test_replay_ids_outside_the_vocabulary_are_named():
    with pytest.raises(ValueError, match="row 1 of replay_dataset has ids outside the model's vocabulary of 23"):
        tokenized_replay([{"input_ids": [1, 2]}, {"input_ids": [1, 23]}], None, 8, 23)
