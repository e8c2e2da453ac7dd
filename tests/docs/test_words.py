"""One word for one thing: words that the glossary replaces do not occur."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT

SUFFIXES = {".py", ".md", ".yaml", ".yml", ".jinja", ".sh", ".ipynb"}
# Old word, as a pattern, and what to say instead. CHANGELOG.md may use old words.
REPLACED = {
    r"\bgated|DraftedModel|lossless forcing": "drafter",
    r"\barenas?\b": "buffers",
    r"\bverdicts?\b": "acceptance",
    r"\bfrontier": "stopping rules or token replay",
    r"\bwish(es|ed)?\b": "guess, proposal or request",
    r"\b(com(e|es|ing)|came) true\b": "are accepted, or raise the acceptance rate",
    r"(?<![-\w])confirm(s|ed)\b": "accept, accepted",
    r"\bcontradiction": "refusal reason",
    r"\bunserved": "fallback reason",
    r"\bborrow(s|ed)?\b": "acquire",
    r"what came of": "outcome",
    r"superfluous": "not needed",
    r"noisy (stream|row)": "draft stream, draft slots",
    r"\bredraft": "propose",
    r"\bcaptured? (step|graph)": "CUDA graph",
    r"\bas (it|they) stands?\b": "unchanged",
}
# Pages that show commands as they were run, and files that say what old names are called now.
RECORDED = ("docs/results/", "examples/tiny_qwen3/cards/")
CONVERTS = ("jacobi_hf/results/training.py", "trainer/method_options.py", "trainer/options.py")


def texts():
    """Yield path and text of every file that is checked."""
    places = ("jacobi_hf", "trainer", "hub_cards", "docs", "examples")
    paths = [path for place in places for path in (ROOT / place).rglob("*") if path.suffix in SUFFIXES]
    for path in [*paths, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith((*RECORDED, *CONVERTS)):
            yield name, path.read_text(encoding="utf-8")


def found(pattern, text):
    """Return the lines of a text that match a pattern, with their numbers."""
    return [
        f"{number}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line, re.IGNORECASE)
    ]


@pytest.mark.parametrize("pattern", REPLACED)
def test_replaced_words_do_not_occur(pattern):
    lines = [f"{name}:{line}" for name, text in texts() for line in found(pattern, text)]
    assert not lines, f"say {REPLACED[pattern]}"


def test_an_old_word_is_found():
    assert found(r"\bwish(es|ed)?\b", "a\nmany Wishes\nwishful") == ["2: many Wishes"]


def test_all_packages_are_read():
    names = {name for name, _ in texts()}
    assert {"jacobi_hf/config.py", "trainer/base.py", "hub_cards/card.py", "docs/glossary.md", "README.md"} <= names
