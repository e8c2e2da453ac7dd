"""Escaping of strings from configs, results and datasets for a card.

An escaped string is shown as it is and has no effect in Markdown, HTML or YAML.
"""

from __future__ import annotations

import re
import unicodedata

EMPTY = "(empty)"
_HARMFUL = re.compile(r"(?<![^\W_])_|_(?![^\W_])|[^\w ,.;'/()+=%?-]|^[-+=]|(?<=www)\.", re.ASCII | re.IGNORECASE)
_IN_CODE = re.compile(r"[\w ,.:;=@%+/'\"()\[\]*^~#?!-]+")
_START_OF_A_LIST = re.compile(r"^(\d+)([.)])(?= |$)")


def line(value: object) -> str:
    """Return a value as one line. Line breaks, control characters and invisible characters become single spaces."""
    shown = (" " if unicodedata.category(character)[0] in "CZ" else character for character in str(value))
    return " ".join("".join(shown).split())


def text(value: object) -> str:
    """Return a line of Markdown that shows the value. Character references replace everything that could be markup."""
    escaped = _HARMFUL.sub(lambda found: "".join(map(_reference, found.group())), line(value) or EMPTY)
    return _START_OF_A_LIST.sub(lambda found: found.group(1) + _reference(found.group(2)), escaped)


def code(value: object) -> str:
    """Return a code span, which also works in a table; ordinary text if a code span cannot hold the value safely."""
    shown = line(value)
    return f"`{shown}`" if _IN_CODE.fullmatch(shown) else text(shown)


def path(value: object) -> str:
    """Return a name or path as a code span. Of an absolute path only the last part is shown: the rest is private."""
    shown = line(value)
    if re.match(r"[/~\\]|[A-Za-z]:", shown):
        shown = shown.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return code(shown)


def _reference(character: str) -> str:
    return f"&#{ord(character)};" if ord(character) < 128 else character
