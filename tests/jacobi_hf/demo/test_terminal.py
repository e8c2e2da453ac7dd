"""Texts in a terminal appear token by token, each token in the colour of its forward."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from rich.panel import Panel

from jacobi_hf.demo.terminal import LEAST_WIDTH, Painter, side_by_side
from tests.helpers.models import tiny_model


class Letters:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


def shown(renderable, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_a_painter_shows_prompt_text_and_counts():
    model = tiny_model("qwen3")
    painter = Painter(model, Letters(), "title", "prompt ")
    painter.put(torch.tensor([[1, 2]]))  # the prompt, which is painted already
    for letter in b"ab":
        model(torch.tensor([[3]]))
        painter.put(torch.tensor([letter]))
    painter.end()
    model(torch.tensor([[3]]))  # a forward of somebody else
    text = shown(painter.panel())
    assert "title" in text
    assert "prompt ab" in text
    assert "2 tokens, 2 forwards" in text


def test_a_character_is_painted_when_its_bytes_are_complete():
    painter = Painter(tiny_model("qwen3"), Letters(), "", "")
    first, *rest = "\N{EURO SIGN}".encode()
    painter.put(torch.tensor([[1]]))
    painter.put(torch.tensor([first]))
    assert "\N{EURO SIGN}" not in shown(painter.panel())
    painter.put(torch.tensor(rest))
    painter.end()
    assert "\N{EURO SIGN}" in shown(painter.panel())


@pytest.mark.parametrize(("width", "lines"), [(2 * LEAST_WIDTH, 1), (2 * LEAST_WIDTH - 1, 2)])
def test_panels_stand_side_by_side_if_there_is_room(width, lines):
    text = shown(side_by_side([Panel("left"), Panel("right")], 2, width), width)
    assert sum("left" in line or "right" in line for line in text.splitlines()) == lines
