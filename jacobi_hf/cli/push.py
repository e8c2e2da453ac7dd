"""`jacobi-hf push`: publish a finished model, adapter or drafter on the Hub."""

from __future__ import annotations

import json as json_module
from pathlib import Path  # noqa: TC003  (typer reads the annotation)
from typing import TYPE_CHECKING, Annotated

import typer

from jacobi_hf.cli._options import errors_in_one_line, recipe_option
from jacobi_hf.io import read_text

if TYPE_CHECKING:
    from jacobi_hf.hub_cards.push import Pushed


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a model with its tokenizer, of a LoRA adapter, or of a drafter.")
    ],
    repo_id: Annotated[str, typer.Argument(help="Repository, user/name; made if it is not there.")],
    *,
    card: Annotated[
        Path | None, typer.Option(help="File for README.md, instead of the folder's own (jacobi-hf card writes one).")
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="JSON file of measured results; may be given several times.")
    ] = None,
    plots: Annotated[list[Path] | None, typer.Option(help="Picture; may be given several times.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Repository that an adapter or drafter was made for.")] = None,
    license: Annotated[
        str | None, typer.Option(help="For a card that has to be written; inherited if the base's says it.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="For such a card: code of a language, such as en.")] = None,
    datasets: Annotated[
        list[str] | None, typer.Option(help="For such a card: Hub data set; may be given several times.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option(help="Whether a new repository is private; as your account says when not given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made if it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="What changed.")] = None,
    dry_run: Annotated[
        Path | None, typer.Option(help="New folder to write the repository to; nothing is sent.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print what was sent as one JSON document and nothing else.")
    ] = False,
    config: Annotated[Path | None, recipe_option()] = None,  # noqa: ARG001  (its callback has read it)
) -> None:
    """Send weights, card, custom_generate and results as one commit. Everything is checked before anything is sent.

    You have to be logged in (hf auth login), or HF_TOKEN be set. Files that look like secrets, pickled weights and links out of the
    folder are refused; what else is left out is listed.
    """
    from jacobi_hf.hub_cards import PushError, push_to_hub

    with errors_in_one_line("push") as ending:
        ending.kept = lambda: "the repository is as it was; run the same again"
        try:
            pushed = push_to_hub(
                folder,
                repo_id,
                card=None if card is None else read_text(card),
                results=results or (),
                plots=plots or (),
                base_model=base_model,
                license=license,
                language=language,
                datasets=datasets or (),
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                dry_run=dry_run,
            )
        except PushError as error:
            raise ValueError(str(error)) from error
    if json:
        typer.echo(json_module.dumps(_document(pushed, dry_run), indent=1))
        return
    typer.echo(pushed.staged.summary())
    typer.echo(pushed.url or f"nothing was sent; {repo_id} would be what {dry_run} holds")


def _document(pushed: Pushed, dry_run: Path | None) -> dict[str, object]:
    return {
        "repo_id": pushed.repo_id,
        "kind": pushed.staged.kind,
        "files": sorted(pushed.staged.files),
        "left_out": pushed.staged.left_out,
        "url": pushed.url,
        "dry_run": None if dry_run is None else str(dry_run),
    }
