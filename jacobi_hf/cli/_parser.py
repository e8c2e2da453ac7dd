"""The parser of a verb's options and its help text.

transformers' `HfArgumentParser` does the same, but importing it takes longer than an error in the options should.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
import types
import typing
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from jacobi_hf.cli._options import ARGUMENT, FLAG, REQUIRED, ROLE, SEVERAL, SWITCH
from jacobi_hf.io import parse_json_object

if TYPE_CHECKING:
    from collections.abc import Sequence
    from dataclasses import Field


# Metadata of a field that argparse reads.
_OF_ARGPARSE = ("choices", "const", "nargs")
_TRUE = ("yes", "true", "t", "y", "1")
_FALSE = ("no", "false", "f", "n", "0")


def shown_name(name: str) -> str:
    """Return an option as help texts and errors write it."""
    return f"--{name.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    """A parser of dataclasses. It raises errors without the usage, which would be a list of 150 options.

    Args:
        kinds: dataclasses, whose fields become options.
        options: arguments of `ArgumentParser`.
    """

    def __init__(self, kinds: Sequence[type], **options: Any) -> None:
        super().__init__(add_help=False, allow_abbrev=False, **options)
        for kind in kinds:
            hints = typing.get_type_hints(kind)
            for one in fields(kind):
                if one.init:
                    self._add(one, hints[one.name])

    def _add(self, one: Field[Any], hint: Any) -> None:
        """Add the option of a field."""
        names = dict.fromkeys((shown_name(one.name), f"--{one.name}"))
        text = one.metadata.get("help")
        role = one.metadata.get(ROLE)
        if role == FLAG:
            self.add_argument(*names, dest=one.name, action="store_true", help=text)
        elif role == SWITCH:
            self.add_argument(*names, dest=one.name, action=argparse.BooleanOptionalAction, help=text)
        elif role == SEVERAL:
            self.add_argument(*names, dest=one.name, action="append", default=argparse.SUPPRESS, help=text)
        elif role != ARGUMENT:
            default = one.default if one.default_factory is MISSING else one.default_factory()
            given = {name: one.metadata[name] for name in _OF_ARGPARSE if name in one.metadata}
            value = {"default": default, **_value_of(hint, default), **given}
            self.add_argument(*names, dest=one.name, help=text, **value)
            if default is True:
                opposite = (shown_name(f"no_{one.name}"), f"--no_{one.name}")
                self.add_argument(*opposite, dest=one.name, action="store_false", default=True, help=text)

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}.")


def _value_of(hint: Any, default: Any) -> dict[str, Any]:
    """Return how argparse reads the value of an option of a type.

    A union of `str`, None and other types is read as text, one of `str` and another type as that type.

    Args:
        hint: the type, or None or another type beside it.
        default: the default. A truth value may be given without a value, unless its default is None.
    """
    members = typing.get_args(hint) if _is_union(hint) else (hint,)
    others = [one for one in members if one not in (str, type(None))]
    kind = str if not others or (str in members and type(None) in members) else others[0]
    if bool in members:
        read = _bool_or_text if str in members else string_to_bool
        return {"type": read} | ({} if default is None and hint is not bool else {"nargs": "?", "const": True})
    if typing.get_origin(kind) is list:
        no_text = {"default": None} if isinstance(default, str) else {}  # argparse would read it as an item
        return {"type": typing.get_args(kind)[0], "nargs": "+", **no_text}
    if kind is dict or typing.get_origin(kind) is dict:
        return {"type": _mapping}
    return {"type": kind if kind in (int, float) else str}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def string_to_bool(text: str) -> bool:
    """Return the truth value that a word of the command line stands for."""
    if text.lower() not in (*_TRUE, *_FALSE):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in _TRUE


def _bool_or_text(text: str) -> bool | str:
    return string_to_bool(text) if text.lower() in (*_TRUE, *_FALSE) else text


def _mapping(text: str) -> dict[str, Any]:
    try:
        return parse_json_object(text, "the value")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removesuffix(".")) from None


# What help texts show for the value of an option, by the name of the function that reads it.
_TAKES = {
    "string_to_bool": "[true|false]",
    "_bool_or_text": "[true|false|TEXT]",
    "_mapping": "JSON",
    "int": "INT",
    "float": "FLOAT",
}


class _Help(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [textwrap.fill(" ".join(one.split()), width) for one in text.split("\n\n")]
        return "\n\n".join(paragraphs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return action.dest
        names = [name for name in action.option_strings if "_" not in name]
        kind = getattr(action.type, "__name__", "")
        takes = _TAKES.get(kind, "" if action.nargs == 0 else "TEXT")
        more = " .." if action.nargs == "+" else ""
        return f"{', '.join(names)} {takes}{more}".strip()

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = (
            action.default in (None, "", [], {}, argparse.SUPPRESS)
            or action.nargs == 0
            or "%(default)" in (action.help or "")
        )
        default = "" if silent else " (default: %(default)s)"
        return (action.help or "") + default


def help_of(verb: str, text: str, kinds: Sequence[type]) -> str:
    """Return the help text of a verb.

    Options that only one of several alternative dataclasses has follow the others; those that transformers declares
    come last.
    """
    known = {one.name: one for kind in kinds for one in fields(kind) if one.init}
    arguments = [one for one in known.values() if one.metadata.get(ROLE) == ARGUMENT]
    words = "".join(
        f" {one.name.upper()}" if one.metadata[REQUIRED] else f" [{one.name.upper()}]" for one in arguments
    )
    parser = Parser(
        kinds,
        formatter_class=_Help,
        description=text,
        usage=f"jacobi-hf {verb}{words} [--config RECIPE.yaml] [--name value ..]",
        conflict_handler="resolve",  # alternative dataclasses share fields
    )
    parser._optionals.title = "options (with - or _ between words)"
    order = list(known)
    parser._optionals._group_actions.sort(key=lambda action: order.index(action.dest))
    if arguments:
        group = parser.add_argument_group("arguments")
        for one in arguments:
            group.add_argument(one.name.upper(), help=one.metadata["help"], nargs="?")
        parser._action_groups.insert(0, parser._action_groups.pop())
    names = {kind: {one.name for one in fields(kind)} for kind in kinds}
    for kind in kinds:
        others = set().union(*(names[other] for other in kinds if other is not kind))
        if others & names[kind]:
            _move(parser, names[kind] - others, f"options of {kind.__name__}")
    for kind in kinds:
        for base in kind.__mro__:
            if base.__module__.startswith("transformers.") and dataclasses.is_dataclass(base):
                own = {name for cls in kind.__mro__ if not issubclass(base, cls) for name in cls.__annotations__}
                _move(parser, {one.name for one in fields(base)} - own, f"options of {base.__name__}")
    return str(parser.format_help())


def _move(parser: argparse.ArgumentParser, names: set[str], title: str) -> None:
    """Move the options of these names to a group of their own, if there are any."""
    main = parser._optionals
    moved = [action for action in main._group_actions if action.dest in names]
    if moved:
        parser.add_argument_group(title)._group_actions += moved
        main._group_actions = [action for action in main._group_actions if action not in moved]
