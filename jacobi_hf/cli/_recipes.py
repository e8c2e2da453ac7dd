"""Reading of a verb's options from a recipe and the command line, which use the same names and checks."""

from __future__ import annotations

import difflib
import json
import re
import typing
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import typer

from jacobi_hf.cli._options import ARGUMENT, FLAG, REQUIRED, ROLE, SEVERAL, SWITCH, flag, option
from jacobi_hf.cli._parser import Parser, help_of, shown_name
from jacobi_hf.io import read_yaml
from jacobi_hf.trainer.options import RENAMED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from dataclasses import Field
    from pathlib import Path

    from jacobi_hf.cli._errors import Ending


@dataclass
class WithConfig:
    """Options that every verb has."""

    config: str | None = option(
        None, "YAML file with a section for this verb; what the command line says comes before it."
    )


@dataclass
class WithJson(WithConfig):
    """Options of verbs whose result a program may want to read."""

    json: bool = flag("Print the result as one JSON document and nothing else.")


@dataclass
class Call:
    """One call of a verb: its recipe and its command line, whose options are not yet checked.

    Attributes:
        verb: Name of the verb.
        kinds: Dataclasses of its options, all that it may use.
        recipe: Path of the recipe, or None.
        section: Its section of the recipe.
        line: The words of the command line after the verb.
        words: Those of them that are not `--config` or `--json`.
        as_json: Whether the result is for a program.
        ending: Message of an interruption.
    """

    verb: str
    kinds: Sequence[type]
    recipe: str | None
    section: dict[str, Any]
    line: list[str]
    words: list[str]
    as_json: bool
    ending: Ending

    def parse(self, *kinds: type, more: Mapping[str, Any] | None = None) -> Any:
        """Return the dataclasses of the options.

        Args:
            kinds: The dataclasses that this call uses; all of the verb if not given.
            more: Options in the form of a recipe's section, which come before that section.

        Raises:
            ValueError: An option is unknown, missing, or has a value that it cannot have.
        """
        section = {**self.section, **(more or {})}
        return parse(kinds or self.kinds, section, self.words, self.verb, self.kinds, self.recipe)

    def value_of(self, name: str, default: str) -> str:
        """Return the value of one option without reading the others."""
        parser = Parser(())
        parser.add_argument(f"--{name}", default=str(self.section.get(name, default)))
        return str(getattr(parser.parse_known_args(self.words)[0], name))


def read_call(context: typer.Context, kinds: Sequence[type], ending: Ending, *, json: bool) -> Call:
    """Return what a verb was given. For `--help`, print the help text and end the program.

    Raises:
        ValueError: The recipe cannot be read, or has no section for the verb.
    """
    verb = str(context.info_name)
    common = WithJson if json else WithConfig
    if {"--help", "-h"}.intersection(context.args):
        typer.echo(help_of(verb, str(context.command.help), (*kinds, common)))
        raise typer.Exit
    words, after = _split(context.args)
    found, rest = Parser((common,)).parse_known_args(words)
    section = section_of(found.config, verb) if found.config else {}
    return Call(
        verb,
        kinds,
        recipe=found.config,
        section=section,
        line=list(context.args),
        words=[*rest, *after],
        as_json=getattr(found, "json", False),
        ending=ending,
    )


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before "--", which may be options, and the others from "--" on."""
    end = list(words).index("--") if "--" in words else len(words)
    return list(words[:end]), list(words[end:])


def parse(
    kinds: Sequence[type],
    section: Mapping[str, Any],
    words: Sequence[str],
    verb: str,
    all_kinds: Sequence[type] = (),
    recipe: str | None = None,
) -> tuple[Any, ...]:
    """Return dataclasses with values of a recipe's section and of the command line, which comes first.

    Args:
        kinds: The dataclasses. Names of fields are names of options.
        section: The recipe's section.
        words: The command line.
        verb: Name of the verb, for errors.
        all_kinds: All dataclasses that the verb may use, so that an error can name the owner of an option.
        recipe: Path of the recipe, for errors.

    Raises:
        ValueError: A name is unknown (the error says the nearest one), missing, or has a value that it cannot have.
    """
    known = {one.name: one for kind in kinds for one in fields(kind) if one.init}
    hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    where = f"{recipe}, section {verb!r}" if recipe else f"the recipe's section {verb!r}"
    hint = _Hint(verb, kinds, all_kinds)
    _check_names(section, known, hint, where)
    given = {name: _as_word(known[name], value, hints[name], where) for name, value in section.items()}
    parser = Parser(kinds)
    own = (ARGUMENT, SEVERAL)  # these replace a recipe's value rather than having it as their default
    parser.set_defaults(**{name: value for name, value in given.items() if known[name].metadata.get(ROLE) not in own})
    words, after = _split(words)
    found, rest = parser.parse_known_args(words)
    values = _arguments([*_without_options(rest, hint), *after[1:]], known) | vars(found)
    values |= {name: value for name, value in given.items() if values.get(name) is None}
    _check_required(values, known, verb)
    return tuple(_made(kind, values) for kind in kinds)


def _made(kind: type, values: Mapping[str, Any]) -> Any:
    """Return a dataclass with those of the values that are its fields."""
    names = [one.name for one in fields(kind) if one.init]
    return kind(**{name: values[name] for name in names if name in values})


@dataclass(frozen=True)
class _Hint:
    """Texts of errors about unknown options of a verb.

    Attributes:
        verb: Name of the verb.
        kinds: Dataclasses that a call uses.
        all_kinds: All dataclasses that the verb may use.
    """

    verb: str
    kinds: Sequence[type]
    all_kinds: Sequence[type]

    def renamed(self, name: str) -> str | None:
        """Return the new name of a renamed option."""
        return RENAMED.get(self.verb, {}).get(name)

    def unknown(self, name: str, show: Callable[[str], str]) -> str:
        """Return the end of an error: the option's owner if another dataclass has it, or else the nearest name."""
        owners = [kind.__name__ for kind in self.all_kinds if name in {one.name for one in fields(kind)}]
        if owners:
            used = ", ".join(kind.__name__ for kind in self.kinds)
            return f"is no option of {self.verb} with {used}: it belongs to {owners[0]}."
        names = [one.name for kind in self.kinds for one in fields(kind) if one.init]
        close = difflib.get_close_matches(name, names, 1)
        return f"is no option of {self.verb}{f'; did you mean {show(close[0])}?' if close else '.'}"


