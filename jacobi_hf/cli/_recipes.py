"""Verbs whose arguments are dataclasses: the same names in Python, in a recipe's section and on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from transformers import HfArgumentParser

from jacobi_hf.cli._options import section_of
from jacobi_hf.io import parse_json_object
from jacobi_hf.trainer.options import RENAMED, option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass
class Invocation:
    """What such verbs take besides."""

    config: str | None = option(
        None, "YAML file with a section for this verb; what the command line says comes before it."
    )
    json: bool = option(False, "Print the result as one JSON document and nothing else.")


@dataclass
class Given:
    """What a verb was given.

    Attributes:
        verb: its name.
        section: its section of the recipe.
        words: the rest of the command line.
        as_json: whether the result is for a program.
        kinds: all dataclasses that the verb may take.
    """

    verb: str
    section: dict[str, Any]
    words: list[str]
    as_json: bool
    kinds: tuple[type, ...] = ()

    def parse(self, *kinds: type, more: Mapping[str, Any] | None = None) -> Any:
        """Dataclasses of these kinds; `more` comes before the recipe's section."""
        return parse(kinds, {**self.section, **(more or {})}, self.words, self.verb, self.kinds)

    def value_of(self, name: str, default: str) -> str:
        """Return the value of one option before the others are read: of the command line, the recipe, or the default."""
        parser = _Parser((), add_help=False, allow_abbrev=False)
        parser.add_argument(f"--{name}", default=str(self.section.get(name, default)))
        return str(getattr(parser.parse_known_args(self.words)[0], name))


def given(context: typer.Context, *kinds: type) -> Given:
    """The recipe's section and the command line of a verb; ends the program where help is asked for.

    Raises:
        ValueError: there is no such recipe, or no such section in it.
    """
    verb, words = str(context.info_name), list(context.args)
    if {"--help", "-h"}.intersection(words):
        typer.echo(_help(verb, str(context.command.help), kinds))
        raise typer.Exit
    own, words = _Parser((Invocation,), add_help=False, allow_abbrev=False).parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    return Given(verb, section_of(Path(own.config), verb) if own.config else {}, words, own.json, kinds)


def parse(
    kinds: Sequence[type],
    section: Mapping[str, Any],
    words: Sequence[str],
    verb: str,
    all_kinds: Sequence[type] = (),
) -> tuple[Any, ...]:
    """Dataclasses from a recipe's section and the command line, which comes first; both are read alike.

    Args:
        kinds: the dataclasses.
        section: the recipe's section.
        words: the command line.
        verb: the verb's name, for errors.
        all_kinds: all dataclasses that the verb may take, so that an error can name the one that an option belongs to.

    Raises:
        ValueError: a name that is unknown, with the nearest one; a value that cannot be.
    """
    hints = {f.name: typing.get_type_hints(kind)[f.name] for kind in kinds for f in fields(kind) if f.init}
    renamed = RENAMED.get(verb, {})
    for name in section:
        if name in renamed:
            raise ValueError(f"the recipe's section {verb!r} has {name!r}, which is now {renamed[name]!r}.")
        if name not in hints:
            raise ValueError(
                f"the recipe's section {verb!r} has {name!r}, which is no option of {verb}"
                f"{_elsewhere(str(name), kinds, all_kinds) or _nearest(str(name), hints)}"
            )
    parser = _Parser(tuple(kinds), add_help=False, allow_abbrev=False)
    parser.set_defaults(**{name: _as_word(name, value, hints[name]) for name, value in section.items()})
    *configs, rest = parser.parse_args_into_dataclasses(
        list(words), return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        name = rest[0].split("=")[0]
        if not name.startswith("--"):
            raise ValueError(f"{name!r} belongs to no option; options are written as --name value.")
        plain = name.removeprefix("--").replace("-", "_")
        if plain in renamed:
            raise ValueError(f"{name} is now --{renamed[plain]}.")
        close = _elsewhere(plain, kinds, all_kinds) or _nearest(plain, hints, "--")
        raise ValueError(f"{name} is no option of {verb}{close}")
    return tuple(configs)


def demand(config: Any, verb: str, *names: str) -> None:
    """Fail before any work where a field is missing that the verb cannot do without."""
    if missing := [name for name in names if not getattr(config, name)]:
        raise ValueError(
            f"{', '.join(missing)} missing: give {'it' if len(missing) == 1 else 'them'} in the recipe's section {verb!r} "
            f"or on the command line (--{missing[0]} ..)."
        )


class _Parser(HfArgumentParser):
    """Reads dataclasses; what is wrong is raised rather than printed among the usage of 150 options."""

    def __init__(self, kinds: tuple[type, ...], **options: Any) -> None:
        super().__init__(kinds, **options)
        for action in self._actions:
            if typing.get_origin(action.type) is dict:
                action.type = _mapping

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}.")


