"""Readers of files from outside: what they return, and the errors that name file, line and fault."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jacobi_hf import io

ROOT = Path(__file__).resolve().parents[2]


def test_jsonl_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"text": "a\u2028b\n"}, {"text": "", "n": [1, None]}]  # U+2028 ends no line of JSONL
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert io.read_jsonl(path) == rows


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        (io.read_jsonl, b'{"a": 1}\n{"a"\n', r"rows, line 2 is not JSON: .* at column 5\."),
        (io.read_jsonl, b'{"a": 1}\n\n[1]\n', r"rows, line 3 is not a JSON object but '\[1\]'"),
        (io.read_jsonl, b"\n", r"rows is empty"),
        (io.read_text, b'{"a": "\xff"}\n', r"rows is not UTF-8 text: .* at byte 7\. Save it as UTF-8"),
        (io.read_json, b"[1,\n2,]", r"rows, line 2 is not JSON: .* at column 3\."),
        (io.read_json, b"[1,", r"rows is not JSON: .* at column 4\."),
        (io.read_json_object, b"[1]", r"rows is not a JSON object but '\[1\]'"),
        (io.read_yaml, b"a: 1\nb: [1, 2", r"rows, line 2, column 9 is not YAML: expected"),
        (io.read_yaml, b"a: \x01", r"rows is not YAML: .*special characters"),
    ],
)
def test_a_fault_is_named_with_its_file_and_line(tmp_path, reader, content, message):
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        reader(path)


READERS = [
    io.read_text,
    io.read_json,
    io.read_json_object,
    io.read_jsonl,
    io.read_lines,
    io.read_yaml,
]


@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_opened_is_named(tmp_path, reader):
    for path, reason in ((tmp_path / "nowhere", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read: {reason}.")):
            reader(path)


def test_the_readers_need_neither_torch_nor_transformers():
    program = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('io_alone', 'jacobi_hf/io.py'); "
        "spec.loader.exec_module(importlib.util.module_from_spec(spec)); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
