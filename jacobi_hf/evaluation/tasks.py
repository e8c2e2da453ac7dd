r"""Tasks of an evaluation: tasks of lm-evaluation-harness by name, and tasks made from files of problems.

A task file is JSONL. Each line is a problem, with `prompt` (the text that the model reads) and `answer` (text or
number). Other fields are ignored. A first line without a prompt holds options instead:

    {"answer_pattern": "The answer is (-?\\d+)", "max_new_tokens": 96, "stop": ["\n\n"], "source": "a script"}
    {"prompt": "Question: What is 6 times 7?\nAnswer:", "answer": 42}

An answer is right if the first match of `answer_pattern` in the model's text equals it; if the pattern has a group,
its group is compared. Without a pattern the whole text is compared, without white space around it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from jacobi_hf.io import parse_json_object, read_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

WHOLE_TEXT = r"(?s)\A\s*(.*?)\s*\Z"
_RUNS_CODE = "{} runs code that the model writes: run it in a sandbox, and add --confirm-run-unsafe-code."


class TaskOptions(BaseModel):
    """Options of a task file: its first line, if that has no prompt."""

    model_config = ConfigDict(extra="forbid", strict=True)

    answer_pattern: str = WHOLE_TEXT
    max_new_tokens: int = Field(default=256, ge=1)
    stop: list[str] = []
    source: str = ""

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern


class Problem(BaseModel):
    """One problem: a line of a task file."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: str = Field(min_length=1)
    answer: str | int | float


@dataclass(frozen=True)
class TaskFile:
    """Problems of a task file, and how they are scored.

    Attributes:
        name: name of the task: the file's, without its ending.
        options: how the problems are answered and scored.
        problems: the problems in order.
    """

    name: str
    options: TaskOptions
    problems: list[Problem]

    @classmethod
    def read(cls, path: str | Path) -> TaskFile:
        """Return the task file at a path.

        Raises:
            ValueError: the file cannot be read, has no problems, or has a line that is neither a problem nor options;
                the error names the line and the reason.
        """
        rows = [(place, parse_json_object(line, place)) for place, line in read_lines(path)]
        options = TaskOptions()
        if rows and "prompt" not in rows[0][1] and "answer" not in rows[0][1]:
            options = _checked(*rows.pop(0), TaskOptions)
        if not rows:
            raise ValueError(f"the task file {path} holds no problems.")
        return cls(Path(path).stem, options, [_checked(place, row, Problem) for place, row in rows])

    def config(self) -> dict[str, Any]:
        """Return the task as a configuration of lm-evaluation-harness."""
        from datasets import Dataset

        rows = [{"prompt": problem.prompt, "answer": str(problem.answer)} for problem in self.problems]
        pattern = {"function": "regex", "regex_pattern": self.options.answer_pattern}
        return {
            "task": self.name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": lambda row: row["prompt"],
            "doc_to_target": lambda row: row["answer"],
            "target_delimiter": "",
            "num_fewshot": 0,
            "generation_kwargs": {
                "until": self.options.stop,
                "max_gen_toks": self.options.max_new_tokens,
                "do_sample": False,
            },
            "filter_list": [{"name": "answer", "filter": [pattern, {"function": "take_first"}]}],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1, "source": self.options.source},
        }


def load_tasks(names: Sequence[str], files: Sequence[TaskFile], *, runs_code: bool = False) -> dict[str, Any]:
    """Return tasks of lm-evaluation-harness with their data, by name.

    Args:
        names: names of tasks or groups of tasks, or paths of YAML files of the harness.
        files: task files.
        runs_code: whether tasks may run code that the model writes.

    Raises:
        ValueError: a task is unknown, lacks data or packages, generates no text, or runs code although it may not.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=any(not name.endswith((".yaml", ".yml")) for name in names))
    tasks: dict[str, Any] = {}
    for loaded in [*(manager.load([file.config()]) for file in files), *(_load(manager, name) for name in names)]:
        if twice := sorted(tasks.keys() & loaded["tasks"].keys()):
            raise ValueError(f"there are two tasks named {', '.join(twice)}: leave one out, or rename its file.")
        tasks |= loaded["tasks"]
    for name, task in tasks.items():
        _check_task(name, task, runs_code=runs_code)
    return tasks


def _check_task(name: str, task: Any, *, runs_code: bool) -> None:
    """Raise `ValueError` for a task that generates no text, or that runs code although it may not."""
    if task.OUTPUT_TYPE != "generate_until":
        raise ValueError(
            f"{name} is scored by log-likelihoods ({task.OUTPUT_TYPE}). It generates no text, so every decoder has "
            "the same score: measure it with lm_eval itself."
        )
    if getattr(task, "UNSAFE_CODE", False) and not runs_code:
        raise ValueError(_RUNS_CODE.format(name))


def _load(manager: Any, name: str) -> Any:
    """Return the tasks of a name, as the harness loads them.

    Raises:
        ValueError: there is no such task, or its data, packages or permission are missing.
    """
    try:
        return manager.load([name])
    except KeyError:
        close = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
        raise ValueError(
            f"lm-evaluation-harness knows no task {name!r}{hint}; `lm_eval ls tasks` lists them."
        ) from None
    except ImportError as error:
        raise ValueError(f"{name} needs packages that are not installed: {error}") from None
    except OSError as error:
        raise ValueError(
            f"the data of {name}, or its metric, is not on this machine and cannot be downloaded: {error}"
        ) from None
    except ValueError as error:
        if "HF_ALLOW_CODE_EVAL" in str(error):
            raise ValueError(_RUNS_CODE.format(name)) from None
        raise


def _checked(where: str, row: dict[str, Any], kind: Any) -> Any:
    """Return a row as a `Problem` or `TaskOptions`.

    Args:
        where: file and line, for errors.
        row: the JSON object of the line.
        kind: class of the row.

    Raises:
        ValueError: a field is missing, unknown, or has a value that is not allowed.
    """
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
    field = str(first["loc"][0])
    close = difflib.get_close_matches(field, row if first["type"] == "missing" else kind.model_fields, 1)
    hint = f" (did you mean {close[0]!r}?)" if close and close != [field] else ""
    if first["type"] == "missing":
        raise ValueError(f"{where}: {field!r} is missing{f'; there is {close[0]!r}' if close else ''}.")
    if first["type"] == "extra_forbidden":
        raise ValueError(
            f"{where}: {field!r} is no option of a task file{hint}; there are {', '.join(kind.model_fields)}."
        )
    raise ValueError(f"{where}: {field} cannot be {row[field]!r}: {first['msg']}.")
