"""Prompts of a user's: files of them, and their ids."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from pathlib import Path


def read_prompt_file(path: Path) -> list[Any]:
    r"""Prompts, each a string or a list of messages.

    A `.jsonl` file has one a line and a `.json` file a list of them: strings, or objects with `prompt` or `messages` (a first line of
    `jacobi-hf eval`'s task files, which has neither, is passed over). Any other file is text with a prompt a line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or nothing; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if path.suffix == ".json":
        rows = _parsed(text, str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path} does not hold a list of prompts.")
        places = [f"{path}, prompt {number}" for number in range(1, len(rows) + 1)]
    else:
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        places = [place for place, _ in lines]
        rows = [_parsed(line, place) if path.suffix == ".jsonl" else line for place, line in lines]
        if (
            path.suffix == ".jsonl"
            and rows
            and isinstance(rows[0], dict)
            and not {"prompt", "messages"} & set(rows[0])
        ):
            places, rows = places[1:], rows[1:]
    prompts = [_prompt(row, place) for row, place in zip(rows, places, strict=True)]
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    return prompts


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg} at column {error.colno}.") from None


def _prompt(row: Any, place: str) -> Any:
    found = row.get("messages", row.get("prompt")) if isinstance(row, dict) else row
    if isinstance(found, str) and found.strip():
        return found
    if (
        isinstance(found, list)
        and found
        and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in found)
    ):
        return found
    raise ValueError(
        f"{place} is no prompt: it has to be a text, or an object with a prompt or messages, and is {json.dumps(row)[:60]}."
    )


def encode_prompts(prompts: list[Any], tokenizer: Any, model: str, *, chat: bool) -> list[list[int]]:
    """Ids of each prompt; messages go through the chat template, without a last turn of the assistant, and with `chat` texts do too.

    Raises:
        ValueError: there is no chat template, or it refuses the messages.
    """
    encoded = [_encode(prompt, tokenizer, model, chat=chat) for prompt in prompts]
    if not all(encoded):
        raise ValueError(
            f"the tokenizer of {model} makes no tokens of {str(prompts[encoded.index([])])[:40]!r}: are its files all there?"
        )
    return encoded


def _encode(prompt: Any, tokenizer: Any, model: str, *, chat: bool) -> list[int]:
    if isinstance(prompt, str) and not chat:
        plain: list[int] = tokenizer(prompt)["input_ids"]
        return plain
    if tokenizer.chat_template is None:
        raise ValueError(f"{model} has no chat template, which messages and --chat need.")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    try:
        ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        raise ValueError(f"the chat template of {model} refuses the messages: {error}") from None
    return ids
