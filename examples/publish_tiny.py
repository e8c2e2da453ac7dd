# /// script
# requires-python = ">=3.11"
# dependencies = ["jacobi-hf"]
# ///
"""Publish the tiny models of this repository on the Hub that `HF_ENDPOINT` names: the base, what Jacobi Forcing made of it, a drafter.

    python examples/publish_tiny.py USER --dry-run build/published   # writes the repositories as folders, sends nothing
    python examples/publish_tiny.py USER --drafter --private

The token is that of `hf auth login` or `HF_TOKEN`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from tiny_qwen3.cards import INPUTS, card

from jacobi_hf.hub_cards import FolderError, PushError, push_to_hub

HERE = Path(__file__).resolve().parent / "tiny_qwen3"
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

A Qwen3 of 5.8 M parameters that writes code, arithmetic and prose, made to try and test parallel decoding with. It is the base of
[tiny-qwen3-forced](https://huggingface.co/{user}/tiny-qwen3-forced) and of the drafter
[tiny-qwen3-drafter](https://huggingface.co/{user}/tiny-qwen3-drafter).
"""


def publish(kind: str, user: str, dry_run: Path | None, **options: Any) -> None:
    """One of the three repositories, from its folder among the examples."""
    base, repo_id = f"{user}/tiny-qwen3", f"{user}/tiny-qwen3" + ("" if kind == "checkpoint" else f"-{kind}")
    inputs: dict[str, Any] = {"card": BASE_CARD.format(user=user)}
    if kind != "checkpoint":
        inputs = {
            "card": card(kind, repo_id=repo_id, base_model=base),
            "results": INPUTS[kind]["results"],
            "base_model": base,
        }
    target = None if dry_run is None else dry_run / repo_id.rpartition("/")[2]
    pushed = push_to_hub(HERE / kind, repo_id, plots=PLOTS.get(kind, ()), dry_run=target, **inputs, **options)
    typer.echo(f"{repo_id}: {pushed.url or target}\n{pushed.staged.summary()}")


def main(
    user: Annotated[str, typer.Argument(help="Whose repositories they become: a user or an organisation.")],
    drafter: Annotated[bool, typer.Option("--drafter", help="The drafter as well.")] = False,
    dry_run: Annotated[
        Path | None, typer.Option(help="Write the repositories into this folder instead of sending them.")
    ] = None,
    private: Annotated[bool | None, typer.Option(help="Whether repositories that are made are private.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open pull requests instead of committing.")] = False,
) -> None:
    """Publish the tiny base, the forced model and, with --drafter, the drafter."""
    try:
        for kind in ("checkpoint", "forced", *(["drafter"] if drafter else [])):
            publish(kind, user, dry_run, private=private, create_pr=create_pr)
    except (FolderError, PushError, OSError, ValueError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
