"""Prompts and rows from files."""

from __future__ import annotations

import json

import pytest

from jacobi_hf.trainer.data.texts import read_jsonl, read_prompts


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"text": "a\u2028b\n"}, {"text": "", "n": [1, None]}]  # U+2028 ends no line of JSONL
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert read_jsonl(path) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a"\n', r"rows.jsonl, line 2 is not JSON: .* at column 5"),
        (b'{"a": 1}\n\n[1]\n', r"rows.jsonl, line 3 is not a JSON object but '\[1\]'"),
        (b"\n", r"rows.jsonl is empty"),
        (b'{"a": "\xff"}\n', r"rows.jsonl is not UTF-8 text: .* at byte 7"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_jsonl(path)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"prompts": []}', '{"prompts": {"code": "def f():"}}', '{"prompts": {"code": []}}', "{"]
)
def test_prompts_are_by_domain(tmp_path, content):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"prompts": {"code": ["def f():"]}}))
    assert read_prompts(path) == {"code": ["def f():"]}
    path.write_text(content)
    with pytest.raises(ValueError, match=r"prompts.json (has to hold prompts by domain|is not JSON)"):
        read_prompts(path)
