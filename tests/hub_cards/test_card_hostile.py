"""Strings from outside become plain text in a card, whatever they contain."""

from __future__ import annotations

import ast
import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from jacobi_hf.hub_cards import escape, generate_dataset_card, generate_model_card, model_card_cells
from jacobi_hf.hub_cards.cells import FORMATS, resolve
from jacobi_hf.results.schema import Decoder, Measurement, Prompts
from tests.helpers.properties import at_most
from tests.hub_cards.documents import document, outline, words

HOSTILE = [
    "a\n---\nlicense: evil\n---\n",
    "---",
    "--- ",
    "\n---\n",
    "```",
    "````\n# x\n````",
    "`code`",
    "``a`b``",
    "a|b",
    "\\|",
    "a\\",
    "| x | y |\n|---|---|",
    "<script>alert(1)</script>",
    "<!-- ",
    "-->",
    "<img src=x onerror=y>",
    "&lt;b&gt;",
    "&#60;b&#62;",
    "[a](http://evil.example)",
    "![a](b)",
    "[a]: http://evil.example",
    "http://evil.example",
    "www.evil.example",
    "a@evil.example",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "{# note #}",
    "{{ ''.__class__.__mro__ }}",
    "# heading",
    "1. list",
    "1) list",
    "- list",
    "+ list",
    "* list",
    "> quote",
    "===",
    "a\n===",
    "**bold**",
    "__bold__",
    "_a_",
    "~~gone~~",
    "$x$",
    "$$x$$",
    "\\(x\\)",
    "a\tb",
    "    code",
    "\x00\x07\x1b[31m",
    "\u202eevil",
    "\u2028\u2029",
    "\ufeff",
    "\u200b",
    "'",
    '"',
    "'" * 3,
    '"' * 3,
    "key: value",
    "!!python/object/apply:os.system [id]",
    "*alias",
    "&anchor x",
    "%TAG",
    "@x",
    "null",
    "yes",
    "1e3",
    "..",
    "../../etc",
    "",
    " ",
    "\r\n",
    "a\rb",
    "x" * 3000,
    "\u65e5\u672c\u8a9e",
    "\U0001f600",
    "[^1]",
    "<a href='javascript:x'>",
    "</table>",
    "<style>*{}</style>",
    "`|`|`",
    ":smile:",
    "C:\\Users\\x",
    "/home/someone/secret",
    "\\u003cscript\\u003e",
]
FIXED = {"repo_id": "user/model", "license": "mit"}


def dataset_card(text):
    collected = {"model": text, "dataset": text, "name": text, "block_size": 4, "template": text}
    return generate_dataset_card(
        {"settings": collected, "shards": {"a": {"rows": 3}}, "complete": True}, description=f"Of {text}", **FIXED
    )


# By the place that a string comes from: a card with the string, and a harmless string for the same place.
PLACES = {
    "results": (lambda text: generate_model_card(document(text), **FIXED), "plain"),
    "repo_id": (lambda text: generate_model_card([], repo_id=text, license="mit"), "user/plain"),
    "base_model": (lambda text: generate_model_card([], base_model=text, **FIXED), "/plain"),
    "base of a drafter": (lambda text: generate_model_card([], base_model=text, drafter=True, **FIXED), "/plain"),
    "license": (lambda text: generate_model_card([], repo_id="user/model", license=text), "mit"),
    "language": (lambda text: generate_model_card([], language=text, **FIXED), "en"),
    "datasets": (lambda text: generate_model_card([], datasets=[text], **FIXED), "plain"),
    "prompt": (lambda text: generate_model_card([], prompt=text, **FIXED), "plain"),
    "dataset": (dataset_card, "plain"),
}
METADATA = {
    "base_model",
    "base_model_relation",
    "datasets",
    "language",
}  # fields in which a hostile string may end up


def metadata(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL).group(1))


def without_links(lines):
    """Return the lines without links to base models, which only a valid name has."""
    return [line for line in lines if not line.startswith("link_") or "arxiv" in line]


