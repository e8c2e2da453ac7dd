"""Prompts and rows from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file.

    Raises:
        ValueError: a line that is no JSON object, named by its number; no line at all.
        FileNotFoundError: there is no such file.
    """
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object but {line[:40]!r}.")  # noqa: TRY004  (of a file)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty.")
    return rows


def read_prompts(path: str | Path) -> dict[str, list[Any]]:
    """Prompts by domain, of a JSON file such as `{"prompts": {"code": ["def f():", ..]}}`; a prompt is a string or a list of messages.

    Raises:
        ValueError: the file holds something else.
        FileNotFoundError: there is no such file.
    """
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg} in line {error.lineno}.") from None
    prompts = found.get("prompts") if isinstance(found, dict) else None
    if not isinstance(prompts, dict) or not all(isinstance(texts, list) and texts for texts in prompts.values()):
        raise ValueError(f'{path} has to hold prompts by domain, as in {{"prompts": {{"code": ["def f():"]}}}}.')
    return prompts


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