def _check_names(section: Mapping[str, Any], known: Mapping[str, Any], hint: _Hint, where: str) -> None:
    for name in section:
        if new := hint.renamed(name):
            raise ValueError(f"{where}: {name!r} is now {new!r}.")
        if name not in known:
            raise ValueError(f"{where}: {name!r} {hint.unknown(str(name), repr)}")


def _without_options(rest: Sequence[str], hint: _Hint) -> list[str]:
    """Return words that no option took.

    Raises:
        ValueError: One of them looks like an option.
    """
    for word in rest:
        if re.match(r"--?[a-zA-Z][\w-]*(=|$)", word):
            name = word.split("=")[0]
            plain = name.removeprefix("--").replace("-", "_")
            if new := hint.renamed(plain):
                raise ValueError(f"{name} is now --{new}.")
            raise ValueError(f"{name} {hint.unknown(plain, shown_name)}")
    return list(rest)


def _arguments(words: Sequence[str], known: Mapping[str, Field[Any]]) -> dict[str, str]:
    """Return the arguments of the command line by name, in their order.

    Raises:
        ValueError: There are more words than arguments.
    """
    names = [name for name, one in known.items() if one.metadata.get(ROLE) == ARGUMENT]
    if len(words) > len(names):
        raise ValueError(f"{words[len(names)]!r} belongs to no option; options are written as --name value.")
    return dict(zip(names, words, strict=False))


def _check_required(values: Mapping[str, Any], known: Mapping[str, Field[Any]], verb: str) -> None:
    names = [name for name, one in known.items() if one.metadata.get(REQUIRED)]
    _demand([name for name in names if not values.get(name)], verb)


def demand(config: Any, verb: str, *names: str) -> None:
    """Raise `ValueError` if fields that the verb needs are empty."""
    _demand([name for name in names if not getattr(config, name)], verb)


def _demand(missing: Sequence[str], verb: str) -> None:
    if missing:
        them = "it" if len(missing) == 1 else "them"
        raise ValueError(
            f"{', '.join(missing)} missing: give {them} in the recipe's section {verb!r} or on the command line "
            f"(jacobi-hf {verb} --help)."
        )


def section_of(path: str | Path, section: str) -> dict[str, Any]:
    """Return a section of a recipe: options by name.

    Raises:
        ValueError: The file cannot be read, is not a recipe, or has no such section.
    """
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is no recipe: it must hold sections by name, such as {section!r}.")  # noqa: TRY004
    found = recipe.get(section)
    if not isinstance(found, dict):
        names = ", ".join(map(str, recipe)) or "none"
        raise ValueError(f"{path} has no section {section!r} with options by name; it has {names}.")  # noqa: TRY004
    return found


def _as_word(one: Field[Any], value: Any, hint: Any, where: str) -> Any:
    """Return a recipe's value in the form of the command line, so that both are checked alike."""
    name = one.name
    role = one.metadata.get(ROLE)
    if name == "decoding" and value is None:
        raise ValueError(f"{where}: decoding is empty. Ordinary decoding is written none; or leave it out.")
    if value is None and type(None) not in typing.get_args(hint):
        raise ValueError(f"{where}: {name} is empty. Give a value, or leave it out.")
    if role in (FLAG, SWITCH):
        if not isinstance(value, bool | None):
            raise ValueError(f"{where}: {name} takes true or false; it is {value!r}.")
        return value
    if (isinstance(value, list) and "list" not in str(hint)) or (
        isinstance(value, dict) and hint in (str, int, float)
    ):
        raise ValueError(f"{where}: {name} takes one value; it is {value!r}.")
    if isinstance(value, list):
        return [str(item) for item in value]
    if isinstance(value, dict):
        return json.dumps(value)
    return None if value is None else [str(value)] if role == SEVERAL else str(value)
