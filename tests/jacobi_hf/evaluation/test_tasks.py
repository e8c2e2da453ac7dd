"""Tasks by name and from files, and those that are refused."""

from __future__ import annotations

import json
import re

import pytest

from jacobi_hf.evaluation.tasks import TaskFile, load_tasks
from tests.helpers.tasks import TASK, task_manager, write_task
from tests.helpers.tiny import EXAMPLE


@pytest.fixture(autouse=True)
def one_index(monkeypatch):
    """Let the harness read the index of its tasks once."""
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda include_defaults: task_manager(include_defaults=include_defaults)
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1 is not JSON"),
        (["[1]"], "line 1 is not a JSON object but '\\[1\\]'"),
        ([], "holds no problems"),
        ([{"answer_pattern": "x"}], "holds no problems"),
        ([{"prompt": "x"}], "line 1: 'answer' is missing"),
        ([{"promt": "x", "answer": 1}], "line 1: 'prompt' is missing; there is 'promt'"),
        ([{"prompt": "x", "answer": 1}, {"prompt": "y", "target": 1}], "line 2: 'answer' is missing"),
        ([{"prompt": "x", "answer": [1]}], "line 1: answer cannot be \\[1\\]"),
        ([{"prompt": "", "answer": 1}], "prompt cannot be ''"),
        ([{"answer_patern": "x"}], "did you mean 'answer_pattern'"),
        ([{"answer_pattern": "("}], "no regular expression"),
        ([{"max_new_tokens": 0}], "max_new_tokens cannot be 0"),
        ([{"stop": "x"}], "stop cannot be 'x'"),
    ],
)
def test_files_that_are_no_tasks_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        TaskFile.read(write_task(tmp_path, *rows))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    binary = tmp_path / "x.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "nowhere.jsonl", tmp_path, binary):
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} (cannot be read|is not UTF-8)"):
            TaskFile.read(path)


@pytest.mark.slow
def test_tasks_that_cannot_be_run_are_refused():
    with pytest.raises(ValueError, match=r"no task 'gsm8kk' \(did you mean 'gsm8k"):
        load_tasks(["gsm8kk"], [])
    with pytest.raises(ValueError, match=r"the data of gsm8k.*openai/gsm8k"):
        load_tasks(["gsm8k"], [])
    with pytest.raises(ValueError, match=r"minerva_math needs packages.*math_verify"):
        load_tasks(["minerva_math"], [])


def test_tasks_that_generate_nothing_or_run_code_are_refused(tmp_path):
    config = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": write_task(tmp_path, {"q": "1"})},
        "test_split": "train",
        "doc_to_text": "{{q}}",
    }
    choice = tmp_path / "choice.yaml"
    choice.write_text(
        json.dumps(
            {**config, "task": "choice", "output_type": "multiple_choice", "doc_to_choice": ["a"], "doc_to_target": 0}
        )
    )
    with pytest.raises(ValueError, match=r"choice is scored by log-likelihoods \(multiple_choice\)"):
        load_tasks([str(choice)], [])
    code = tmp_path / "code.yaml"
    code.write_text(
        json.dumps(
            {**config, "task": "code", "output_type": "generate_until", "doc_to_target": "x", "unsafe_code": True}
        )
    )
    with pytest.raises(ValueError, match=r"code runs code that the model writes.*--confirm-run-unsafe-code"):
        load_tasks([str(code)], [])
    assert list(load_tasks([str(code)], [], runs_code=True)) == ["code"]


def test_the_shipped_task_is_what_its_script_writes_and_held_out(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import arithmetic
    import task

    assert TASK.read_text(encoding="utf-8").split("\n")[:-1] == task.lines()
    assert (EXAMPLE / "newcomer.jsonl").read_text(encoding="utf-8").split("\n")[:-1] == task.prompts()
    file = TaskFile.read(TASK)
    prompts = {problem.prompt for problem in file.problems}
    assert len(prompts) == len(file.problems) == 200
    assert prompts.isdisjoint(problem.prompt for problem in arithmetic.training_problems(3000))
