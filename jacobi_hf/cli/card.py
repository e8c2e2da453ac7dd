"""`jacobi-hf card`: the README.md of a model, an adapter, a drafter, or a data set of trajectories."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotation)
from typing import Annotated, Any

import typer

from jacobi_hf.cli._options import check_folder, errors_in_one_line, recipe_option
from jacobi_hf.io import read_json_object

SEVERAL = "; may be given several times."


def card(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of a model, a LoRA adapter, a drafter, or of collected or packed trajectories."),
    ],
    repo_id: Annotated[str, typer.Argument(help="Repository that the card is for, user/name.")],
    *,
    results: Annotated[list[Path] | None, typer.Option(help="JSON file of measured results" + SEVERAL)] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Repository of what was trained; of adapters and drafters as they say.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="As the Hub writes it; inherited from the base's card if that can be read.")
    ] = None,
    language: Annotated[list[str] | None, typer.Option(help="Code of a language, such as en" + SEVERAL)] = None,
    datasets: Annotated[list[str] | None, typer.Option(help="Hub data set that was trained on" + SEVERAL)] = None,
    measured_as: Annotated[
        list[str] | None, typer.Option(help="What results of several models call this one" + SEVERAL)
    ] = None,
    base_measured_as: Annotated[list[str] | None, typer.Option(help="What they call its base" + SEVERAL)] = None,
    decoders: Annotated[
        list[str] | None, typer.Option(help="Jacobi decoder to show, by name; all when not given" + SEVERAL)
    ] = None,
    prompt: Annotated[str, typer.Option(help="In the examples of use.")] = "def quicksort(items):",
    description: Annotated[str | None, typer.Option(help="Of a data set: a sentence of yours.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; README.md in the folder when not given.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    config: Annotated[Path | None, recipe_option()] = None,  # noqa: ARG001  (its callback has read it)
) -> None:
    """Write a card from measured results: what the model is, how it was trained, what it is worth, how it is used.

    Every number comes from the documents of --results (jacobi-hf bench and eval write them); without any the card says that nothing was
    measured. jacobi-hf push sends it.
    """
    with errors_in_one_line("card"):
        target = output or folder / "README.md"
        if target.exists() and not overwrite:
            raise ValueError(f"{target} is there already: --overwrite replaces it, --output writes elsewhere.")
        check_folder(target.parent)
        of_models = {
            "results": results,
            "base_model": base_model,
            "datasets": datasets,
            "measured_as": measured_as,
            "base_measured_as": base_measured_as,
            "decoders": decoders,
        }
        given = {name: value for name, value in of_models.items() if value}
        common = {"repo_id": repo_id, "license": license, "language": language}
        if (folder / "manifest.json").is_file():
            text = _dataset_card(folder, given, {**common, "description": description})
        elif description is not None:
            raise ValueError(f"--description is for data sets, and {folder} holds none.")
        else:
            text = _model_card(folder, given, {**common, "prompt": prompt})
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(target)
    typer.echo(str(target))


def _dataset_card(folder: Path, given: dict[str, Any], arguments: dict[str, Any]) -> str:
    from jacobi_hf.hub_cards.dataset_card import generate_dataset_card

    if given:
        raise ValueError(f"{', '.join(given)} given for {folder}, which holds trajectories: they are for models.")
    if arguments["license"] is None:
        raise ValueError(
            "--license is missing: what the licenses of the prompts and of the model that answered allow."
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
    """What an adapter or drafter says that it was made for."""
    file, name = {
        "adapter": ("adapter_config.json", "base_model_name_or_path"),
        "drafter": ("drafter_config.json", "base_model"),
    }.get(kind, ("", ""))
    if not file:
        return None
    base = read_json_object(folder / file).get(name)
    return str(base) if base else None
