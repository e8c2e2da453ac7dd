"""Options of `jacobi-hf collect`. Neither torch nor transformers is imported here."""

from __future__ import annotations

import json
from dataclasses import dataclass

from jacobi_hf.io import parse_json_object
from jacobi_hf.trainer.data.answer_options import AnswerConfig
from jacobi_hf.trainer.options import option

LONG_PROMPTS = ("drop", "truncate")


@dataclass
class CollectConfig:
    """What to collect, from which prompts, and where to write it.

    Parameters:
        model, revision, dtype: the model.
        dataset, split: the prompts: a JSONL or parquet file or a data set of the Hub, with a column of
            `jacobi_hf.prompts.COLUMNS`.
        column: the column of the prompts, if it is another one.
        output_dir: folder of the shards.
        name: first part of each row's `data_id`.
        block_size: n.
        max_new_tokens: longest answer in tokens, a multiple of n.
        prompt_tokens: how many tokens of a `text` are the prompt.
        max_prompt_tokens, long_prompts: a longer prompt is dropped and counted (`"drop"`), or only its last tokens are
            kept (`"truncate"`).
        system_prompt: system turn for `messages` without one; None leaves it to the tokenizer's template.
        chat_template: file with a chat template to use instead of the tokenizer's.
        chat_template_options: arguments of the template as JSON, for example `{"enable_thinking": false}`.
        limit: how many rows of the data set to read; None reads all.
        random_start: blocks begin after a random number of the answer's tokens, below n, instead of with the first
            token. A model that is trained on one grid of blocks drafts worse where a window crosses the lines of that
            grid.
        batch_size, shard_size: prompts of a batch, prompts of a shard.
        do_sample, temperature, top_k, top_p, min_p, seed: how the model answers, see `AnswerConfig`.

    Raises:
        ValueError: a value is out of range.
    """

    model: str = option("", "Model name or path.")
    dataset: str = option("", "JSONL or parquet file, or dataset of the Hub; see docs/prompts.md.")
    column: str | None = option(None, "Column of the prompts, if it has another name; its texts are no questions.")
    output_dir: str = option("", "Folder of the shards.")
    revision: str | None = option(None, "Revision of the model.")
    dtype: str = option("auto", "dtype of the model: auto, float32, bfloat16.")
    split: str = option("train", "Split of a Hub dataset.")
    name: str = option("data", "First part of each row's data_id.")
    block_size: int = option(16, "Tokens of a block (n).")
    max_new_tokens: int = option(256, "Longest answer, a multiple of block_size.")
    prompt_tokens: int = option(64, "Where text is cut to become a prompt.")
    max_prompt_tokens: int = option(1024, "Longer prompts are dropped or truncated.")
    long_prompts: str = option("drop", "drop or truncate.")
    system_prompt: str | None = option(None, "System prompt for messages that have none.")
    chat_template: str | None = option(None, "File with a chat template.")
    chat_template_options: str | None = option(None, "Arguments of the template, as JSON.")
    limit: int | None = option(None, "Rows of the dataset to take.")
    random_start: bool = option(False, "Blocks begin after a random number of the answer's tokens.")
    batch_size: int = option(32, "Prompts per batch.")
    shard_size: int = option(512, "Prompts per shard.")
    do_sample: bool = option(False, "Sample the answers.")
    temperature: float = option(1.0, "Temperature of the sampling.")
    top_k: int | None = option(None, "Top-k of the sampling.")
    top_p: float | None = option(None, "Top-p of the sampling.")
    min_p: float | None = option(None, "Min-p of the sampling.")
    seed: int = option(0, "Seed of the sampling.")

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size", "prompt_tokens", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size} must be at least 2.")
        if self.max_new_tokens < 1 or self.max_new_tokens % self.block_size:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} must be a multiple of block_size={self.block_size}."
            )
        if self.long_prompts not in LONG_PROMPTS:
            raise ValueError(
                f"long_prompts={self.long_prompts!r} must be one of {', '.join(map(repr, LONG_PROMPTS))}."
            )
        if isinstance(self.chat_template_options, dict):  # as a recipe may have it
            self.chat_template_options = json.dumps(self.chat_template_options)
        if self.chat_template_options:
            parse_json_object(self.chat_template_options, f"chat_template_options={self.chat_template_options!r}")
        self.answers()

    def answers(self) -> AnswerConfig:
        """Return how the model answers."""
        return AnswerConfig(self.max_new_tokens, self.do_sample, self.temperature, self.top_k, self.top_p, self.min_p)
