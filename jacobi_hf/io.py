"""Readers of prompts, text, JSON, JSONL and YAML from outside. All raise `ValueError` with file, line and fault."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import TemplateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

STDIN = "-"


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file, or of standard input if `path` is "-".

    Raises:
        ValueError: The file cannot be opened, or is not UTF-8.
    """
    try:
        return sys.stdin.read() if path == STDIN else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        name = "the standard input" if path == STDIN else path
        raise ValueError(
            f"{name} is not UTF-8 text: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from None


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The JSON text.
        where: Name of the text in errors: a file, a line of a file, or an option.

    Raises:
        ValueError: The text is not JSON. The error names line and column.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise ValueError(f"{where}{line} is not JSON: {error.msg} at column {error.colno}.") from None


def parse_json_object(text: str, where: str) -> dict[str, Any]:
    """Return the object of a JSON text, as `parse_json` does.

    Raises:
        ValueError: The text is not JSON, or not a JSON object.
    """
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object but {text.strip()[:40]!r}.")  # noqa: TRY004
    return value


def read_json(path: str | Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        ValueError: The file cannot be read, or is not JSON.
    """
    return parse_json(read_text(path), str(path))


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        ValueError: The file cannot be read, or is not a JSON object.
    """
    return parse_json_object(read_text(path), str(path))


def read_lines(path: str | Path) -> list[tuple[str, str]]:
    """Return (place, line) for each line of a text file that is not blank. A place reads "FILE, line NUMBER".

    Raises:
        ValueError: The file cannot be read.
    """
    # str.splitlines also splits at U+2028, which JSON allows inside a string.
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(f"{path}, line {number}", line) for number, line in lines if line.strip()]


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, one for each line that is not blank.

    Raises:
        ValueError: The file cannot be read, a line is not a JSON object, or there is no line.
    """
    rows = [parse_json_object(line, place) for place, line in read_lines(path)]
    if not rows:
        raise ValueError(f"{path} is empty. It must have a JSON object in each line.")
    return rows


def read_yaml(path: str | Path) -> Any:
    """Return the value of a YAML file.

    Raises:
        ValueError: The file cannot be read, or is not YAML. The error names line and column.
    """
    try:
        return yaml.safe_load(read_text(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{place} is not YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None


def read_prompts(path: str | Path) -> list[Any]:
    """Return the prompts of a file. Each is a string or a list of messages.

    A `.jsonl` file has a prompt in each line. A `.json` file is a list of prompts. Both hold strings, lists of
    messages, or objects with `prompt` or `messages`. Any other file is text with a prompt in each line. The first line
    of a `.jsonl` file is skipped if it is an object with neither `prompt` nor `messages`. Task files of `jacobi-hf
    eval` may have such a line.

    Raises:
        ValueError: The file cannot be read, holds something else, or holds no prompts.
    """
    suffix = Path(path).suffix
    rows = _rows_of_json(path) if suffix == ".json" else read_lines(path)
    if suffix == ".jsonl":
        rows = [(place, parse_json(line, place)) for place, line in rows]
        if rows and _is_options(rows[0][1]):
            rows = rows[1:]
    if not rows:
        raise ValueError(f"{path} holds no prompts.")
    return [_prompt_of(row, place) for place, row in rows]


def _rows_of_json(path: str | Path) -> list[tuple[str, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} does not hold a list of prompts.")  # noqa: TRY004
    return [(f"{path}, prompt {number}", row) for number, row in enumerate(rows, 1)]


def _is_options(row: Any) -> bool:
    return isinstance(row, dict) and "prompt" not in row and "messages" not in row


def _prompt_of(row: Any, place: str) -> Any:
    prompt = row.get("messages", row.get("prompt")) if isinstance(row, dict) else row
    if _is_text(prompt) or _is_messages(prompt):
        return prompt
    wanted = "a text, a list of messages, or an object with prompt or messages"
    raise ValueError(f"{place} is not a prompt. It must be {wanted}; it is {json.dumps(row)[:60]}.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_messages(value: Any) -> bool:
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns)


def read_prompts_by_domain(path: str | Path) -> dict[str, list[Any]]:
    """Return the prompts of each domain. The file is JSON: `{"prompts": {"code": ["def f():"]}}`.

    A prompt is a string or a list of messages.

    Raises:
        ValueError: The file cannot be read, or holds something else.
    """
    value = read_json(path)
    prompts = value.get("prompts") if isinstance(value, dict) else None
    if not isinstance(prompts, dict) or not all(isinstance(texts, list) and texts for texts in prompts.values()):
        raise ValueError(f'{path} must hold prompts by domain, as in {{"prompts": {{"code": ["def f():"]}}}}.')
    return prompts


def encode_prompts(prompts: Sequence[Any], tokenizer: Any, model: str, *, chat: bool) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
        prompts: Strings or lists of messages.
        tokenizer: Tokenizer of the model.
        model: Name of the model, for errors.
        chat: Whether strings go through the chat template too, as the turn of a user. Messages always do.

    Raises:
        ValueError: The chat template is missing or refuses a prompt, or a prompt has no tokens.
    """
    if tokenizer.chat_template is None and (chat or not all(isinstance(prompt, str) for prompt in prompts)):
        raise ValueError(f"{model} has no chat template, which messages and --chat need.")
    encoded = [_encode(prompt, tokenizer, f"prompt {at}", chat=chat) for at, prompt in enumerate(prompts, 1)]
    if not all(encoded):
        prompt = str(prompts[encoded.index([])])[:40]
        raise ValueError(f"the tokenizer of {model} returns no tokens for {prompt!r}. Check the tokenizer's files.")
    return encoded


def _encode(prompt: Any, tokenizer: Any, where: str, *, chat: bool) -> list[int]:
    if not isinstance(prompt, str):
        return encode_messages(prompt, tokenizer, where)
    if chat:
        return encode_messages([{"role": "user", "content": prompt}], tokenizer, where)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    return ids


def encode_messages(
    messages: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    where: str,
    *,
    system_prompt: str | None = None,
    **template_options: Any,
) -> list[int]:
    """Return the token ids of a conversation and of the opening of the next answer, through the chat template.

    A last turn of the assistant is left out.

    Args:
        messages: Turns with `role` and `content`.
        tokenizer: Tokenizer with a chat template.
        where: Name of the conversation in errors.
        system_prompt: Text of a system turn, for conversations that do not begin with one.
        template_options: Further arguments of `apply_chat_template`.

    Raises:
        ValueError: There is no turn to answer, or the template refuses the turns.
    """
    turns = [dict(turn) for turn in messages]
    if turns and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    if not turns:
        raise ValueError(f"{where} has no turn to answer.")
    if system_prompt is not None and turns[0].get("role") != "system":
        turns = [{"role": "system", "content": system_prompt}, *turns]
    options = {"add_generation_prompt": True, "return_dict": False, **template_options}
    try:
        ids: list[int] = tokenizer.apply_chat_template(turns, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses {where}: {error}.") from None
    return ids
