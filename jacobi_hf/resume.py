"""Interrupted work: a file with its settings and finished parts, so that the same command continues the work.

`collect` and `pack` (parts: shards), `train` (checkpoints), `bench` (measurements) and `eval` (outputs) all keep such
a file.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacobi_hf.io import parse_json_object, read_lines, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping

LONGEST_VALUE = 80  # characters of a setting in an error


class ResumeError(ValueError):
    """A file of unfinished work that belongs to other settings, is damaged, or that `Progress` did not write."""


class Progress:
    """Settings and finished parts of some work, in a file that outlives an interruption.

    A `.json` file is replaced as a whole when a part is added. A `.jsonl` file gets a further line, which suits work
    with thousands of parts. A part is in the file completely or not at all. The file is written by `begin`, or with
    the first part.

    Args:
        file: the file; its folder is created when the file is written.
        settings: everything that determines the parts, as plain JSON values.
        place: name of the work in errors, which a user deletes to start again; by default the file.
        option: name of the option that chooses the place, for errors.
        parts_key: key of the parts in a `.json` file.
        renamed: new names of settings that a file of an earlier version has under their former names.
        lock: held while the file is read and replaced, if several processes add parts to one `.json` file.
        facts: further keys of a `.json` file, written when the work begins.

    Raises:
        ResumeError: the file was begun under other settings, named one by one; or it is damaged.
    """

    def __init__(
        self,
        file: str | Path,
        settings: Mapping[str, Any],
        *,
        place: str | Path | None = None,
        option: str = "output",
        parts_key: str = "parts",
        renamed: Mapping[str, str] | None = None,
        lock: AbstractContextManager[Any] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.file = Path(file)
        self._grows = self.file.suffix == ".jsonl"
        self._parts_key = parts_key
        self._renamed = renamed
        self._lock = lock or nullcontext()
        self._place = place or self.file
        self._option = option
        self._new = {"settings": json.loads(json.dumps(dict(settings))), **(facts or {}), parts_key: {}}
        self._content = self._new
        self.reload()

    @property
    def parts(self) -> dict[str, Any]:
        """What each finished part gave, by the part's name, as this process knows it."""
        parts: dict[str, Any] = self._content[self._parts_key]
        return parts

    def begin(self) -> None:
        """Write the settings, if the file is not there yet."""
        with self._lock:
            self._load()
            if not self.file.is_file():
                self._replace()

    def reload(self) -> None:
        """Read the parts that other processes have added."""
        with self._lock:
            self._load()

    def add(self, name: str, value: Any) -> None:
        """Add a finished part.

        Args:
            name: name of the part. A part of the same name is replaced.
            value: what the part gave, as plain JSON values.
        """
        if self._grows:
            if not self.file.is_file():
                self._replace()
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps({'part': name, 'value': value})}\n")
            self.parts[name] = value
            return
        with self._lock:
            self._load()
            self._content[self._parts_key] = dict(sorted({**self.parts, name: value}.items()))
            self._replace()

    def note(self, **facts: Any) -> None:
        """Change further keys of a `.json` file."""
        with self._lock:
            self._load()
            self._content.update(facts)
            self._replace()

    def remove(self) -> None:
        """Delete the file, when the work is finished and its results are elsewhere."""
        self.file.unlink(missing_ok=True)

    def _load(self) -> None:
        """Take over the content of the file, if there is one."""
        if not self.file.is_file():
            return
        content = self._read_lines() if self._grows else read_progress(self.file, self._parts_key, self._renamed)
        if differing := differences(content["settings"], self._new["settings"]):
            raise ResumeError(
                f"{self._place} was begun under other settings ({'; '.join(differing)}). "
                f"Use those settings again, choose another {self._option}, or delete it."
            )
        self._content = content

    def _read_lines(self) -> dict[str, Any]:
        """Return the content of a `.jsonl` file; a last line that an interruption cut off is removed from the file."""
        text = _text(self.file)
        whole = text[: text.rfind("\n") + 1]
        if whole != text or not whole:
            _write(self.file, whole or self._first_line())
        first, *rows = [_object(line, place) for place, line in read_lines(self.file)]
        if "settings" not in first or not all({"part", "value"} <= row.keys() for row in rows):
            raise ResumeError(_foreign(self.file))
        return {"settings": first["settings"], self._parts_key: {row["part"]: row["value"] for row in rows}}

    def _replace(self) -> None:
        """Write the file anew: the whole content, or the first line of a `.jsonl` file."""
        _write(self.file, self._first_line() if self._grows else f"{json.dumps(self._content, indent=1)}\n")

    def _first_line(self) -> str:
        """Return the first line of a `.jsonl` file."""
        return f"{json.dumps({'settings': self._new['settings']})}\n"


def read_progress(file: Path, parts_key: str = "parts", renamed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the content of a `.json` file that `Progress` wrote.

    Args:
        file: the file.
        parts_key: key of the parts in it.
        renamed: new names of settings, as in `Progress`.

    Raises:
        ResumeError: the file cannot be read, is damaged, or is no such file.
    """
    content = _object(_text(file), str(file))
    if not all(isinstance(content.get(key), dict) for key in ("settings", parts_key)):
        raise ResumeError(_foreign(file))
    content["settings"] = {(renamed or {}).get(name, name): value for name, value in content["settings"].items()}
    return content


def differences(former: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a phrase for each setting that differs, such as `batch_size: 4, now 8` or `data.split: 'a', now 'b'`.

    Args:
        former: settings under which some work was begun.
        current: settings now.
        prefix: what the names of the settings begin with.
    """
    found = []
    for name in sorted({*former, *current}):
        old = former.get(name)
        new = current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {_shown(old)}, now {_shown(new)}")
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}.."


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except ValueError as error:
        raise ResumeError(str(error)) from None


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        return parse_json_object(text, where)
    except ValueError as error:
        raise ResumeError(f"{error} The file is damaged: delete it, and run the command again.") from None


def _foreign(file: Path) -> str:
    return f"{file} is no record of unfinished work that this version can continue. Delete it to start again."


def _write(file: Path, text: str) -> None:
    """Write a file so that it has either its former content or the whole new one, whenever the process ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
