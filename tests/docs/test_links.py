"""Relative links and anchors lead somewhere."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, code_spans, links


def broken(page):
    for link in links(page):
        path, _, anchor = unquote(link).partition("#")
        if re.match(r"(https?|mailto):", path):
            continue
        target = os.path.relpath((ROOT / page).parent / path, ROOT) if path else page
        if target in ("docs/contributing.md", "docs/changelog.md"):  # of the site, see docs/hooks.py
            target = os.path.basename(target).upper().replace(".MD", ".md")  # noqa: PTH119
        if target.startswith("..") or not (ROOT / target).exists():
            yield f"{link}: there is no {target}"
        elif (
            anchor and target.endswith(".md") and not anchor.startswith("jacobi_hf.") and anchor not in anchors(target)
        ):
            yield f"{link}: {target} has no heading {anchor!r}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert not list(broken(page))


FILE = re.compile(r"(jacobi_hf|trainer|hub_cards|tests|examples|docs|\.github)/[\w./-]+\.\w+")
OF_THE_PAST = ("CHANGELOG.md", "docs/results/", "examples/tiny_qwen3/cards/")


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(OF_THE_PAST)])
def test_files_that_a_page_names_exist(page):
    named = [span for span in code_spans(page) if FILE.fullmatch(span)]
    assert not [path for path in named if not (ROOT / path).exists()]


def test_broken_links_are_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`\n\n[x](nowhere.md) [y](#a-b) [z](#c) ![w](w.png) [v](https://example.org/v)\n", encoding="utf-8"
    )
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    monkeypatch.setitem(broken.__globals__, "ROOT", tmp_path)
    assert [found.split(":")[0] for found in broken("page.md")] == ["nowhere.md", "#c", "w.png"]
