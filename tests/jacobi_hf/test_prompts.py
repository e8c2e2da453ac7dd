"""The reader of prompts: files as they are published, columns, chat templates, and rows that are no prompts."""

from __future__ import annotations

import json

import pytest
from jinja2 import TemplateError

from jacobi_hf import prompts
from jacobi_hf.prompts import Question
from tests.helpers.tiny import EXAMPLE

MESSAGES = [{"role": "user", "content": "hi"}]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "hello"}]
CALLED = [*MESSAGES, {"role": "assistant", "tool_calls": []}, {"role": "tool", "content": "3"}]
PUBLISHED = {
    "GSM8K": ({"question": "How many?", "answer": "2"}, Question("How many?")),
    "HumanEval": ({"task_id": "HumanEval/0", "prompt": "def f():", "test": "check"}, "def f():"),
    "MBPP": ({"text": "Write f.", "code": "def f(): ...", "test_list": ["assert f()"]}, Question("Write f.")),
    "MBPP, sanitized": ({"prompt": "Write f.", "test_list": ["assert f()"]}, Question("Write f.")),
    "Spec-Bench": ({"question_id": 81, "category": "writing", "turns": ["First.", "Second."]}, Question("First.")),
    "Alpaca": ({"instruction": "Add.", "input": "", "output": "3"}, Question("Add.")),
    "Alpaca, with input": ({"instruction": "Add.", "input": "1 2", "output": "3"}, Question("Add.\n\n1 2")),
    "TRL, with tools": ({"messages": CALLED}, CALLED),
    "TRL": ({"messages": ANSWERED}, ANSWERED),
    "C4": ({"text": "Once upon a time", "url": "x"}, "Once upon a time"),
}


@pytest.mark.parametrize(("row", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_files_are_read_as_they_are(tmp_path, row, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    found = prompts.read_prompts(path)
    assert found == [expected, expected]
    assert type(found[0]) is type(expected)
    assert prompts.read_prompts_by_domain(path) == {"rows": found}


def test_prompts_by_domain_are_one_list_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"prompts": {"code": ["one", "two"], "prose": ["three"]}}')
    assert prompts.read_prompts(path) == ["one", "two", "three"]
    for wrong in ('"abc"', "null", "5", "[]"):
        path.write_text(f'{{"prompts": {{"code": {wrong}}}}}')
        with pytest.raises(ValueError, match=r"a.json must hold a list of prompts, or prompts by domain"):
            prompts.read_prompts(path)


def test_what_no_prompt_is_read_from_is_refused(tmp_path):
    for name in ("a.csv", "a.jsonl.gz"):
        (tmp_path / name).write_text("prompt\nx\n")
        with pytest.raises(ValueError, match=f"{name} cannot be read: save it as JSONL, JSON or parquet"):
            prompts.read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match=r"the column prompt of row 1 is not a prompt. .* it is \"\""):
        prompts.prompt_of({"prompt": "", "question": "hi"}, "row 1")
    with pytest.raises(ValueError, match=r"row 1 does not have any of the columns .*; it has a"):
        prompts.prompt_of({"a": 1, "prompt": None}, "row 1")


def test_a_file_with_a_mark_of_its_byte_order(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n', encoding="utf-8-sig")
    assert prompts.read_prompts(path) == ["x"]


def test_a_parquet_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"question": "one?"}, {"question": "two?"}]).to_parquet(path)
    assert prompts.read_prompts(path) == ["one?", "two?"]
    with pytest.raises(ValueError, match=r"rows.parquet, row 1 does not have the column ask; it has question"):
        prompts.read_prompts(path, "ask")


def test_a_column_of_another_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"ask": "one", "text": "other"}\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 does not have the column ask; it has text"):
        prompts.read_prompts(path, "ask")
    path.write_text('{"ask": "one", "text": "other"}\n')
    assert prompts.read_prompts(path, "ask") == ["one"]


def test_a_first_row_that_is_bad_is_not_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"quest": "x"}\n{"prompt": "y"}\n')
    with pytest.raises(
        ValueError, match=r"line 1 does not have any of the columns messages, prompt, .*; it has quest"
    ):
        prompts.read_prompts(path)


