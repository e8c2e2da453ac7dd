"""Texts that a drafter learns from: prompts with the model's own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch

from jacobi_hf.trainer.data.loading import checked
from jacobi_hf.trainer.data.record import PackedRecord


class Answers(torch.utils.data.Dataset[dict[str, Any]]):
    """Prompts with the model's own answers, read from records.

    Args:
        records: checked packed records, whose clean blocks are the answer, or rows with `prompt_ids` and `answer_ids`.
        max_length: most tokens of a text, prompt and answer together; longer answers are cut.
        ends: ids of end tokens. An answer ends with the first one.

    Raises:
        ValueError: no answer of at least two tokens fits in `max_length`.
    """

    def __init__(self, records: Any, max_length: int, ends: Sequence[int]) -> None:
        self._records = records
        self._max_length = max_length
        self._ends = ends
        # An answer of one token leaves nothing to predict.
        self._kept = [index for index in range(len(records)) if len(self._text(records[index])[1]) > 1]
        if not self._kept:
            raise ValueError(
                f"none of {len(records)} records has an answer of at least two tokens within max_length={max_length}: "
                "raise max_length."
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, answer = self._text(self._records[self._kept[index]])
        return {"prompt_ids": prompt, "answer_ids": answer, "index": index}

    def name(self, index: int) -> str:
        """Return the name of a text for errors."""
        return str(self._records[self._kept[index]].get("data_id", f"record {index}"))

    def _text(self, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return the ids of prompt and answer, the answer cut after its first end token and at `max_length`."""
        prompt = np.asarray(record["prompt_ids"]).reshape(-1).tolist()
        is_packed = record.get("answer_ids") is None
        answer = PackedRecord.from_row(record).answer.tolist() if is_packed else list(record["answer_ids"])
        end = next((i for i, token in enumerate(answer) if token in self._ends), len(answer) - 1)
        return prompt, answer[: min(end + 1, max(0, self._max_length - len(prompt)))]


def checked_answers(
    data: Any, name: str, *, ends: Sequence[int], max_length: int, on_bad_row: str, vocab_size: int
) -> Answers:
    """Return the texts of a dataset, with every row checked.

    Args:
        data: packed records, or rows with `prompt_ids` and `answer_ids`.
        name: what errors call the dataset.
        ends: ids of end tokens.
        max_length: most tokens of a text.
        on_bad_row: what happens to a malformed packed record, `"raise"` or `"skip"`.
        vocab_size: ids must be below it.

    Raises:
        TypeError: the dataset is streamed.
        ValueError: it is empty, or a row is malformed.
    """
    if not isinstance(data, Sized):
        raise TypeError(
            f"{name} is streamed; DrafterTrainer takes records with a length (datasets.Dataset or a list)."
        )
    if not len(data):
        raise ValueError(f"{name} is empty.")
    has_answers = "answer_ids" in (getattr(data, "column_names", None) or data[0])  # type: ignore[index]
    if not has_answers:
        return Answers(checked(data, name, on_bad_row=on_bad_row, vocab_size=vocab_size), max_length, ends)
    for index in range(len(data)):
        row = data[index]  # type: ignore[index]
        ids = [*row["prompt_ids"], *row["answer_ids"]]
        if not ids or min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(
                f"row {index} of {name} is empty or has ids outside the model's vocabulary of {vocab_size}."
            )
    return Answers(data, max_length, ends)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch of texts, padded on the right.

    Args:
        rows: what `Answers` gives.

    Returns:
        int tensors: `input_ids` `(B, L)`, prompt and answer; `prompt_length` `(B,)`; `length` `(B,)`, prompt and
        answer together; `index` `(B,)`, in the dataset.
    """
    texts = [[*row["prompt_ids"], *row["answer_ids"]] for row in rows]
    columns = max(map(len, texts))
    return {
        "input_ids": torch.tensor([text + [0] * (columns - len(text)) for text in texts]),
        "prompt_length": torch.tensor([len(row["prompt_ids"]) for row in rows]),
        "length": torch.tensor([len(text) for text in texts]),
        "index": torch.tensor([row["index"] for row in rows]),
    }
