"""Prompts from files and data sets: one reader for the commands and the trainers.

A row is a text, a list of messages, or an object with one of the columns in `COLUMNS`. So the files of GSM8K,
HumanEval, MBPP, Spec-Bench and MT-bench can be read as they are published, and data sets for TRL too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from jacobi_hf.io import parse_json, read_json, read_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Columns that hold a prompt; of several, the first one that a row has counts.
COLUMNS = ("messages", "prompt", "question", "turns", "instruction", "text")
# Texts of these columns are what a user asks, not the beginning of a text.
_ASKED = ("question", "turns", "instruction")
# Published tests of a program: the text beside them asks for the program.
_TESTS = "test_list"
# Fields of a first line that holds options of a task file, see jacobi_hf/evaluation/tasks.py.
_OPTIONS = {"answer_pattern", "max_new_tokens", "stop", "source"}
_SUFFIXES = {".jsonl", ".json", ".parquet", ".txt", ".md"}
FROM_HUB = 1000  # rows of a data set of the Hub that are read


class Question(str):
    """A prompt that is the turn of a user. It goes through the chat template of a model that has one."""

    __slots__ = ()


def prompt_of(row: Any, where: str, column: str | None = None) -> str | list[dict[str, Any]]:
    """Return the prompt of a row: a text, a `Question`, or a list of messages.

    Args:
        row: a text, a list of messages, or an object with a column of `COLUMNS`.
        where: name of the row in errors.
        column: the column to read, if it is another one.

    Raises:
        ValueError: the row holds no prompt.
    """
    name = column_of(row, where, column)
    prompt = row if name is None else row[name]
    if name == "turns" and isinstance(prompt, list) and prompt:
        prompt = prompt[0]
    if name == "instruction" and isinstance(prompt, str) and row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    if isinstance(prompt, str) and prompt.strip():
        is_asked = name in _ASKED or (isinstance(row, Mapping) and _TESTS in row)
        return Question(prompt) if is_asked else prompt
    if _is_messages(prompt):
        return [dict(turn) for turn in prompt]
    what = where if name is None else f"the column {name} of {where}"
    raise ValueError(
        f"{what} is not a prompt. It must be a text that is not blank, or a list of messages with role and content; "
        f"it is {json.dumps(prompt, default=str)[:60]}."
    )


def column_of(row: Any, where: str, column: str | None = None) -> str | None:
    """Return the column that holds the prompt of a row; None if the row itself is the prompt. See `prompt_of`."""
    if not isinstance(row, Mapping):
        return None
    names = COLUMNS if column is None else (column,)
    found = next((name for name in names if row.get(name) is not None), None)
    if found is None:
        wanted = f"the column {column}" if column else f"any of the columns {', '.join(COLUMNS)}"
        there = [str(name) for name, value in row.items() if value is not None]
        raise ValueError(f"{where} does not have {wanted}; it has {', '.join(there) or 'none'}.")
    return found


def _is_messages(value: Any) -> bool:
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(
        isinstance(turn, Mapping) and "role" in turn and ("content" in turn or "tool_calls" in turn) for turn in turns
    )


def read_prompts(source: str | Path, column: str | None = None) -> list[Any]:
    """Return the prompts of a file, or of a data set of the Hub; see `prompt_of`.

    A `.jsonl` file has a row in each line. A `.json` file is a list of rows, or has prompts by domain. A `.parquet`
    file and a data set of the Hub have rows. Any other file is text with a prompt in each line.

    Args:
        source: path, or name of a data set on the Hub, such as "openai/gsm8k:main". Of its split "train", or else
            "test", the first `FROM_HUB` rows are read.
        column: column of the prompts, if it is none of `COLUMNS`.

    Raises:
        ValueError: the source cannot be read, holds no prompts, or holds something else.
    """
    prompts = [prompt_of(row, place, column) for place, row in _rows(source)]
    if not prompts:
        raise ValueError(f"{source} holds no prompts.")
    return prompts


def _rows(source: str | Path) -> list[tuple[str, Any]]:
    """Return the rows of a source, each with its place for errors."""
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix == ".json":
        value = read_json(path)
        if isinstance(value, dict):
            value = [row for rows in _domains_in(value, source).values() for row in rows]
        if not isinstance(value, list):
            raise ValueError(f"{path} holds neither a list of prompts nor prompts by domain.")
        return [(f"{path}, prompt {number}", row) for number, row in enumerate(value, 1)]
    if suffix in (".csv", ".gz", ".zip"):
        raise ValueError(f"{path} cannot be read: save it as JSONL, JSON or parquet.")
    if suffix == ".jsonl":
        rows = [(place, parse_json(line, place)) for place, line in read_lines(path)]
        return rows[1:] if rows and _is_options(rows[0][1]) else rows
    if suffix == ".parquet" or _is_hub_name(str(source)):
        return [(f"{source}, row {number}", row) for number, row in enumerate(_open(str(source)), 1)]
    return list(read_lines(path))


def _is_options(row: Any) -> bool:
    return isinstance(row, dict) and bool(row) and set(row) <= _OPTIONS


def _is_hub_name(source: str) -> bool:
    """Return whether a source is `owner/name` and no path."""
    path = Path(source)
    is_path = path.exists() or path.is_absolute() or source.startswith(".") or path.suffix in _SUFFIXES
    return not is_path and source.count("/") == 1


def _open(source: str) -> Any:
    try:
        from datasets.exceptions import DatasetNotFoundError

        from jacobi_hf.trainer.data.loading import open_dataset
    except ImportError as error:
        raise ValueError(f"reading {source} needs {error.name}: pip install 'jacobi-hf[train]'") from None
    is_file = Path(source).suffix.lower() == ".parquet"
    for split in ("train", "test"):
        try:
            rows = open_dataset(source, split, streaming=not is_file)
            return rows if is_file else list(rows.take(FROM_HUB))
        except (FileNotFoundError, DatasetNotFoundError, ConnectionError) as error:
            where = "cannot be read" if is_file else "is no file, and no data set of the Hub that can be read"
            raise ValueError(f"{source} {where}: {str(error).splitlines()[0]}") from None
        except ValueError as error:
            if split == "test" or "split" not in str(error):
                raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return []


def read_prompts_by_domain(source: str | Path, column: str | None = None) -> dict[str, list[Any]]:
    """Return the prompts of each domain.

    A JSON file may hold prompts by domain: `{"prompts": {"code": ["def f():"]}}`. Any other source that `read_prompts`
    reads is one domain with the name of the file.

    Raises:
        ValueError: the source cannot be read, holds no prompts, or holds something else.
    """
    value = read_json(source) if Path(source).suffix == ".json" else None
    if not isinstance(value, dict):
        return {Path(source).stem: read_prompts(source, column)}
    return {
        domain: [prompt_of(row, f"{source}, prompt {at} of {domain}", column) for at, row in enumerate(rows, 1)]
        for domain, rows in _domains_in(value, source).items()
    }


def _domains_in(value: dict[str, Any], source: str | Path) -> dict[str, list[Any]]:
    """Return the rows of each domain of a JSON object."""
    prompts = value.get("prompts")
    lists = list(prompts.values()) if isinstance(prompts, dict) else []
    if not lists or not all(isinstance(rows, list) and rows for rows in lists):
        raise ValueError(
            f'{source} must hold a list of prompts, or prompts by domain: {{"prompts": {{"code": ["def f():"]}}}}.'
        )
    domains: dict[str, list[Any]] = value["prompts"]
    return domains


def encode_prompts(prompts: Sequence[Any], tokenizer: Any, model: str, *, chat: bool | None = None) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
        prompts: texts, questions, or lists of messages.
        tokenizer: tokenizer of the model.
        model: name of the model, for errors.
        chat: whether texts go through the chat template, as the turn of a user. None puts questions through it, if the
            model has one. Messages always go through it.

    Raises:
        ValueError: the chat template is missing or refuses a prompt, or a prompt has no tokens.
    """
    if tokenizer.chat_template is None and (chat or not all(isinstance(prompt, str) for prompt in prompts)):
        raise ValueError(f"{model} has no chat template, which messages and --chat need.")
    encoded = [_encode(prompt, tokenizer, f"prompt {at}", chat=chat) for at, prompt in enumerate(prompts, 1)]
    if not all(encoded):
        prompt = str(prompts[encoded.index([])])[:40]
        raise ValueError(f"the tokenizer of {model} returns no tokens for {prompt!r}. Check the tokenizer's files.")
    return encoded


def _encode(prompt: Any, tokenizer: Any, where: str, *, chat: bool | None) -> list[int]:
    if not isinstance(prompt, str):
        return encode_messages(prompt, tokenizer, where)
    if chat if chat is not None else is_turn(prompt, tokenizer):
        return encode_messages([{"role": "user", "content": str(prompt)}], tokenizer, where)
    ids: list[int] = tokenizer(str(prompt))["input_ids"]
    return ids


def is_turn(prompt: Any, tokenizer: Any) -> bool:
    """Return whether a prompt goes through the chat template if nobody says otherwise: questions do, texts do not."""
    return isinstance(prompt, Question) and tokenizer.chat_template is not None


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
