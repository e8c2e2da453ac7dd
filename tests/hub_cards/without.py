"""For programs that show what works where jacobi_hf is not installed."""

from __future__ import annotations

from typing import Any


class Without:
    """A finder that finds no jacobi_hf."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, *arguments: Any) -> Any:
        return None if name.partition(".")[0] == "jacobi_hf" else self._finder.find_spec(name, *arguments)
