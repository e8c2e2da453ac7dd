"""`jacobi-hf demo`: ordinary and Jacobi decoding side by side."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from jacobi_hf.cli._options import errors_in_one_line

if TYPE_CHECKING:
    from jacobi_hf.demo.showcase import Example

HOST, PORT = "127.0.0.1", 7860


def demo(
    model: Annotated[
        str | None, typer.Option(help="Model name or folder; the tiny checkpoint of this repository when not given.")
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="Folder or Hub repository of a drafter of the model.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt of your own, instead of three held-out ones.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 128,
    json: Annotated[
        bool, typer.Option("--json", help="Print the measured results as one JSON document and nothing else.")
    ] = False,
    web: Annotated[
        bool, typer.Option("--web", help="Show it on a page in the browser, with a replay; needs the extra demo.")
    ] = False,
    host: Annotated[str, typer.Option(help="With --web, address to listen on. Who reaches it can generate.")] = HOST,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="With --web, port to listen on; 0 for any that is free.")
    ] = PORT,
) -> None:
    """Write the same text with generate() and with Jacobi decoding, and count what it took.

    Tokens are coloured by the forward that produced them: a run of one colour came out of one forward.
    """
    with errors_in_one_line("demo"):
        if drafter is not None and model is None:
            raise ValueError("--drafter is for the model that --model names; the tiny checkpoint comes with its own.")
        if not web and (host, port) != (HOST, PORT):
            raise ValueError("--host and --port are for the page: add --web, or leave them out.")
        if web and json:
            raise ValueError("--json and --web are two ways to show results: choose one.")
        if web:
            return _serve(model, drafter, prompt, max_new_tokens, host, port)
        from jacobi_hf.demo import showcase

        examples: list[Example] = showcase.examples(prompt)
        loaded = showcase.load(model, drafter)
        results = showcase.run(loaded, examples, max_new_tokens, quiet=json)
    if json:
        typer.echo(results.model_dump_json(indent=1, exclude_none=True))
    return None


def _serve(
    model: str | None, drafter: str | None, prompt: str | None, max_new_tokens: int, host: str, port: int
) -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError("--web needs gradio: pip install '.[demo]'") from None
    from jacobi_hf.cli.serve import listener
    from jacobi_hf.demo import page, showcase

    with listener(host, port) as at:
        if max_new_tokens > page.MOST_NEW_TOKENS:
            raise ValueError(
                f"--max-new-tokens {max_new_tokens} is more than the {page.MOST_NEW_TOKENS} that the page writes."
            )
        if prompt is None:
            prompt = showcase.examples(None)[0].prompt if model is None else ""
        server = page.Server(page.Page(page.lanes(model, drafter)), prompt, max_new_tokens)
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"The page is at http://{shown}:{at.getsockname()[1]}, until Ctrl-C.")
        with suppress(KeyboardInterrupt):  # which is how one ends it
            server.run(sockets=[at])
