"""Readers of files from outside: what they return, and the errors that name file, line and fault."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import TemplateError

from jacobi_hf import io
from tests.helpers.tiny import EXAMPLE

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "hi"}]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "hello"}]


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
    io.read_prompts,
    io.read_prompts_by_domain,
]


@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_opened_is_named(tmp_path, reader):
    for path, reason in ((tmp_path / "nowhere", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read: {reason}.")):
            reader(path)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"prompts": []}', '{"prompts": {"code": "def f():"}}', '{"prompts": {"code": []}}', "{"]
)
def test_prompts_are_by_domain(tmp_path, content):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"prompts": {"code": ["def f():"]}}))
    assert io.read_prompts_by_domain(path) == {"code": ["def f():"]}
    path.write_text(content)
    with pytest.raises(ValueError, match=r"prompts.json (must hold prompts by domain|is not JSON)"):
        io.read_prompts_by_domain(path)


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "one\n\n  two\n", ["one", "  two"]),
        ("a.jsonl", '"one"\n\n{"prompt": "two", "answer": 3}\n', ["one", "two"]),
        ("a.jsonl", '"a\u2028b"\n', ["a\u2028b"]),
        ("a.json", json.dumps(["one", {"messages": MESSAGES}, {"prompt": MESSAGES}]), ["one", MESSAGES, MESSAGES]),
        ("a.jsonl", '{"stop": ["x"]}\n{"prompt": "one"}\n', ["one"]),
    ],
)
def test_a_file_of_prompts(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert io.read_prompts(tmp_path / name) == prompts


def test_a_task_file_is_a_file_of_prompts():
    prompts = io.read_prompts(EXAMPLE / "tasks" / "arithmetic.jsonl")
    assert len(prompts) > 1
    assert all(isinstance(prompt, str) for prompt in prompts)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.json", "[]", "holds no prompts"),
        ("a.json", '{"prompt": "x"}', "a list of prompts"),
        ("a.jsonl", '"x"\n{\n', "line 2 is not JSON"),
        ("a.json", "[3]", "prompt 1 is not a prompt"),
        ("a.jsonl", '"x"\n{"text": "y"}', "line 2 is not a prompt"),
        ("a.json", "[", "is not JSON"),
        ("a.json", '[{"messages": []}]', "prompt 1"),
        ("a.json", '[[{"role": "user"}]]', "prompt 1"),
        ("a.json", '[""]', "prompt 1"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        io.read_prompts(tmp_path / name)


class Tokenizer:
    """A tokenizer whose ids show what it was asked to encode."""

    chat_template = "there is one"

    def __call__(self, text):
        return {"input_ids": [text] if text else []}

    def apply_chat_template(self, turns, **options):
        if options.get("refuse"):
            raise TemplateError("no such turns")
        return [(turn["role"], turn["content"]) for turn in turns]


def test_messages_and_chats_go_through_the_template():
    assert io.encode_prompts(["x", ANSWERED], Tokenizer(), "m", chat=False) == [["x"], [("user", "hi")]]
    assert io.encode_prompts(["x"], Tokenizer(), "m", chat=True) == [[("user", "x")]]
    with pytest.raises(ValueError, match="the tokenizer of m returns no tokens for ''"):
        io.encode_prompts([""], Tokenizer(), "m", chat=False)
    tokenizer = Tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="m has no chat template"):
        io.encode_prompts([MESSAGES], tokenizer, "m", chat=False)


def test_a_system_prompt_is_put_before_messages_without_one():
    system = {"role": "system", "content": "own"}
    assert io.encode_messages(MESSAGES, Tokenizer(), "row 1", system_prompt="s") == [("system", "s"), ("user", "hi")]
    assert io.encode_messages([system, *MESSAGES], Tokenizer(), "row 1", system_prompt="s")[0] == ("system", "own")


def test_messages_that_no_template_takes_are_named():
    for turns in ([], ANSWERED[1:]):
        with pytest.raises(ValueError, match="row 1 has no turn to answer"):
            io.encode_messages(turns, Tokenizer(), "row 1", system_prompt="s")
    with pytest.raises(ValueError, match="the chat template refuses row 1: no such turns"):
        io.encode_messages(MESSAGES, Tokenizer(), "row 1", refuse=True)


def test_the_readers_need_neither_torch_nor_transformers():
    program = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('io_alone', 'jacobi_hf/io.py'); "
        "spec.loader.exec_module(importlib.util.module_from_spec(spec)); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
