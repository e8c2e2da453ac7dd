"""Options of the verbs: dataclass fields with a help text, which a recipe and the command line set by name.

Verbs import heavy libraries after they have read their options. This module imports none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import typer  # noqa: TC002  (typer reads the annotation)

from jacobi_hf.cli._errors import errors_in_one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jacobi_hf.cli._recipes import Call

# Keys of a field's metadata, besides "help".
ROLE = "role"
LOW = "low"
HIGH = "high"
REQUIRED = "required"

# Roles of fields that are more than an option with a value.
ARGUMENT = "argument"
FLAG = "flag"
SWITCH = "switch"
SEVERAL = "several"


def option(default: Any, text: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Return a field that is an option with a value.

    Args:
        default: Value if the option is not given.
        text: Help text.
        low, high: Least and greatest value of a number.
    """
    return field(default=default, metadata={"help": text, LOW: low, HIGH: high})


def required(text: str) -> Any:
    """Return a field that is an option with a value, without which the verb does not start."""
    return field(default="", metadata={"help": f"{text} Required.", REQUIRED: True})


def argument(text: str, *, optional: bool = False) -> Any:
    """Return a field that is a word of the command line without `--name` before it."""
    return field(default=None if optional else "", metadata={"help": text, ROLE: ARGUMENT, REQUIRED: not optional})


def flag(text: str) -> Any:
    """Return a field that is true if `--name` is given and false otherwise."""
    return field(default=False, metadata={"help": text, ROLE: FLAG})


def switch(text: str) -> Any:
    """Return a field that is true after `--name`, false after `--no-name`, and None otherwise."""
    return field(default=None, metadata={"help": text, ROLE: SWITCH})


def several(text: str) -> Any:
    """Return a field that is a list of strings, one for each time that `--name` is given."""
    return field(default_factory=list, metadata={"help": f"{text}; may be given several times.", ROLE: SEVERAL})


@dataclass
class Options:
    """Base of the verbs' options, which checks the ranges of numbers.

    Raises:
        ValueError: A number is out of range.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            value, low, high = getattr(self, one.name), one.metadata.get(LOW), one.metadata.get(HIGH)
            if value is not None and low is not None and value < low:
                raise ValueError(f"{one.name}={value} must be at least {low}.")
            if value is not None and high is not None and value > high:
                raise ValueError(f"{one.name}={value} must be at most {high}.")


@dataclass
class ModelOptions(Options):
    """Options of verbs that load a model."""

    model: str = required("Model name or folder.")
    drafter: str | None = option(None, "Folder or Hub repository of a drafter to decode with.")
    dtype: str = option("auto", "auto (as the weights are), float32, bfloat16 or float16.")


@dataclass
class Sampling:
    """Options of how tokens are chosen. None leaves an option to the model's generation config.

    Raises:
        ValueError: A value is out of range, or sampling is both requested and refused.
    """

    do_sample: bool | None = switch(
        "Sample, or take the likeliest token. The default is that of the model's generation config."
    )
    temperature: float | None = option(None, "Sample at this temperature.")
    top_p: float | None = option(None, "Sample from the likeliest tokens that have this probability together.")
    top_k: int | None = option(None, "Sample from so many of the likeliest tokens; 0 is all.")

    def __post_init__(self) -> None:
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature={self.temperature} cannot be used; it must be above 0. --no-do-sample is greedy."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} cannot be used; it must be above 0 and at most 1.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} cannot be used; it must be at least 0.")
        if self.do_sample is False and self._given:
            names = ", ".join(self._given)
            raise ValueError(
                f"{names} given with --no-do-sample, which takes the likeliest token: drop one of the two."
            )

    @property
    def _given(self) -> list[str]:
        return [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]

    def arguments(self, model: Any) -> dict[str, Any]:
        """Return arguments of the model's `generate`. `do_sample` is always one of them."""
        if self._given:
            return {"do_sample": True, **{name: getattr(self, name) for name in self._given}}
        return {"do_sample": bool(model.generation_config.do_sample) if self.do_sample is None else self.do_sample}


def verb(kinds: Callable[[], Sequence[type]], *, json: bool = False) -> Callable[[Callable[[Call], None]], Any]:
    """Return a decorator that makes a function a verb of the command line.

    The verb reads its recipe and its command line, calls the function, and ends in one line if something raises.

    Args:
        kinds: Returns the dataclasses of the verb's options. It is called when the verb runs, for its
            help text too, so it imports neither torch nor transformers.
        json: Whether the verb has the option `--json`.
    """

    def decorate(function: Callable[[Call], None]) -> Any:
        def run(context: typer.Context) -> None:
            with errors_in_one_line(str(context.info_name)) as ending:
                from jacobi_hf.cli._recipes import read_call

                function(read_call(context, kinds(), ending, json=json))

        run.__name__ = function.__name__.rstrip("_")
        run.__doc__ = function.__doc__
        run.kinds = kinds  # type: ignore[attr-defined]
        return run

    return decorate
