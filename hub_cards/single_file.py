"""Jacobi decoding in one file, for machines where jacobi_hf is not installed.

`model.generate(**inputs, custom_generate="user/repo", trust_remote_code=True)` downloads and runs one file of the
repository, `custom_generate/generate.py`. This module builds that file. It joins the module
`jacobi_hf.integration.custom_generate` and the modules that this module imports, in the order of their imports, and
drops the imports between them. The joined modules share one namespace, so no name may have two meanings in them. The
builder checks this.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path  # noqa: TC003 (typer reads it)
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jacobi_hf._version import __version__
from jacobi_hf.integration.releases import OLDEST_SUPPORTED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Import = ast.Import | ast.ImportFrom

FOLDER = "custom_generate"
# One comparison a line: transformers reads no more than that.
REQUIREMENTS = ("torch>=2.6", f"transformers>={OLDEST_SUPPORTED}")
_PACKAGE = "jacobi_hf"
_ROOT = "integration.custom_generate"
_ENTRY = "generate"
_HEAD = """\
# Jacobi decoding for transformers: several tokens per forward, the same text. A copy of jacobi_hf {version}, built by
# jacobi_hf.hub_cards.single_file. Where jacobi_hf is installed, the installed package decodes instead.
#
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0. There is no warranty.
{made_for}
from __future__ import annotations
"""

Kind = Literal["model", "drafter"]


def write_custom_generate(
    folder: Path, kind: Kind = "model", base_model: str | None = None, base_revision: str | None = None
) -> list[Path]:
    """Write `custom_generate/generate.py` and `custom_generate/requirements.txt` into the folder of a repository.

    Args:
        folder: the repository's folder; `custom_generate` is created in it.
        kind: "model" for a checkpoint; "drafter" for a drafter, which each call then loads from the repository.
        base_model: the model that a drafter was trained for. A comment in the file names it.
        base_revision: the revision of `base_model`, for the same comment.

    Returns:
        The paths of the two files.

    Raises:
        ValueError: as `build`.
    """
    target = folder / FOLDER
    texts = {"generate.py": build(kind, base_model, base_revision), "requirements.txt": "\n".join(REQUIREMENTS) + "\n"}
    target.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8", newline="\n")
    return [target / name for name in texts]


def build(kind: Kind = "model", base_model: str | None = None, base_revision: str | None = None) -> str:
    """Return the text of `generate.py`. The same package always gives the same text.

    Args:
        kind: "model" or "drafter".
        base_model: the model that a drafter was trained for, named in a comment.
        base_revision: the revision of `base_model`, named in the same comment.

    Raises:
        ValueError: `kind` is neither "model" nor "drafter", or the modules cannot be joined. The message names the
            file, the line and the reason.
    """
    if kind not in ("model", "drafter"):
        raise ValueError(f"kind={kind!r} is unknown. Give 'model' or 'drafter'.")
    revision = "" if base_revision is None else f", revision {base_revision!a}"
    made_for = "" if base_model is None else f"# Made for {base_model!a}{revision}.\n"
    modules = _modules()
    sections = [f"# {'-' * 20} {module.file}\n\n{module.without_own_imports()}" for module in modules]
    check_names(modules)
    last = f"# {'-' * 20} what transformers calls\n\n{_ENTRY} = entry({json.dumps(kind)})\n"
    text = "\n\n".join([_HEAD.format(version=__version__, made_for=made_for), *sections, last])
    compile(text, "generate.py", "exec")
    return text


@dataclass(frozen=True)
class Module:
    """The source of one module of jacobi_hf.

    Attributes:
        name: its dotted name without the package: "decoding.step".
        file: its file with the package: "jacobi_hf/decoding/step.py".
        text: its source.
    """

    name: str
    file: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.text)

    def place(self, node: ast.AST) -> str:
        """Return the file and line of a node, as an error shows them."""
        return f"{self.file}:{getattr(node, 'lineno', 0)}"

    def own_imports(self) -> list[ast.ImportFrom]:
        """Return the statements `from jacobi_hf.x.y import name` at the top of the module, in their order."""
        return [node for node in self.tree.body if isinstance(node, ast.ImportFrom) and _own_module(node)]

    def without_own_imports(self) -> str:
        """Return the source without the imports that one file does not need.

        These are the imports of jacobi_hf, `from __future__`, and the imports for type checkers.

        Raises:
            ValueError: the module imports from jacobi_hf in a form that one file cannot have.
        """
        own = self.own_imports()
        self._check_imports(own)
        dropped = [node for node in self.tree.body if node in own or _is_for_types(node) or _is_from_future(node)]
        lines = self.text.splitlines()
        for node in dropped:
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
        return re.sub(r"\n{3,}", "\n\n\n", "\n".join(lines)).strip() + "\n"

    def _check_imports(self, own: list[ast.ImportFrom]) -> None:
        unused = {id(node) for part in self.tree.body if _is_for_types(part) for node in ast.walk(part)}
        for node in ast.walk(self.tree):
            if id(node) in unused or not isinstance(node, ast.Import | ast.ImportFrom) or not _is_of_package(node):
                continue
            if node not in own or any(name.asname for name in node.names):
                raise ValueError(
                    f"{self.place(node)}: `{ast.unparse(node)}` does not work in {FOLDER}/generate.py. "
                    "Write `from jacobi_hf.module import name` at the top of the module, without `as`."
                )


def _modules() -> list[Module]:
    """Return the modules that decoding needs at run time, each after the modules that it imports."""
    found: dict[str, Module] = {}
    _visit(_ROOT, found, ())
    return list(found.values())


def _visit(name: str, found: dict[str, Module], importers: tuple[str, ...]) -> None:
    """Add a module to `found`, after the modules that it imports.

    Args:
        name: the module.
        found: the modules so far, by name.
        importers: the chain of modules through which `name` was reached.
    """
    if name in importers:
        circle = " -> ".join(f"{_PACKAGE}.{one}" for one in (*importers[importers.index(name) :], name))
        raise ValueError(f"These modules import each other, so they cannot become one file: {circle}.")
    if name in found:
        return
    module = _read(name, importers)
    for node in module.own_imports():
        _visit(_own_module(node), found, (*importers, name))
    found[name] = module


def _read(name: str, importers: tuple[str, ...]) -> Module:
    """Return a module's source; a package's is its `__init__.py`."""
    path = name.replace(".", "/")
    for file in (f"{path}.py", f"{path}/__init__.py"):
        source = resources.files(_PACKAGE).joinpath(file)
        if source.is_file():
            return Module(name, f"{_PACKAGE}/{file}", source.read_text(encoding="utf-8"))
    raise ValueError(f"{_PACKAGE}.{importers[-1]} imports {_PACKAGE}.{name}, which does not exist.")


def _own_module(node: ast.ImportFrom) -> str:
    """Return the module of jacobi_hf that a statement imports from, such as "decoding.step"; "" for other packages."""
    module = "" if node.level else node.module or ""
    return module.removeprefix(f"{_PACKAGE}.") if module.startswith(f"{_PACKAGE}.") else ""


def _is_of_package(node: Import) -> bool:
    """Return whether an import of any form reads from jacobi_hf."""
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").split(".")[0] == _PACKAGE
    return any(one.name.split(".")[0] == _PACKAGE for one in node.names)


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _is_from_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


@dataclass(frozen=True)
class Meaning:
    """What a global name stands for. Two meanings are equal if their `source` is.

    Attributes:
        source: the dotted name of the object: "jacobi_hf.config.JacobiConfig", "math.ceil".
        place: file and line that define or import it.
    """

    source: str
    place: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.source} ({self.place})"


def check_names(modules: Iterable[Module]) -> None:
    """Raise ValueError if a global name has two meanings in the modules, with both places.

    Args:
        modules: each after the modules that it imports.
    """
    meanings = {name: Meaning(f"builtins.{name}", "Python") for name in dir(builtins) if not name.startswith("__")}
    meanings[_ENTRY] = Meaning("the function that transformers calls", f"{FOLDER}/generate.py")
    exports: dict[str, dict[str, Meaning]] = {}
    for module in modules:
        exports[module.name] = global_names(module, exports)
        for name, meaning in exports[module.name].items():
            if meanings.setdefault(name, meaning) != meaning:
                raise ValueError(
                    f"`{name}` has two meanings: {meanings[name]} and {meaning}. "
                    f"{FOLDER}/generate.py holds both in one namespace. Rename one of them."
                )


def global_names(module: Module, exports: Mapping[str, Mapping[str, Meaning]]) -> dict[str, Meaning]:
    """Return the global names of a module and what each stands for.

    Args:
        module: the module.
        exports: the global names of the modules of jacobi_hf that it imports.

    Raises:
        ValueError: the module imports a name that the other module does not define.
    """
    collector = _GlobalNames(module, exports)
    collector.visit(module.tree)
    return collector.found


class _GlobalNames(ast.NodeVisitor):
    """Collector of the names that a module's top level binds, also inside its `if`, `try`, `for` and `with`."""

    def __init__(self, module: Module, exports: Mapping[str, Mapping[str, Meaning]]) -> None:
        self.module = module
        self.exports = exports
        self.found: dict[str, Meaning] = {}

    def visit_If(self, node: ast.If) -> None:
        if not _is_for_types(node):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for one in node.names:
            name = one.asname or one.name.split(".")[0]
            self.found[name] = Meaning(one.name if one.asname else name, self.module.place(node))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        own = _own_module(node)
        for one in node.names:
            if own:
                self.found[one.asname or one.name] = self._imported(node, own, one.name)
            else:
                source = f"{'.' * node.level}{node.module or ''}.{one.name}"
                self.found[one.asname or one.name] = Meaning(source, self.module.place(node))

    def _imported(self, node: ast.ImportFrom, module: str, name: str) -> Meaning:
        meaning = self.exports.get(module, {}).get(name)
        if meaning is None:
            raise ValueError(
                f"{self.module.place(node)}: `{name}` is not defined in {_PACKAGE}.{module}. "
                "Import names, not modules, from the module that defines them."
            )
        return meaning

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self._bind(node.name, node)

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_ClassDef = visit_FunctionDef

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._bind(node.id, node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Skip: a lambda has a scope of its own."""

    def visit_ListComp(self, node: ast.expr) -> None:
        """Skip: a comprehension has a scope of its own."""

    visit_SetComp = visit_ListComp
    visit_DictComp = visit_ListComp
    visit_GeneratorExp = visit_ListComp

    def _bind(self, name: str, node: ast.AST) -> None:
        self.found[name] = Meaning(f"{_PACKAGE}.{self.module.name}.{name}", self.module.place(node))


def _command(
    folder: Annotated[Path, typer.Argument(help="The repository's folder.")],
    drafter: Annotated[bool, typer.Option("--drafter", help="The repository holds a drafter.")] = False,
) -> None:
    """Write custom_generate/generate.py and custom_generate/requirements.txt into FOLDER."""
    for path in write_custom_generate(folder, "drafter" if drafter else "model"):
        typer.echo(path)


if __name__ == "__main__":
    typer.run(_command)
