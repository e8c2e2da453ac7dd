"""Options of the trainers, `TrainingArguments` of transformers among them.

Importing transformers' `TrainingArguments` takes seconds, since torch comes with it. Help texts and errors in options
need names, types and defaults alone. They are read from the source of the installed release.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import operator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jacobi_hf.trainer.method_options import METHODS

# Class of the arguments of each method; errors and help texts name it.
_CONFIGS = {"finetune": "JacobiForcingConfig", "drafter": "DrafterConfig"}
_TYPES = {"bool": bool, "dict": dict, "float": float, "int": int, "list": list[str], "None": None, "str": str}
# Releases before 5.23 have them under another name; jacobi_hf.integration.compat adds these.
_CHECKPOINTING = {"activation_checkpointing": bool | None, "activation_checkpointing_kwargs": dict | str | None}


@functools.cache
def of_method(method: str) -> type:
    """Return a dataclass with the options of a method, to read options with. The trainer's own config has checks too.

    Args:
        method: a key of `METHODS`.
    """
    return dataclasses.make_dataclass(_CONFIGS[method], [], bases=(METHODS[method], training_arguments()))


@functools.cache
def training_arguments() -> type:
    """Return a dataclass with the fields of `TrainingArguments` of the installed transformers, without its code.

    A default that is no literal counts as None. If the source cannot be read, return the class itself.
    """
    try:
        return _from_source()
    except (OSError, SyntaxError, ValueError):  # a build without sources
        from transformers import TrainingArguments

        return TrainingArguments


def _from_source() -> type:
    package = find_spec("transformers")
    folder = Path(package.origin or "").parent if package else Path()
    source = (folder / "training_args.py").read_text(encoding="utf-8")
    (found,) = (one for one in ast.parse(source).body if getattr(one, "name", "") == "TrainingArguments")
    assert isinstance(found, ast.ClassDef)
    fields = {field[0]: field for node in found.body if (field := _field(node))}
    added = {name: (name, hint, _option(None, {"help": None})) for name, hint in _CHECKPOINTING.items()}
    added = {name: field for name, field in added.items() if name not in fields}
    own_module = {"__module__": "transformers.training_args"}
    return dataclasses.make_dataclass("TrainingArguments", [*fields.values(), *added.values()], namespace=own_module)


def _field(node: ast.stmt) -> tuple[str, Any, Any] | None:
    """Return name, type and field of a line of a dataclass, or None if the line is no option."""
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
        return None
    values: dict[str | None, ast.expr | None] = {"default": node.value}
    if isinstance(node.value, ast.Call):
        values = {one.arg: one.value for one in node.value.keywords}
    if "ClassVar" in ast.unparse(node.annotation) or getattr(values.get("init"), "value", True) is False:
        return None
    metadata = values.get("metadata")
    entries = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    known = {"help": None} | {_literal(key): found for key, value in entries if (found := _literal(value)) is not None}
    return node.target.id, _type(node.annotation), _option(_literal(values.get("default")), known)


def _option(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _literal(node: ast.expr | None) -> Any:
    """Return the value of a literal, or None if the expression is none."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _type(node: ast.expr) -> Any:
    """Return the type of an annotation; a class that is not built in counts as text."""
    if isinstance(node, ast.BinOp):
        return functools.reduce(operator.or_, (_type(node.left), _type(node.right)))
    name = node.value if isinstance(node, ast.Subscript) else node
    return _TYPES.get(ast.unparse(name), str)
