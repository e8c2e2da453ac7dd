"""What verbs share: the knobs as options, recipes, JSON from outside, errors in one line."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import inspect
import os
import traceback
import typing
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from safetensors import SafetensorError
from typer.exceptions import TyperException

from jacobi_hf.config import DECODINGS, JacobiConfig
from jacobi_hf.io import read_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def with_knobs(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb an option for each knob; it is called with `knobs`, those that were given, by name."""
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=a)
        for name, a in _annotations().items()
    ]
    hints = typing.get_type_hints(verb, include_extras=True)
    own = [
        p.replace(annotation=hints[p.name]) for p in inspect.signature(verb).parameters.values() if p.name != "knobs"
    ]

    @functools.wraps(verb)
    def with_options(**arguments: Any) -> None:
        given = {name: value for name in _annotations() if (value := arguments.pop(name)) is not None}
        verb(**arguments, knobs=given)

    with_options.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    return with_options


def _annotations() -> dict[str, Any]:
    allowed = ", ".join((*DECODINGS, "none"))
    annotations: dict[str, Any] = {
        "decoding": Annotated[
            str | None, typer.Option(help=f"{allowed}; as the model's generation config says, or {DECODINGS[1]}.")
        ]
    }
    for knob in fields(JacobiConfig)[1:]:
        text = f"{knob.metadata['help']} (default {knob.default:g})."
        annotations[knob.name] = Annotated[type(knob.default) | None, typer.Option(help=text[0].upper() + text[1:])]
    return annotations


WITH_TRACEBACK = ContextVar("WITH_TRACEBACK", default=False)  # what `jacobi-hf --traceback` says


@dataclass
class Ending:
    """What is said when a verb is interrupted.

    Attributes:
        kept: what is kept, and how to go on; asked for at that moment.
    """

    kept: Callable[[], str] = lambda: "nothing is kept"


@contextlib.contextmanager
def errors_in_one_line(verb: str) -> Iterator[Ending]:
    """End the program with one line: with exit code 2 where bad input raises, 130 where it is interrupted, 1 for anything else.

    With `jacobi-hf --traceback VERB`, the line comes behind where it was raised.
    """
    ending = Ending()
    try:
        yield ending
    except (OSError, ValueError, SafetensorError) as error:
        if WITH_TRACEBACK.get():
            traceback.print_exc()
        typer.echo(f"jacobi-hf {verb}: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"jacobi-hf {verb}: interrupted; {ending.kept()}.", err=True)
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort, TyperException):
        raise
    except Exception as error:  # noqa: BLE001  (--traceback shows it)
        if WITH_TRACEBACK.get():
            traceback.print_exc()
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        typer.echo(f"jacobi-hf {verb}: {said} (jacobi-hf --traceback {verb} .. shows where)", err=True)
        raise typer.Exit(1) from None


def need(extra: str, *modules: str) -> None:
    """Raise `ValueError` where packages of an extra are missing."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise ValueError(f"this needs {', '.join(missing)}: pip install 'jacobi-hf[{extra}]'")


def check_folder(path: str | Path) -> None:
    """Raise `ValueError` where a folder cannot be written into or made."""
    folder = Path(path).absolute()
    there = next(f for f in (folder, *folder.parents) if f.exists())
    if not there.is_dir():
        raise ValueError(f"{path} cannot be a folder: {there} is a file.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{path} cannot be written: {there} is not writable; choose another folder.")


def recipe_option(*mappings: str) -> Any:
    """The option `--config`: a recipe's section for the verb, which holds defaults of the other options.

    Args:
        mappings: names that a section may hold besides, each a mapping, which no option could be; see `mapping`.
    """

    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            with errors_in_one_line(str(context.info_name)):
                _take_section(context, path, mappings)
        return path

    text = "YAML file with a section for this verb; what the command line says comes before it."
    return typer.Option(help=text, callback=read, is_eager=True)


def _take_section(context: typer.Context, path: Path, mappings: Sequence[str]) -> None:
    """Make a recipe's section the defaults of a verb's options, which it names as the command line does."""
    verb = str(context.info_name)
    where = f"{path}, section {verb!r}"
    options = {_in_recipes(p): p for p in context.command.params if p.name != "config"}
    context.default_map = {}
    for name, value in section_of(path, verb).items():
        if name not in options and name not in mappings:
            close = difflib.get_close_matches(str(name), [*options, *mappings], 1)
            raise ValueError(
                f"{where}: {name!r} is no option of {verb}{f'; did you mean {close[0]!r}?' if close else '.'}"
            )
        if (name in mappings) != isinstance(value, dict):
            wanted = "settings by name" if name in mappings else "a value"
            raise ValueError(f"{where}: {name!r} has to hold {wanted}; it is {value!r}.")
        if name in mappings:
            context.meta[name] = value
        elif name == "decoding" and value is None:
            raise ValueError(f"{where}: decoding is empty. Ordinary decoding is written none; or leave it out.")
        else:
            context.default_map[str(options[name].name)] = _as_typed(value, options[name])


def _in_recipes(option: Any) -> str:
    return str(option.opts[0]).removeprefix("--").replace("-", "_")


def mapping(context: typer.Context, name: str) -> dict[str, Any]:
    """A mapping of the recipe; empty where there is none."""
    found: dict[str, Any] = context.meta.get(name, {})
    return found


def section_of(path: Path, section: str) -> dict[str, Any]:
    """A section of a recipe.

    Raises:
        ValueError: there is no such file, it is no YAML, or has no such section with options by name.
    """
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is no recipe: it has to hold sections by name, such as {section!r}.")  # noqa: TRY004  (of a file)
    found = recipe.get(section)
    if not isinstance(found, dict):
        there = ", ".join(map(str, recipe)) or "none"
        raise ValueError(f"{path} has no section {section!r} with options by name; it has {there}.")  # noqa: TRY004
    return found


def _as_typed(value: Any, option: Any) -> Any:
    """A value as the command line would have it, so that it is checked the same: 2.5 is no whole number, and neither is true."""
    several = getattr(option, "multiple", False)
    if isinstance(value, list):
        return [str(one) for one in value] if several else ",".join(map(str, value))
    if value is None or (isinstance(value, bool) and getattr(option, "is_flag", False)):
        return value
    return [str(value)] if several else str(value)
