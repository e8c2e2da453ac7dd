"""The parser of a verb's options and its help text, on top of transformers' `HfArgumentParser`."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
import typing
from dataclasses import field, fields, make_dataclass
from typing import TYPE_CHECKING, Any

from transformers import HfArgumentParser

from jacobi_hf.cli._options import ARGUMENT, FLAG, HIGH, LOW, REQUIRED, ROLE, SEVERAL, SWITCH
from jacobi_hf.io import parse_json_object

if TYPE_CHECKING:
    from collections.abc import Sequence
    from dataclasses import Field


def shown_name(name: str) -> str:
    """Return an option as help texts and errors write it."""
    return f"--{name.replace('_', '-')}"


class Parser(HfArgumentParser):
    """A parser of dataclasses. It raises errors without the usage, which would be a list of 150 options."""

    def __init__(self, kinds: Sequence[type], **options: Any) -> None:
        super().__init__([_plain(kind) for kind in kinds], add_help=False, allow_abbrev=False, **options)
        for action in self._actions:
            if typing.get_origin(action.type) is dict:
                action.type = _mapping
        for one in (one for kind in kinds for one in fields(kind)):
            names = dict.fromkeys((shown_name(one.name), f"--{one.name}"))
            text = one.metadata.get("help")
            if one.metadata.get(ROLE) == FLAG:
                self.add_argument(*names, dest=one.name, action="store_true", help=text)
            elif one.metadata.get(ROLE) == SWITCH:
                self.add_argument(*names, dest=one.name, action=argparse.BooleanOptionalAction, help=text)
            elif one.metadata.get(ROLE) == SEVERAL:
                self.add_argument(*names, dest=one.name, action="append", default=argparse.SUPPRESS, help=text)

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}.")


def _plain(kind: type) -> type:
    """Return a dataclass with the fields of another that have no role, for `HfArgumentParser`."""
    hints = typing.get_type_hints(kind)
    plain = [one for one in fields(kind) if one.init and ROLE not in one.metadata]
    return make_dataclass(kind.__name__, [(one.name, hints[one.name], _copy(one)) for one in plain], kw_only=True)


def _copy(one: Field[Any]) -> Any:
    """Return a copy of a field without the metadata that `HfArgumentParser` does not know."""
    metadata = {key: value for key, value in one.metadata.items() if key not in (LOW, HIGH, REQUIRED)}
    return field(default=one.default, default_factory=one.default_factory, metadata=metadata)


def _mapping(text: str) -> dict[str, Any]:
    try:
        return parse_json_object(text, "the value")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removesuffix(".")) from None


class _Help(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [textwrap.fill(" ".join(one.split()), width) for one in text.split("\n\n")]
        return "\n\n".join(paragraphs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return action.dest
        names = [name for name in action.option_strings if "_" not in name]
        kind = getattr(action.type, "__name__", "")
        takes = {"string_to_bool": "[true|false]", "_mapping": "JSON", "int": "INT", "float": "FLOAT"}.get(
            kind, "" if action.nargs == 0 else "TEXT"
        )
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
