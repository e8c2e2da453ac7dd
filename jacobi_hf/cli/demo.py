"""`jacobi-hf demo`: ordinary and Jacobi decoding side by side."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from jacobi_hf.cli._options import Options, flag, option, verb

if TYPE_CHECKING:
    from jacobi_hf.cli._recipes import Call

HOST = "127.0.0.1"
PORT = 7860


@dataclass
class DemoOptions(Options):
    """Options of `jacobi-hf demo`."""

    model: str | None = option(None, "Model name or folder; the tiny checkpoint of this repository if not given.")
    drafter: str | None = option(None, "Folder or Hub repository of a drafter of the model.")
    prompt: str | None = option(None, "A prompt of your own, instead of three held-out ones.")
    max_new_tokens: int = option(128, "New tokens per prompt.", low=1)
    web: bool = flag("Show it on a page in the browser, with a replay; needs the extra demo.")
    host: str = option(HOST, "With --web, address to listen on. Everybody who reaches it can generate.")
    port: int = option(PORT, "With --web, port to listen on; 0 for any that is free.", low=0, high=65535)


@verb(lambda: (DemoOptions,), json=True)
def demo(call: Call) -> None:
    """Write the same text with generate() and with Jacobi decoding, and count tokens and forwards.

    Tokens are coloured by the forward that produced them: a run of one colour came out of one forward.
    """
    (options,) = call.parse()
    if options.drafter is not None and options.model is None:
        raise ValueError("--drafter is for the model that --model names; the tiny checkpoint comes with its own.")
    if not options.web and (options.host, options.port) != (HOST, PORT):
        raise ValueError("--host and --port are for the page: add --web, or leave them out.")
    if options.web and call.as_json:
        raise ValueError("--json and --web are two ways to show results: choose one.")
    if options.web:
        _serve(options)
        return
    from jacobi_hf.demo import showcase

    examples = showcase.examples(options.prompt)
    loaded = showcase.load(options.model, options.drafter)
    results = showcase.run(loaded, examples, options.max_new_tokens, quiet=call.as_json)
    if call.as_json:
        typer.echo(results.model_dump_json(indent=1, exclude_none=True))


def _serve(options: DemoOptions) -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError("--web needs gradio: pip install '.[demo]'") from None
    from jacobi_hf.cli.serve import address_of, listener
    from jacobi_hf.demo import page, showcase

    with listener(options.host, options.port) as at:
        if options.max_new_tokens > page.MOST_NEW_TOKENS:
            raise ValueError(
                f"--max-new-tokens {options.max_new_tokens} is more than the {page.MOST_NEW_TOKENS} "
                "that the page writes."
            )
        prompt = options.prompt
        if prompt is None:
            prompt = showcase.examples(None)[0].prompt if options.model is None else ""
        lanes = page.Page(page.lanes(options.model, options.drafter))
        server = page.Server(lanes, prompt, options.max_new_tokens)
        typer.echo(f"The page is at {address_of(options.host, at)}, until Ctrl-C.")
        with suppress(KeyboardInterrupt):  # the way to end it
            server.run(sockets=[at])
