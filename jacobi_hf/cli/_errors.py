"""How verbs end: errors in one line, and what a verb needs before it starts."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import traceback
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from safetensors import SafetensorError
from typer.exceptions import TyperException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WITH_TRACEBACK = ContextVar("WITH_TRACEBACK", default=False)  # set by `jacobi-hf --traceback`


@dataclass
class Ending:
    """Message of an interrupted verb.

    Attributes:
        kept: Returns what is kept and how to go on. It is called when the verb is interrupted.
    """

    kept: Callable[[], str] = lambda: "nothing is kept"


@contextlib.contextmanager
def errors_in_one_line(verb: str) -> Iterator[Ending]:
    """End the program with one line if something inside raises.

    The exit code is 2 for bad input, 130 for an interruption and 1 for anything else. After `jacobi-hf --traceback
    VERB`, a traceback is printed before the line.
    """
    ending = Ending()
    try:
        yield ending
    except (OSError, ValueError, SafetensorError) as error:
        _end(verb, " ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        typer.echo(f"jacobi-hf {verb}: interrupted; {ending.kept()}.", err=True)
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort, TyperException):
        raise
    except Exception as error:  # noqa: BLE001  (--traceback shows it)
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _end(verb, f"{message} (jacobi-hf --traceback {verb} .. shows where)", 1)


def _end(verb: str, message: str, code: int) -> None:
    if WITH_TRACEBACK.get():
        traceback.print_exc()
    typer.echo(f"jacobi-hf {verb}: {message}", err=True)
    raise typer.Exit(code) from None


def need(extra: str, *modules: str) -> None:
    """Raise `ValueError` if modules of an extra of this package are not installed."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise ValueError(f"this needs {', '.join(missing)}: pip install 'jacobi-hf[{extra}]'")


def check_folder(path: str | Path) -> None:
    """Raise `ValueError` if a folder can be neither written to nor made."""
    folder = Path(path).absolute()
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir():
        raise ValueError(f"{path} cannot be a folder: {nearest} is a file.")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{path} cannot be written: {nearest} is not writable; choose another folder.")


def check_file(path: str | Path) -> None:
    """Raise `ValueError` if a file cannot be written, because it is a folder or its folder cannot be written to."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give the file that the results go to.")
    check_folder(Path(path).parent)
