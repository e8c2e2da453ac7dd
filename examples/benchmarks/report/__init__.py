"""The pages of docs/results, one module and one template a page; `write_report.py` writes them.

A module's `context` returns what its template shows. Prose is in the templates, figures come from the JSON documents.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import adaptive, bf16, cost, decoding, drafters, forcing, hub, peers, simulation, sources

TEMPLATES = Path(__file__).resolve().parent / "templates"
CONTEXTS: dict[str, Callable[[], dict[str, Any]]] = {
    "index": dict,
    "decoding": decoding.context,
    "adaptive": adaptive.context,
    "simulation": simulation.context,
    "peers": peers.context,
    "forcing": forcing.context,
    "drafters": drafters.context,
    "sources": sources.context,
    "cost": cost.context,
    "hub": hub.context,
    "bf16": bf16.context,
}


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    environment = Environment(  # noqa: S701  (Markdown, not HTML)
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return {f"{name}.md": environment.get_template(f"{name}.md").render(make()) for name, make in CONTEXTS.items()}
