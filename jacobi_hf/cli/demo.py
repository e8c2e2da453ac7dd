"""`jacobi-hf demo`: ordinary and Jacobi decoding side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from jacobi_hf.cli.showcase import Example


def demo(
    model: Annotated[str | None, typer.Option(help="Model name or folder; the tiny checkpoint of this repository when not given.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt of your own, instead of three held-out ones.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 128,
    json: Annotated[bool, typer.Option("--json", help="Print the measured results as one JSON document and nothing else.")] = False,
) -> None:
    """Write the same text with generate() and with Jacobi decoding, and count what it took.

    Tokens are coloured by the forward that produced them: a run of one colour came out of one forward.
    """
    from jacobi_hf.cli import showcase

    try:
        examples: list[Example] = showcase.examples(prompt)
        loaded = showcase.load(model)
        results = showcase.run(loaded, examples, max_new_tokens, quiet=json)
    except (OSError, ValueError) as error:
        typer.echo(f"jacobi-hf demo: {error}", err=True)
        raise typer.Exit(2) from None
    if json:
        typer.echo(results.model_dump_json(indent=1, exclude_none=True))
