"""The pages of the documentation, parsed."""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "examples/**/README.md")
    for path in ROOT.glob(pattern)
    if not path.is_symlink()
)
_NOT_RUN = re.compile(r"<!-- not run here: (.*?) -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: number of its first line of code.
        excuse: why it is not run here, from a comment `<!-- not run here: REASON -->` before it.
        prints: what the page says that it
        prints: the block after it, if a comment `<!-- what it prints -->` stands between.
    """

    page: str
    line: int
    language: str
    code: str
    excuse: str | None
    prints: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@functools.cache
def tokens(page: str):
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))


def blocks(page: str, language: str) -> list[Block]:
    found, everything = [], tokens(page)
    comments = [
        "",
        *(token.content if token.type == "html_block" else "" for token in everything),
    ]  # before each token
    for number, token in enumerate(everything):
        is_quote = comments[number].startswith("<!-- from ")  # see quotes.py
        if token.type == "fence" and token.info.strip() == language and not is_quote:
            said = _NOT_RUN.search(comments[number])
            shows = "what it prints" in "".join(comments[number + 2 : number + 3])
            prints = everything[number + 2].content if shows else None
            found.append(Block(page, token.map[0] + 2, language, token.content, said[1] if said else None, prints))
    return found


def links(page: str) -> list[str]:
    """Return the targets of the links and images of a page."""
    inline = [child for token in tokens(page) for child in token.children or []]
    return [str(t.attrs.get("href") or t.attrs.get("src")) for t in inline if t.type in ("link_open", "image")]


def code_spans(page: str) -> list[str]:
    return [child.content for token in tokens(page) for child in token.children or [] if child.type == "code_inline"]


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    everything, found = tokens(page), []
    for opening, inline in itertools.pairwise(everything):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)