def test_questions_go_through_a_template_if_there_is_one():
    tokenizer = Tokenizer()
    rows = [Question("how?"), "once"]
    asked = [("user", "how?")]
    assert prompts.encode_prompts(rows, tokenizer, "m") == [asked, ["once"]]
    assert prompts.encode_prompts(rows, tokenizer, "m", chat=False) == [["how?"], ["once"]]
    assert prompts.encode_prompts(rows, tokenizer, "m", chat=True) == [asked, [("user", "once")]]
    tokenizer.chat_template = None
    assert prompts.encode_prompts(rows, tokenizer, "m") == [["how?"], ["once"]]


def test_what_cannot_be_opened_is_named(tmp_path):
    for reader in (prompts.read_prompts, prompts.read_prompts_by_domain):
        for name in ("nowhere.jsonl", "nowhere.json", "nowhere.txt", "nowhere"):
            with pytest.raises(ValueError, match=f"{name} cannot be read: No such file or directory"):
                reader(tmp_path / name)


def test_a_dataset_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="nobody/nothing is no file, and no data set of the Hub that can be read"):
        prompts.read_prompts("nobody/nothing")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"prompts": []}', '{"prompts": {"code": "def f():"}}', '{"prompts": {"code": []}}', "{"]
)
def test_prompts_are_by_domain(tmp_path, content):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"prompts": {"code": ["def f():"]}}))
    assert prompts.read_prompts_by_domain(path) == {"code": ["def f():"]}
    path.write_text(content)
    with pytest.raises(
        ValueError,
        match=r"prompts.json (must hold a list of prompts|is not JSON|holds no prompts)",
    ):
        prompts.read_prompts_by_domain(path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\n\n  two\n", ["one", "  two"]),
        ("a.jsonl", '"one"\n\n{"prompt": "two", "answer": 3}\n', ["one", "two"]),
        ("a.jsonl", '"a\u2028b"\n', ["a\u2028b"]),
        ("a.json", json.dumps(["one", {"messages": MESSAGES}, {"prompt": MESSAGES}]), ["one", MESSAGES, MESSAGES]),
        ("a.jsonl", '{"stop": ["x"]}\n{"prompt": "one"}\n', ["one"]),
    ],
)
def test_a_file_of_prompts(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert prompts.read_prompts(tmp_path / name) == expected


def test_a_task_file_is_a_file_of_prompts():
    found = prompts.read_prompts(EXAMPLE / "tasks" / "arithmetic.jsonl")
    assert len(found) > 1
    assert all(isinstance(prompt, str) for prompt in found)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.json", "[]", "holds no prompts"),
        ("a.json", '{"prompt": "x"}', "a list of prompts"),
        ("a.json", "3", "neither a list of prompts nor prompts by domain"),
        ("a.jsonl", '"x"\n{\n', "line 2 is not JSON"),
        ("a.json", "[3]", "prompt 1 is not a prompt"),
        ("a.jsonl", '"x"\n{"code": "y"}', "line 2 does not have any of the columns"),
        ("a.json", "[", "is not JSON"),
        ("a.json", '[{"messages": []}]', "prompt 1"),
        ("a.json", '[[{"role": "user"}]]', "prompt 1"),
        ("a.json", '[""]', "prompt 1"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        prompts.read_prompts(tmp_path / name)


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
    assert prompts.encode_prompts(["x", ANSWERED], Tokenizer(), "m", chat=False) == [["x"], [("user", "hi")]]
    assert prompts.encode_prompts(["x"], Tokenizer(), "m", chat=True) == [[("user", "x")]]
    with pytest.raises(ValueError, match="the tokenizer of m returns no tokens for ''"):
        prompts.encode_prompts([""], Tokenizer(), "m", chat=False)
    tokenizer = Tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="m has no chat template"):
        prompts.encode_prompts([MESSAGES], tokenizer, "m", chat=False)


def test_a_system_prompt_is_put_before_messages_without_one():
    system = {"role": "system", "content": "own"}
    assert prompts.encode_messages(MESSAGES, Tokenizer(), "row 1", system_prompt="s") == [
        ("system", "s"),
        ("user", "hi"),
    ]
    assert prompts.encode_messages([system, *MESSAGES], Tokenizer(), "row 1", system_prompt="s")[0] == (
        "system",
        "own",
    )


def test_messages_that_no_template_takes_are_named():
    for turns in ([], ANSWERED[1:]):
        with pytest.raises(ValueError, match="row 1 has no turn to answer"):
            prompts.encode_messages(turns, Tokenizer(), "row 1", system_prompt="s")
    with pytest.raises(ValueError, match="the chat template refuses row 1: no such turns"):
        prompts.encode_messages(MESSAGES, Tokenizer(), "row 1", refuse=True)
