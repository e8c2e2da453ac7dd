"""Numbers that a page quotes from the results are still those of the results."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import PAGES, ROOT

MARK = "<!-- numbers: results.md -->"
QUOTED = re.compile(rf"{MARK}\n\n((?:\|.*\n)+)")
NUMBER = re.compile(r"\d+\.\d+")
QUOTING = [page for page in PAGES if MARK in (ROOT / page).read_text(encoding="utf-8")]


def strangers(table, results):
    """Decimal numbers of a table that are in no row of the results."""
    text = re.sub(r"\]\([^)]*\)", "]", table)
    return set(NUMBER.findall(text)) - set(NUMBER.findall(results))


@pytest.mark.parametrize("page", QUOTING)
def test_quoted_numbers_are_in_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    tables = QUOTED.findall(text)
    assert len(tables) == text.count(MARK)
    assert not set().union(*(strangers(table, (ROOT / "docs/results.md").read_text(encoding="utf-8")) for table in tables))


def test_some_pages_quote_and_a_stranger_is_found():
    assert QUOTING
    assert strangers("| 1.25 | [2.5](x-3.5.yaml) |", "1.2 and 2.5") == {"1.25"}