def assert_harmless(card, like):
    """Assert that a card has the structure of one with a harmless string."""
    found = metadata(card)
    expected = metadata(like)
    assert found.keys() - METADATA == expected.keys() - METADATA
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u200b\u202e\u2028\u2029\ufeff]", card)
    assert without_links(outline(card)) == without_links(outline(like))
    assert all(
        re.fullmatch(r"link_(open a https://huggingface\.co/[\w./-]+|close a )", line)
        for line in outline(card)
        if "link_" in line
    )
    for program in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        ast.parse(program)


@pytest.mark.parametrize("place", PLACES)
def test_no_hostile_input_gets_through(place):
    make, plain = PLACES[place]
    like = str(make(plain))
    refused = {}
    for text in HOSTILE:
        try:
            card = make(text)
        except ValueError as error:
            refused[text] = str(error)
            continue
        assert_harmless(str(card), like)
    assert not any("\n" in said for said in refused.values())
    assert not refused or place in ("repo_id", "license", "language")
    assert len(HOSTILE) * len(PLACES) >= 200


@at_most(40)
@given(text=st.text() | st.lists(st.sampled_from(HOSTILE), max_size=3).map("".join))
def test_no_string_of_a_document_gets_through(text):
    assert_harmless(
        str(generate_model_card(document(text), **FIXED)), str(generate_model_card(document("plain"), **FIXED))
    )


@given(
    text=st.text()
    | st.lists(st.sampled_from([*HOSTILE, "a", " ", "1", ".", ")", "_", "-", "www."]), max_size=6).map("".join)
)
def test_text_is_shown_as_it_is(text):
    """In a paragraph, in a table and after another word; as text and as code."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for shown in (escape.text(text), escape.code(text)):
        assert "\n" not in shown
        for frame in ("{}", "| head |\n| --- |\n| {} |", "word {}"):
            inline = [token for token in parser.parse(frame.replace("{}", shown)) if token.type == "inline"]
            tokens = [child for token in inline for child in token.children]
            assert {token.type for token in tokens} <= {"text", "text_special", "code_inline"}
            seen = "".join(token.content for token in tokens)
            assert seen.removeprefix("head" if "head" in frame else "word" if "word" in frame else "").strip() == (
                escape.line(text) or escape.EMPTY
            )


def test_what_was_escaped_can_be_read():
    assert "<script>alert(1)</script>" in words(
        str(generate_model_card(document("<script>alert(1)</script>"), **FIXED))
    )
    assert (
        escape.text("torch 2.13.0+cpu (exact_match), 50 % of n=16; 1.5")
        == "torch 2.13.0+cpu (exact_match), 50 % of n=16; 1.5"
    )
    assert escape.path("/home/someone/models/tiny") == "`tiny`"
    assert escape.path("user/tiny") == "`user/tiny`"


NUMBER = st.none() | st.floats(allow_nan=False) | st.integers(-10, 10**12).map(float)
MEASUREMENTS = st.lists(
    st.builds(
        Measurement,
        decoder=st.builds(
            Decoder,
            name=st.sampled_from(["a", "b"]),
            kind=st.sampled_from(["generate", "jacobi", "jacobi_multiblock"]),
        ),
        prompts=st.builds(
            Prompts,
            domain=st.sampled_from(["code", "math"]),
            source=st.text(),
            count=st.integers(),
            max_new_tokens=st.integers(),
        ),
        tokens_per_forward=NUMBER,
        tokens_per_second=NUMBER,
        held_out_loss=NUMBER,
        accepted_lengths=st.none() | st.dictionaries(st.integers(1, 20), st.integers(0, 50)),
        extra=st.just({}),
    ),
    max_size=5,
)


@at_most(40)
@given(measurements=MEASUREMENTS)
def test_any_measurements_make_a_card_whose_cells_resolve(measurements):
    results = document(measurements=measurements)
    card = str(generate_model_card(results, **FIXED))
    content = json.loads(results.model_dump_json(exclude_none=True))
    for cell in model_card_cells(results):
        assert FORMATS[cell.format](resolve(content, cell.path)) == cell.markdown
        assert cell.markdown in card
