"""`tasks/arithmetic.jsonl`, 200 held-out problems as a task of `jacobi-hf eval`:

    python examples/tiny_qwen3/task.py

They are the first of the odd seeds, of the templates that the checkpoint was trained on; `arithmetic.training_problems` leaves their
questions out.
"""

from __future__ import annotations

import json
from pathlib import Path

import arithmetic

FILE = Path(__file__).resolve().parent / "tasks" / "arithmetic.jsonl"
OPTIONS = {
    "answer_pattern": r"The answer is (-?\d+)",
    "max_new_tokens": 96,
    "source": "held-out word problems, written by examples/tiny_qwen3/task.py",
}


def lines() -> list[str]:
    """The file, line by line: how answers are read, then a problem a line."""
    problems = [{"prompt": p.prompt, "answer": p.result} for p in arithmetic.held_out_problems(200)]
    return [json.dumps(row) for row in (OPTIONS, *problems)]


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
