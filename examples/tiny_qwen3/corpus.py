"""The corpus of the tiny model: code and prose from the running interpreter's standard library, and worked arithmetic.

Three domains, each with held-out material: `code` (source files), `prose` (longer docstrings, and the language
reference that `help()` shows), `arithmetic` (`arithmetic.py`). Modules in `held_out_modules.txt` are in no training
text.

    python examples/tiny_qwen3/corpus.py

writes `prompts.json`, 64 held-out prompts of each domain, which the demo, the tests and the benchmarks use.
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
    """Paths relative to the standard library, from `held_out_modules.txt`."""
    lines = (HERE / "held_out_modules.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def _modules(held_out: bool) -> Iterator[str]:
    """Sources of the standard library: the held-out ones, or all others. Tests and character tables are left out."""
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
    """Source files."""
    return list(_modules(held_out))


def prose_texts(held_out: bool) -> list[str]:
    """Docstrings of at least `PROSE_MIN_CHARACTERS`, without doctest-heavy ones; for training also the language reference."""
    texts = dict.fromkeys(doc for source in _modules(held_out) for doc in _docstrings(source))
    if not held_out:
        reference = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
        if reference.is_file():
            topics = ast.literal_eval(ast.parse(reference.read_text(encoding="utf-8")).body[-1].value)  # type: ignore[attr-defined]
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
    """`count` worked problems, question and answer."""
    problems = arithmetic.held_out_problems(count) if held_out else arithmetic.training_problems(count)
    return [p.prompt + p.completion for p in problems]


def prompts(domain: str, count: int) -> list[str]:
    """`count` held-out prompts of a domain, the same for the same interpreter version.

    Code: from a `def` or `class` line of a held-out module to between 3 and 10 lines further on. Prose: the first 20
    to 40 words of a held-out docstring. Arithmetic: the question of a held-out seed.
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
        raise ValueError(f"domain={domain!r} is none of {DOMAINS}")
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
