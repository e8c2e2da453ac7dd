"""Code that a page quotes is the code of the repository."""

from __future__ import annotations

import pytest

from tests.docs.pages import PAGES, ROOT
from tests.docs.quotes import QUOTE, renewed

QUOTING = [page for page in PAGES if QUOTE.search((ROOT / page).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", QUOTING)
def test_quotes_are_current(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert renewed(text) == text, "run python -m tests.docs.quotes"
    assert len(QUOTE.findall(text)) == text.count("\n<!-- from ")


def test_a_stale_quote_is_renewed():
    page = "a\n<!-- from tests/docs/quotes.py: quoted, QUOTE -->\n\n```python\nold\n```\nb\n"
    new = renewed(page)
    assert new.startswith("a\n<!-- from tests/docs/quotes.py: quoted")
    assert "def quoted(path" in new
    assert "def renewed" not in new
    assert "old" not in new
    assert new.endswith("```\nb\n")
    assert renewed(new) == new
