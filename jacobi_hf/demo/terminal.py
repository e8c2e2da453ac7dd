"""Panels of a terminal, in which texts appear token by token in the colours of their forwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers.generation import BaseStreamer

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

COLOURS = ("bright_cyan", "bright_yellow", "bright_green", "bright_magenta", "bright_blue", "bright_red")
LEAST_WIDTH = 50  # columns of a panel that stands next to others


class Painter(BaseStreamer):
    """Streamer that paints each token in the colour of its forward.

    Args:
        model: the model that writes; its forwards are counted until the text ends.
        tokenizer: the model's tokenizer.
        title: title of the panel.
        prompt: text that the panel starts with.

    Attributes:
        on_token: called after each token.
    """

    def __init__(self, model: Any, tokenizer: Any, title: str, prompt: str) -> None:
        self._tokenizer = tokenizer
        self._title = title
        self._text = Text(prompt, style="dim")
        self._written = ""
        self._tokens: list[int] = []
        self._forwards = 0
        self._is_prompt = True
        self._hook = model.register_forward_pre_hook(self._count)
        self.on_token: Callable[[], None] = lambda: None

    def _count(self, *_: Any) -> None:
        self._forwards += 1

    def put(self, value: torch.Tensor) -> None:
        """Paint a token; the first value is the prompt, which is painted already."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += value.tolist()
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not whole.endswith("\ufffd"):  # the bytes of the last character are not complete yet
            self._text.append(whole[len(self._written) :], style=COLOURS[self._forwards % len(COLOURS)])
            self._written = whole
        self.on_token()

    def end(self) -> None:
        """Stop counting forwards."""
        self._hook.remove()

    def panel(self) -> Panel:
        """Return the text so far, with its counts."""
        footer = f"{len(self._tokens)} tokens, {self._forwards} forwards"
        return Panel(self._text, title=self._title, subtitle=footer, title_align="left", subtitle_align="left")


def side_by_side(panels: list[Panel], columns: int, width: int) -> RenderableType:
    """Return panels in columns, or below each other in a narrow terminal.

    Args:
        panels: the panels that exist so far.
        columns: number of panels in the end.
        width: columns of the terminal.
    """
    if width < LEAST_WIDTH * columns:
        return Group(*panels)
    grid = Table.grid(expand=True)
    for _ in range(columns):
        grid.add_column(ratio=1)
    grid.add_row(*panels, *[""] * (columns - len(panels)))
    return grid
