"""Replay: ordinary text that is mixed into the training set, so that the model keeps what it could do before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenized_replay(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, max_length: int, vocab_size: int | None = None
) -> list[dict[str, list[int]]]:
    """Return replay rows as `input_ids`. Longer texts become several rows.

    Args:
        dataset: rows with `input_ids`, `text` or `messages`.
        tokenizer: tokenizer of text and messages; not needed for `input_ids`.
        max_length: most tokens of a row.
        vocab_size: size of the vocabulary that given `input_ids` must be in; None accepts any id.

    Raises:
        ValueError: a row has none of these columns or ids outside the vocabulary, or there is text without a
            tokenizer.
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
                f"row {number} of replay_dataset has none of the columns input_ids, text, messages; "
                f"it has {', '.join(row)}."
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
