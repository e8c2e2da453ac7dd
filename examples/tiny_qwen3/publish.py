"""Publish the tiny models of this repository on the Hub: the base, the model after Jacobi Forcing, and the drafter.

    python examples/tiny_qwen3/publish.py USER --dry-run build/published   # writes folders, sends nothing
    python examples/tiny_qwen3/publish.py USER --drafter --private

`HF_ENDPOINT` names the Hub. The token is that of `hf auth login` or `HF_TOKEN`. Publish a model of your own with
examples/publish.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from cards import INPUTS, card

from jacobi_hf.hub_cards import FolderError, PushError, push_to_hub

HERE = Path(__file__).resolve().parent
PLOTS = {"forced": [HERE.parents[1] / "docs" / "images" / "forcing.png"]}
BASE_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [custom_generate]
---

# tiny-qwen3

A Qwen3 of 5.8 M parameters that writes code, arithmetic and prose, for trying and testing parallel decoding. It is the
base model of [tiny-qwen3-forced](https://huggingface.co/{user}/tiny-qwen3-forced) and of the drafter
[tiny-qwen3-drafter](https://huggingface.co/{user}/tiny-qwen3-drafter).
"""


def publish(kind: str, user: str, dry_run: Path | None, **options: Any) -> None:
    """Publish one of the three repositories from its folder beside this script.

    Args:
        kind: the folder: "checkpoint", "forced" or "drafter".
        user: the owner of the repositories.
        dry_run: the folder for the repositories, if nothing is to be sent.
        options: further arguments of `push_to_hub`.
    """
    base = f"{user}/tiny-qwen3"
    repo_id = base if kind == "checkpoint" else f"{base}-{kind}"
    inputs: dict[str, Any] = {"card": BASE_CARD.format(user=user)}
    if kind != "checkpoint":
        text = card(kind, repo_id=repo_id, base_model=base)
        inputs = {"card": text, "results": INPUTS[kind]["results"], "base_model": base}
    target = None if dry_run is None else dry_run / repo_id.rpartition("/")[2]
    pushed = push_to_hub(HERE / kind, repo_id, plots=PLOTS.get(kind, ()), dry_run=target, **inputs, **options)
    typer.echo(f"{repo_id}: {pushed.url or target}\n{pushed.staged.summary()}")


def main(
    user: Annotated[str, typer.Argument(help="Owner of the repositories: a user or an organisation.")],
    drafter: Annotated[bool, typer.Option("--drafter", help="Publish the drafter as well.")] = False,
    dry_run: Annotated[Path | None, typer.Option(help="Folder for the repositories. With it nothing is sent.")] = None,
    private: Annotated[bool | None, typer.Option(help="Whether new repositories are private.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open pull requests instead of committing.")] = False,
) -> None:
    """Publish the tiny base model, the model after Jacobi Forcing and, with --drafter, the drafter."""
    try:
        for kind in ("checkpoint", "forced", *(["drafter"] if drafter else [])):
            publish(kind, user, dry_run, private=private, create_pr=create_pr)
    except (FolderError, PushError, OSError, ValueError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