def _mapping(text: str) -> dict[str, Any]:
    try:
        return parse_json_object(text, "the value")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removesuffix(".")) from None


def _as_word(name: str, value: Any, hint: Any) -> Any:
    """A recipe's value as the command line would have it, so that it is checked the same: 2.5 is no whole number."""
    if value is None and type(None) not in typing.get_args(hint):
        raise ValueError(f"{name} is empty in the recipe: give a value, or leave it out.")
    if isinstance(value, list):
        if "list" not in str(hint):
            raise ValueError(f"{name} takes one value; the recipe has {value!r}.")
        return [str(one) for one in value]
    if isinstance(value, dict):
        return json.dumps(value)
    return None if value is None else str(value)


def _nearest(name: str, known: Mapping[str, Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {prefix}{close[0]}?" if close else "."


def _elsewhere(name: str, kinds: Sequence[type], all_kinds: Sequence[type]) -> str | None:
    """Return the end of an error for an option of a dataclass that is not used; None if no dataclass has the option."""
    owners = [kind.__name__ for kind in all_kinds if name in {f.name for f in fields(kind)}]
    used = ", ".join(kind.__name__ for kind in kinds)
    return f" with {used}: it belongs to {owners[0]}." if owners else None


class _Help(argparse.HelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "")
        takes = {"string_to_bool": "[true|false]", "_mapping": "JSON", "int": "INT", "float": "FLOAT"}.get(
            kind, "TEXT" if kind else ""
        )
        more = " .." if action.nargs == "+" else ""
        return f"{action.option_strings[0]} {takes}{more}".strip()

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, "", [], {}) or action.nargs == 0 or "%(default)" in (action.help or "")
        default = "" if silent else " (default: %(default)s)"
        return (action.help or "") + default


def _help(verb: str, text: str, kinds: Sequence[type]) -> str:
    """Return the help text, with options of one dataclass alone after those of all, and transformers' own last."""
    parser = _Parser(
        (Invocation, *kinds),
        add_help=False,
        formatter_class=_Help,
        description=text,
        usage=f"jacobi-hf {verb} [--config RECIPE.yaml] [--name value ..]",
        conflict_handler="resolve",  # of dataclasses that share fields, of which a call uses one
    )
    parser._optionals.title = "options (with - or _ between words)"
    names = {kind: {f.name for f in fields(kind)} for kind in kinds}
    for kind in kinds:
        others = set().union(*(names[other] for other in kinds if other is not kind))
        if others & names[kind]:
            _move(parser, names[kind] - others, f"options of {kind.__name__}")
    for kind in kinds:
        for base in kind.__mro__:
            if base.__module__.startswith("transformers.") and dataclasses.is_dataclass(base):
                own = {name for cls in kind.__mro__ if not issubclass(base, cls) for name in cls.__annotations__}
                _move(parser, {f.name for f in fields(base)} - own, f"options of {base.__name__}")
    return str(parser.format_help())


def _move(parser: argparse.ArgumentParser, names: set[str], title: str) -> None:
    """Move the options of these names to a group of their own, if any are left."""
    main = parser._optionals
    moved = [action for action in main._group_actions if action.dest in names]
    if moved:
        parser.add_argument_group(title)._group_actions += moved
        main._group_actions = [action for action in main._group_actions if action not in moved]
