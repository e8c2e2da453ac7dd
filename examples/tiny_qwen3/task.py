"""Write `tasks/arithmetic.jsonl` and `newcomer.jsonl`: a task to evaluate, and prompts to train on.

    python examples/tiny_qwen3/task.py

The task has 200 held-out problems for `jacobi-hf eval`. The prompts are 400 training problems.
The problems are the first of the odd seeds, of the templates that the checkpoint was trained on;
`arithmetic.training_problems`, whose first ones the prompts are, leaves their questions out.
"""

from __future__ import annotations

import json
from pathlib import Path

import arithmetic

HERE = Path(__file__).resolve().parent
FILE = HERE / "tasks" / "arithmetic.jsonl"
PROMPTS = HERE / "newcomer.jsonl"
OPTIONS = {
    "answer_pattern": r"The answer is (-?\d+)",
    "max_new_tokens": 96,
    "source": "held-out word problems, written by examples/tiny_qwen3/task.py",
}


def lines() -> list[str]:
    """Return the lines of the task: the options of the task, then one problem a line."""
    problems = [{"prompt": p.prompt, "answer": p.result} for p in arithmetic.held_out_problems(200)]
    return [json.dumps(row) for row in (OPTIONS, *problems)]


def prompts() -> list[str]:
    """Return the prompts of `examples/recipes/tiny_newcomer.yaml`, one a line."""
    return [json.dumps({"prompt": p.prompt}) for p in arithmetic.training_problems(400)]


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    for file, rows in ((FILE, lines()), (PROMPTS, prompts())):
        file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        print(file)
