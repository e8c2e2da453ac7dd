"""`jacobi-hf push`: publish a finished model, adapter or drafter on the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from jacobi_hf.cli._options import Options, argument, flag, option, several, switch, verb
from jacobi_hf.io import read_text

if TYPE_CHECKING:
    from jacobi_hf.cli._recipes import Call
    from jacobi_hf.hub_cards.push import Pushed


@dataclass
class PushOptions(Options):
    """Options of `jacobi-hf push`."""

    folder: str = argument("Folder of a model with its tokenizer, of a LoRA adapter, or of a drafter.")
    repo_id: str = argument("Repository, user/name; made if it does not exist.")
    card: str | None = option(None, "File for README.md, instead of the folder's own (jacobi-hf card writes one).")
    results: list[str] = several("JSON file of measured results")
    plots: list[str] = several("Picture")
    base_model: str | None = option(None, "Repository that an adapter or drafter was made for.")
    license: str | None = option(None, "License, if a card must be written. The default is that of the base's card.")
    language: str | None = option(None, "Code of a language for such a card, such as en.")
    datasets: list[str] = several("Hub data set for such a card")
    private: bool | None = switch("Whether a new repository is private. The default is that of your account.")
    revision: str | None = option(None, "Branch to commit to; made if it does not exist.")
    create_pr: bool = flag("Open a pull request instead.")
    commit_message: str | None = option(None, "Message of the commit.")
    dry_run: str | None = option(None, "New folder to write the repository to; nothing is sent.")


@verb(lambda: (PushOptions,), json=True)
def push(call: Call) -> None:
    """Send weights, card, custom_generate and results as one commit. Everything is checked before anything is sent.

    You must be logged in (hf auth login), or HF_TOKEN must be set. Files that look like secrets, pickled weights and
    links out of the folder are refused. Other files that are left out are listed.
    """
    (options,) = call.parse()
    from jacobi_hf.hub_cards import PushError, push_to_hub

    call.ending.kept = lambda: "the repository has not changed; run the same command again"
    try:
        pushed = push_to_hub(
            Path(options.folder),
            options.repo_id,
            card=None if options.card is None else read_text(options.card),
            results=[Path(file) for file in options.results],
            plots=[Path(file) for file in options.plots],
            base_model=options.base_model,
            license=options.license,
            language=options.language,
            datasets=options.datasets,
            private=options.private,
            revision=options.revision,
            create_pr=options.create_pr,
            commit_message=options.commit_message,
            dry_run=None if options.dry_run is None else Path(options.dry_run),
        )
    except PushError as error:
        raise ValueError(str(error)) from error
    if call.as_json:
        typer.echo(json.dumps(_document(pushed, options.dry_run), indent=1))
        return
    typer.echo(pushed.staged.summary())
    typer.echo(pushed.url or f"nothing was sent; {options.dry_run} holds what {options.repo_id} would be")


def _document(pushed: Pushed, dry_run: str | None) -> dict[str, object]:
    return {
        "repo_id": pushed.repo_id,
        "kind": pushed.staged.kind,
        "files": sorted(pushed.staged.files),
        "left_out": pushed.staged.left_out,
        "url": pushed.url,
        "dry_run": dry_run,
    }
