"""Facts in the text of the pages are those of the code: numbers, defaults, recipes, verbs, classes, files."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import typer

from jacobi_hf.cli import app
from jacobi_hf.config import JacobiConfig
from tests.docs.pages import PAGES, ROOT, code_spans, links

MARK = "<!-- numbers: "
QUOTED = re.compile(r"<!-- numbers: (.*?) -->\n\n((?:\|.*\n)+)")
NUMBER = re.compile(r"\d+\.\d+")
QUOTING = [page for page in PAGES if MARK in (ROOT / page).read_text(encoding="utf-8")]


def strangers(table, results):
    """Return the decimal numbers of a table that are in no row of the results."""
    text = re.sub(r"\]\([^)]*\)", "]", table)
    return set(NUMBER.findall(text)) - set(NUMBER.findall(results))


@pytest.mark.parametrize("page", QUOTING)
def test_quoted_numbers_are_in_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    quoted = QUOTED.findall(text)
    assert len(quoted) == text.count(MARK)
    for names, table in quoted:
        results = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in names.split())
        assert not strangers(table, results)


def test_some_pages_quote_and_a_stranger_is_found():
    assert QUOTING
    assert strangers("| 1.25 | [2.5](x-3.5.yaml) |", "1.2 and 2.5") == {"1.25"}


def test_knobs_have_their_defaults():
    knobs = {knob.name: str(knob.default) for knob in fields(JacobiConfig)} | {"decoding": "None"}
    readme, page = (
        dict(re.findall(r"^\| `(\w+)` \| `?(.*?)`? \|", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
        for name in ("README.md", "docs/knobs.md")
    )
    assert page == knobs
    assert readme.items() <= knobs.items()


def test_every_recipe_is_listed():
    assert {path.name for path in (ROOT / "examples/recipes").glob("*.yaml")} <= {
        link.split("/")[-1] for link in links("docs/recipes.md")
    }


def test_every_verb_is_listed():
    assert set(typer.main.get_command(app).commands) <= set(code_spans("docs/cli.md"))


def test_the_tree_is_that_of_the_repository():
    named = {part for span in code_spans("CONTRIBUTING.md") for part in span.split("/")}
    packages = {path.parent.name for path in (ROOT / "jacobi_hf").glob("*/__init__.py")}
    assert packages
    assert packages <= named
    paths = [span for span in code_spans("CONTRIBUTING.md") if span.startswith(("jacobi_hf/", "tests/", "decoding/"))]
    assert all((ROOT / path).exists() or (ROOT / "jacobi_hf" / path).exists() for path in paths)


def test_the_glossary_names_classes_that_exist():
    names = {span for span in code_spans("docs/glossary.md") if re.fullmatch(r"([A-Z][a-z]+){2,}", span)}
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "jacobi_hf").rglob("*.py"))
    assert len(names) > 5
    assert not [name for name in names if f"class {name}" not in code]
