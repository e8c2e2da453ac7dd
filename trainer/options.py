"""Fields of the argument dataclasses."""

from dataclasses import field
from typing import Any


def option(default: Any, text: str) -> Any:
    """A field with the help that a command line shows."""
    return field(default=default, metadata={"help": text})
