"""Hide jacobi_hf from a program, to show what works where it is not installed."""

from __future__ import annotations

from typing import Any


class Without:
    """A finder of modules that does not find jacobi_hf."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, *arguments: Any) -> Any:
        return None if name.partition(".")[0] == "jacobi_hf" else self._finder.find_spec(name, *arguments)
