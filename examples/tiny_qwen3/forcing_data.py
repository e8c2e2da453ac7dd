"""Write the data for Jacobi Forcing of the tiny model: prompts, replay text, held-out text.

    python examples/tiny_qwen3/forcing_data.py --output-dir build/forcing

- `code.jsonl`, `arithmetic.jsonl`, `prose.jsonl`: prompts.
- `replay.jsonl`: text that is mixed into the training.
- `held_out.jsonl`: held-out text by domain.
- `problems.jsonl`: held-out questions with their answers.

Prompts and replay text come from the corpus that the model was trained on. Prompts of code start at a `def` or `class`
line of a training module, prompts of prose are the first words of docstrings, and prompts of arithmetic are questions
of even seeds.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import arithmetic
import corpus
from transformers import HfArgumentParser


@dataclass
class Amounts:
    """The amounts of each kind of data."""

    output_dir: str = field(metadata={"help": "Folder for the JSONL files."})
    code: int = field(default=3000, metadata={"help": "Code prompts."})
    arithmetic: int = field(default=7000, metadata={"help": "Arithmetic prompts."})
    prose: int = field(default=0, metadata={"help": "Prose prompts."})
    replay_characters: int = field(default=700, metadata={"help": "Characters of a replay row of code."})
    replay_problems: int = field(
        default=40_000, metadata={"help": "Worked problems of the replay text, four in a row."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the choice."})


def code_prompts(count: int, rng: random.Random) -> list[str]:
    """Return prompts of 1 to 12 lines of code that start at a `def` or `class` line."""
    starts = []
    for source in corpus.code_texts(held_out=False):
        lines = source.splitlines(keepends=True)
        starts += [(lines, i) for i, line in enumerate(lines) if re.match(r"\s{0,4}(def|class) \w", line)]
    rng.shuffle(starts)
    return [_snippet(*starts[i % len(starts)], rng) for i in range(count)]


def _snippet(lines: list[str], first: int, rng: random.Random) -> str:
    return "".join(lines[first : first + rng.randint(1, 12)])


def prose_prompts(count: int, rng: random.Random) -> list[str]:
    """Return prompts of the first 10 to 50 words of docstrings."""
    texts = corpus.prose_texts(held_out=False)
    return ["".join(re.findall(r"\S+\s+", rng.choice(texts))[: rng.randint(10, 50)]).rstrip() for _ in range(count)]


def replay_texts(amounts: Amounts, rng: random.Random) -> list[str]:
    """Return pieces of all source files, worked problems that are no prompts, and docstrings, in random order."""
    size = amounts.replay_characters
    texts = [source[i : i + size] for source in corpus.code_texts(held_out=False) for i in range(0, len(source), size)]
    worked = corpus.arithmetic_texts(held_out=False, count=amounts.arithmetic + amounts.replay_problems)[
        amounts.arithmetic :
    ]
    texts += ["<|endoftext|>".join(worked[i : i + 4]) for i in range(0, len(worked), 4)]
    texts += [text[:size] for text in corpus.prose_texts(held_out=False)]
    rng.shuffle(texts)
    return texts


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows as JSON, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    (amounts,) = HfArgumentParser(Amounts).parse_args_into_dataclasses()
    rng = random.Random(amounts.seed)
    out = Path(amounts.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    problems = arithmetic.training_problems(amounts.arithmetic)
    write(out / "arithmetic.jsonl", ({"prompt": p.prompt} for p in problems))
    write(out / "code.jsonl", ({"prompt": text} for text in code_prompts(amounts.code, rng)))
    write(out / "prose.jsonl", ({"prompt": text} for text in prose_prompts(amounts.prose, rng)))
    held_out = {"code": corpus.code_texts(held_out=True), "prose": corpus.prose_texts(held_out=True)}
    held_out["arithmetic"] = corpus.arithmetic_texts(held_out=True, count=500)
    write(
        out / "held_out.jsonl",
        ({"domain": domain, "text": text} for domain, texts in held_out.items() for text in texts),
    )
    write(
        out / "problems.jsonl",
        ({"prompt": p.prompt, "answer": str(p.result)} for p in arithmetic.held_out_problems(1000)),
    )
    write(out / "replay.jsonl", ({"text": text} for text in replay_texts(amounts, rng)))
    print(out)


if __name__ == "__main__":
    main()
