"""The knobs of `JacobiConfig` as options of a verb."""

from __future__ import annotations

import functools
import inspect
import typing
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jacobi_hf.config import DECODINGS, JacobiConfig

if TYPE_CHECKING:
    from collections.abc import Callable


def with_knobs(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb an option for each knob; it is called with `knobs`, those that were given, by name."""
    options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=a) for name, a in _annotations().items()]
    hints = typing.get_type_hints(verb, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(verb).parameters.values() if p.name != "knobs"]

    @functools.wraps(verb)
    def with_options(**arguments: Any) -> None:
        given = {name: value for name in _annotations() if (value := arguments.pop(name)) is not None}
        verb(**arguments, knobs=given)

    with_options.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    return with_options


def _annotations() -> dict[str, Any]:
    allowed = ", ".join((*DECODINGS, "none"))
    annotations: dict[str, Any] = {
        "decoding": Annotated[str | None, typer.Option(help=f"{allowed}; as the model's generation config says, or {DECODINGS[1]}.")]
    }
    for knob in fields(JacobiConfig)[1:]:
        text = f"{knob.metadata['help']} (default {knob.default:g})."
        annotations[knob.name] = Annotated[type(knob.default) | None, typer.Option(help=text[0].upper() + text[1:])]
    return annotations
