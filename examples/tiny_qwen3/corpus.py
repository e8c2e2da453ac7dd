"""The corpus of the tiny model, and `prompts.json`: 64 held-out prompts of each domain.

    python examples/tiny_qwen3/corpus.py

The command writes `prompts.json`, which the demo, the tests and the benchmarks use. There are three domains, each with
held-out texts:

- `code`: source files of the running interpreter's standard library;
- `prose`: its longer docstrings, and the language reference that `help()` shows;
- `arithmetic`: worked word problems of `arithmetic.py`.

No training text comes from the modules in `held_out_modules.txt`.
"""

from __future__ import annotations

import ast
import inspect
import json
import platform
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import arithmetic

HERE = Path(__file__).resolve().parent
DOMAINS = ("code", "arithmetic", "prose")
PROSE_MIN_CHARACTERS = 240
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data", "lib-dynload"}


def held_out_modules() -> frozenset[str]:
    """Return the paths in `held_out_modules.txt`, relative to the standard library."""
    lines = (HERE / "held_out_modules.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def _modules(held_out: bool) -> Iterator[str]:
    """Yield the held-out sources of the standard library, or all others, without tests and character tables."""
    root = Path(sysconfig.get_path("stdlib"))
    chosen = held_out_modules()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or (
            relative.parts[0] == "encodings" and "decoding_table" in path.read_text("utf-8", "replace")
        ):
            continue
        if (relative.as_posix() in chosen) == held_out:
            yield path.read_text(encoding="utf-8", errors="replace")


def code_texts(held_out: bool) -> list[str]:
    """Return the held-out source files, or all others."""
    return list(_modules(held_out))


def prose_texts(held_out: bool) -> list[str]:
    """Return docstrings of at least `PROSE_MIN_CHARACTERS` characters with at most two doctest lines.

    The training texts also have the language reference.
    """
    texts = dict.fromkeys(doc for source in _modules(held_out) for doc in _docstrings(source))
    if not held_out:
        reference = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
        if reference.is_file():
            assignment = ast.parse(reference.read_text(encoding="utf-8")).body[-1]
            topics = ast.literal_eval(assignment.value)  # type: ignore[attr-defined]
            texts.update(dict.fromkeys(text.strip() for text in topics.values()))
        for text in prose_texts(held_out=True):
            texts.pop(text, None)
    return list(texts)


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(doc) >= PROSE_MIN_CHARACTERS and doc.count(">>>") < 3:
                yield doc


def arithmetic_texts(held_out: bool, count: int) -> list[str]:
    """Return `count` worked problems, each with its answer."""
    problems = arithmetic.held_out_problems(count) if held_out else arithmetic.training_problems(count)
    return [p.prompt + p.completion for p in problems]


def prompts(domain: str, count: int) -> list[str]:
    """Return `count` held-out prompts of a domain, which depend on the version of the interpreter alone.

    A prompt of code has 3 to 10 lines of a held-out module and starts at a `def` or `class` line. A prompt of prose
    has the first 20 to 40 words of a held-out docstring. A prompt of arithmetic is the question of a held-out seed.

    Raises:
        ValueError: `domain` is not one of `DOMAINS`.
    """
    rng = random.Random(f"prompts/{domain}")
    if domain == "arithmetic":
        return [p.prompt for p in arithmetic.held_out_problems(count)]
    if domain == "prose":
        texts = prose_texts(held_out=True)
        rng.shuffle(texts)
        long_texts = [text for text in texts if len(text.split()) > 60][:count]
        return ["".join(re.findall(r"\S+\s+", text)[: rng.randint(20, 40)]).rstrip() for text in long_texts]
    if domain != "code":
        raise ValueError(f"domain={domain!r} is not one of {DOMAINS}.")
    starts = []
    for source in code_texts(held_out=True):
        lines = source.splitlines(keepends=True)
        starts += [
            (lines, i)
            for i, line in enumerate(lines)
            if re.match(r"\s{0,4}(def|class) \w", line) and i + 20 < len(lines)
        ]
    return ["".join(lines[i : i + rng.randint(3, 10)]) for lines, i in rng.sample(starts, count)]


if __name__ == "__main__":
    document = {"python": platform.python_version(), "prompts": {domain: prompts(domain, 64) for domain in DOMAINS}}
    (HERE / "prompts.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(HERE / "prompts.json")
