"""Helpers of the tests of evaluation: task files, and one index of the harness's tasks."""

from __future__ import annotations

import functools
import json

from lm_eval.tasks import TaskManager

from tests.helpers.tiny import EXAMPLE

TASK = EXAMPLE / "tasks" / "arithmetic.jsonl"
# The harness reads its 14 000 tasks once for all tests.
task_manager = functools.cache(TaskManager)


def write_task(folder, *rows, name="task.jsonl"):
    """Write a task file of rows, each an object or a line; return its path."""
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)
