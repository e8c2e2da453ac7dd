"""The `custom_generate/` folder of a repository: Jacobi decoding for machines where jacobi_hf is not installed.

`model.generate(**inputs, custom_generate="user/repo", trust_remote_code=True)` runs the repository's `custom_generate/generate.py`.
That file is jacobi_hf's own modules one after the other, those that `jacobi_hf.integration.custom_generate` needs, without their imports of each other:
transformers then fetches one file, and finds ordinary code in it. What keeps this simple is that no name means two things in them,
which is checked.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
from importlib import resources
from pathlib import Path  # noqa: TC003 (typer reads it)
from typing import Annotated, Literal

import typer

from jacobi_hf._version import __version__
from jacobi_hf.integration.compat import OLDEST_SUPPORTED

FOLDER = "custom_generate"
# One comparison a line: transformers checks no more than that.
REQUIREMENTS = ("torch>=2.6", f"transformers>={OLDEST_SUPPORTED}")
_ROOT, _ENTRY = "integration.custom_generate", "generate"
_HEAD = """\
# Jacobi decoding for transformers: several tokens per forward, the same text. A copy of jacobi_hf {version}, made by
# jacobi_hf.hub_cards.custom_generate. Where jacobi_hf is installed, that decodes instead.
#
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0. There is no warranty of any kind.
{made_for}
from __future__ import annotations
"""

Kind = Literal["model", "drafter"]


def write_custom_generate(
    folder: Path, kind: Kind = "model", base_model: str | None = None, base_revision: str | None = None
) -> list[Path]:
    """Write `custom_generate/generate.py` and `custom_generate/requirements.txt` into the folder of a repository.

    Args:
        folder: of the repository; `custom_generate` is made in it.
        kind: "model" for a checkpoint; "drafter" for a drafter, which the calls then load from the repository.
        base_model, base_revision: that a drafter was made for, to be read in the file.

    Returns:
        What was written.
    """
    target = folder / FOLDER
    texts = {"generate.py": build(kind, base_model, base_revision), "requirements.txt": "\n".join(REQUIREMENTS) + "\n"}
    target.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8", newline="\n")
    return [target / name for name in texts]


def build(kind: Kind = "model", base_model: str | None = None, base_revision: str | None = None) -> str:
    """The text of `generate.py`; the same whenever the package is.

    Raises:
        ValueError: `kind` is neither of the two; or modules of the package that cannot become one file, with the reason.
    """
    if kind not in ("model", "drafter"):
        raise ValueError(f"kind={kind!r} is not known; it is 'model' or 'drafter'.")
    revision = "" if base_revision is None else f", revision {base_revision!a}"
    made_for = "" if base_model is None else f"# Made for {base_model!a}{revision}.\n"
    modules = _modules()
    sections = [
        f"# {'-' * 20} jacobi_hf/{_file_of(name)}\n\n{_without_own_imports(name, text)}"
        for name, text in modules.items()
    ]
    _check_names(modules)
    last = f"# {'-' * 20} what transformers calls\n\n{_ENTRY} = entry({json.dumps(kind)})\n"
    text = "\n\n".join([_HEAD.format(version=__version__, made_for=made_for), *sections, last])
    compile(text, "generate.py", "exec")
    return text


def _modules() -> dict[str, str]:
    """Text of each module that decoding needs at run time, by its name, each after those that it imports."""
    found: dict[str, str] = {}

    def visit(name: str) -> None:
        text = resources.files("jacobi_hf").joinpath(_file_of(name)).read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if (imported := _own_module(node)) and imported not in found:
                visit(imported)
        found[name] = text

    visit(_ROOT)
    return found


def _file_of(module: str) -> str:
    """Return the file of a module of jacobi_hf, relative to the package: `integration/compat.py`."""
    return f"{module.replace('.', '/')}.py"


def _own_module(node: ast.stmt) -> str | None:
    """The module of jacobi_hf that a statement imports from."""
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jacobi_hf":
        return node.module.removeprefix("jacobi_hf.")
    return None


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _without_own_imports(name: str, text: str) -> str:
    """A module's text without what only a module of its own needs: imports of its siblings, of `annotations`, and for type checkers."""
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if (
            _own_module(node)
            or _is_for_types(node)
            or (isinstance(node, ast.ImportFrom) and node.module == "__future__")
        ):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    kept = re.sub(r"\n{3,}", "\n\n\n", "\n".join(lines)).strip() + "\n"
    renamed = [node for node in ast.parse(text).body if _own_module(node) and " as " in ast.unparse(node)]
    if odd := [*renamed, *filter(_imports_sibling, ast.walk(ast.parse(kept)))]:
        raise ValueError(
            f"jacobi_hf/{_file_of(name)} imports a sibling in a way that one file cannot: {ast.unparse(odd[0])}"
        )
    return kept


def _imports_sibling(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(one.name.split(".")[0] == "jacobi_hf" for one in node.names)
    return isinstance(node, ast.ImportFrom) and (node.level > 0 or (node.module or "").split(".")[0] == "jacobi_hf")


def _check_names(modules: dict[str, str]) -> None:
    """Refuse modules in which a global name means two things, since they come to share one namespace."""
    meanings: dict[str, tuple[str, str]] = {
        name: ("builtins", name) for name in dir(builtins) if not name.startswith("__")
    }
    meanings[_ENTRY] = ("what transformers calls", _ENTRY)
    for module, text in modules.items():
        for name, meaning in _globals_of(module, ast.parse(text)).items():
            if meanings.setdefault(name, meaning) != meaning:
                first, second = (".".join(one) for one in (meanings[name], meaning))
                raise ValueError(f"{name} is {first} and {second}: rename one, since {FOLDER}/generate.py holds both.")


def _globals_of(module: str, tree: ast.Module) -> dict[str, tuple[str, str]]:
    """What a module's statements bind, and where each comes from: module and name."""
    bound: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if _is_for_types(node):
            continue
        if isinstance(node, ast.ImportFrom):
            bound |= {one.asname or one.name: (node.module or "", one.name) for one in node.names}
        elif isinstance(node, ast.Import):
            bound |= {
                one.asname or one.name.split(".")[0]: (one.name if one.asname else one.name.split(".")[0], "")
                for one in node.names
            }
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound[node.name] = (f"jacobi_hf.{module}", node.name)
        else:
            names = [one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]
            bound |= {name: (f"jacobi_hf.{module}", name) for name in names}
    return bound


def _command(
    folder: Annotated[Path, typer.Argument(help="Folder of the repository.")],
    drafter: Annotated[bool, typer.Option("--drafter", help="The repository holds a drafter.")] = False,
) -> None:
    """Write custom_generate/generate.py and requirements.txt into FOLDER."""
    for path in write_custom_generate(folder, "drafter" if drafter else "model"):
        typer.echo(path)


if __name__ == "__main__":
    typer.run(_command)
