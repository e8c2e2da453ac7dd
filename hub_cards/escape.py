"""Strings from configs, results and datasets as text of a card: shown as they are, and without effect in Markdown, HTML or YAML."""

from __future__ import annotations

import re
import unicodedata

EMPTY = "(empty)"
_HARMFUL = re.compile(r"(?<![^\W_])_|_(?![^\W_])|[^\w ,.;'/()+=%?-]|^[-+=]|(?<=www)\.", re.ASCII | re.IGNORECASE)
_IN_CODE = re.compile(r"[\w ,.:;=@%+/'\"()\[\]*^~#?!-]+")
_START_OF_A_LIST = re.compile(r"^(\d+)([.)])(?= |$)")


def line(value: object) -> str:
    """One line: line breaks, control characters, invisible and unpaired ones become single spaces."""
    shown = (" " if unicodedata.category(character)[0] in "CZ" else character for character in str(value))
    return " ".join("".join(shown).split())


def text(value: object) -> str:
    """A line of Markdown that shows the value and does nothing: character references stand for all that could be markup."""
    escaped = _HARMFUL.sub(lambda found: "".join(map(_reference, found.group())), line(value) or EMPTY)
    return _START_OF_A_LIST.sub(lambda found: found.group(1) + _reference(found.group(2)), escaped)


def code(value: object) -> str:
    """A code span, also within a table; ordinary text where the value holds characters that a span cannot hold safely."""
    shown = line(value)
    return f"`{shown}`" if _IN_CODE.fullmatch(shown) else text(shown)


def path(value: object) -> str:
    """A name or path as a code span; of a path from the root, which says more of a machine than of a model, the last part."""
    shown = line(value)
    return code(
        shown.replace("\\", "/").rstrip("/").rpartition("/")[2] if re.match(r"[/~\\]|[A-Za-z]:", shown) else shown
    )


def _reference(character: str) -> str:
    return f"&#{ord(character)};" if ord(character) < 128 else character
