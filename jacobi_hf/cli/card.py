"""`jacobi-hf card`: write the README.md of a model, an adapter, a drafter, or a data set of trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jacobi_hf.cli._errors import check_folder
from jacobi_hf.cli._options import Options, argument, flag, option, several, verb
from jacobi_hf.io import read_json_object

if TYPE_CHECKING:
    from jacobi_hf.cli._recipes import Call


@dataclass
class CardOptions(Options):
    """Options of `jacobi-hf card`."""

    folder: str = argument("Folder of a model, a LoRA adapter, a drafter, or of collected or packed trajectories.")
    repo_id: str = argument("Repository that the card is for, user/name.")
    results: list[str] = several("JSON file of measured results")
    base_model: str | None = option(
        None, "Repository of the model that was trained. Adapters and drafters name it themselves."
    )
    license: str | None = option(
        None, "License as the Hub writes it. The default is that of the base's card if the card can be read."
    )
    language: list[str] = several("Code of a language, such as en")
    datasets: list[str] = several("Hub data set that was trained on")
    measured_as: list[str] = several("Name of this model in results of several models")
    base_measured_as: list[str] = several("Name of its base in such results")
    decoders: list[str] = several("Name of a Jacobi decoder to show; all if not given")
    prompt: str = option("def quicksort(items):", "Prompt in the examples of use.")
    description: str | None = option(None, "A sentence about a data set.")
    output: str | None = option(None, "File to write; README.md in the folder if not given.")
    overwrite: bool = flag("Replace a file that is there.")


@verb(lambda: (CardOptions,))
def card(call: Call) -> None:
    """Write a card from measured results: what the model is, how it was trained, its figures, how to use it.

    Every number comes from the documents of --results, which jacobi-hf bench and eval write. Without results the card
    says that nothing was measured. jacobi-hf push sends the card.
    """
    (options,) = call.parse()
    folder = Path(options.folder)
    target = Path(options.output or folder / "README.md")
    if target.exists() and not options.overwrite:
        raise ValueError(f"{target} exists already: --overwrite replaces it, --output writes elsewhere.")
    check_folder(target.parent)
    text = _text(folder, options)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(target)
    typer.echo(str(target))


def _text(folder: Path, options: CardOptions) -> str:
    names = ("results", "base_model", "datasets", "measured_as", "base_measured_as", "decoders")
    given = {name: value for name in names if (value := getattr(options, name))}
    common = {"repo_id": options.repo_id, "license": options.license, "language": options.language or None}
    if (folder / "manifest.json").is_file():
        return _dataset_card(folder, given, {**common, "description": options.description})
    if options.description is not None:
        raise ValueError(f"--description is for data sets, and {folder} holds none.")
    return _model_card(folder, given, {**common, "prompt": options.prompt})


def _dataset_card(folder: Path, given: dict[str, Any], arguments: dict[str, Any]) -> str:
    from jacobi_hf.hub_cards.dataset_card import generate_dataset_card

    if given:
        raise ValueError(f"{', '.join(given)} given for {folder}, which holds trajectories: they are for models.")
    if arguments["license"] is None:
        raise ValueError(
            "--license is missing: name one that the licenses of the prompts and of the model that answered allow."
        )
    return str(generate_dataset_card(folder, **arguments))


def _model_card(folder: Path, given: dict[str, Any], arguments: dict[str, Any]) -> str:
    from jacobi_hf.hub_cards.card import generate_model_card
    from jacobi_hf.hub_cards.folder import kind_of

    kind = kind_of(folder)
    given.setdefault("base_model", _base_in(folder, kind))
    return str(
        generate_model_card(
            given.pop("results", ()), drafter=kind == "drafter", adapter=kind == "adapter", **given, **arguments
        )
    )


def _base_in(folder: Path, kind: str) -> str | None:
    """Return the base that the files of an adapter or drafter name, or None."""
    file, name = {
        "adapter": ("adapter_config.json", "base_model_name_or_path"),
        "drafter": ("drafter_config.json", "base_model"),
    }.get(kind, ("", ""))
    base = read_json_object(folder / file).get(name) if file else None
    return str(base) if base else None
