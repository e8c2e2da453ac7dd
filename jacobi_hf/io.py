"""Readers of text, JSON, JSONL and YAML from outside. All raise `ValueError` with file, line and fault."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

STDIN = "-"


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file, or of standard input if `path` is "-".

    Raises:
        ValueError: The file cannot be opened, or is not UTF-8.
    """
    try:
        return sys.stdin.read() if path == STDIN else Path(path).read_text(encoding="utf-8-sig")
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
