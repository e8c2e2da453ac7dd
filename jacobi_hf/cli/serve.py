"""`jacobi-hf serve`: transformers' OpenAI-compatible server, decoding with Jacobi."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from jacobi_hf.cli._options import Options, argument, flag, option, verb

if TYPE_CHECKING:
    from jacobi_hf.cli._recipes import Call


@dataclass
class ServeOptions(Options):
    """Options of `jacobi-hf serve`."""

    model: str = argument("Model name or folder; also its name in requests.")
    drafter: str | None = option(None, "Folder or Hub repository of a drafter to decode with.")
    host: str = option(
        "127.0.0.1",
        "Address to listen on. There is no authentication: everybody who reaches the address can use the server.",
    )
    port: int = option(8000, "Port to listen on; 0 for any that is free.", low=0, high=65535)
    max_length: int | None = option(
        None, "Most tokens of prompt and answer together; the default is no limit, as in generate.", low=1
    )
    dtype: str = option("auto", "auto (as the weights are), float32, bfloat16 or float16.")
    compile: bool = flag("Compile the steps; on CUDA they run as CUDA graphs.")


def _kinds() -> tuple[type, ...]:
    from jacobi_hf.cli._models import KnobOptions

    return ServeOptions, KnobOptions


@verb(_kinds)
def serve(call: Call) -> None:
    """Serve a model at /v1/chat/completions and /v1/completions, as the OpenAI API has them, streaming or not.

    A request may hold knobs: with the openai client, extra_body={"decoding": None} or {"jacobi_block_size": 32}.
    Sampling is that of the model's generation config unless the request has a temperature; temperature 0 is greedy.
    """
    from jacobi_hf.cli._models import check_knobs, decoding_of, given_knobs, make_default
    from jacobi_hf.integration.releases import require_release

    options, knobs = call.parse()
    given = given_knobs(knobs)
    check_knobs(given)
    require_release("serving", "5.15")
    _check_extra()
    with listener(options.host, options.port) as at:  # before the model is loaded, which takes long
        from jacobi_hf.loading import load
        from jacobi_hf.serving.app import Server, build_app

        model, tokenizer = load(options.model, options.dtype, options.drafter)
        default = decoding_of(model, given)
        make_default(model, default)
        app = build_app(model, tokenizer, options.model, compiled=options.compile, max_length=options.max_length)
        decoding = default.decoding if default else "ordinary decoding"
        typer.echo(f"{options.model} ({decoding}) at {address_of(options.host, at)}/v1")
        with suppress(KeyboardInterrupt):  # the way to end it
            Server(app).run(sockets=[at])


def _check_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}: pip install 'jacobi-hf[serve]'") from None


def listener(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Raises:
        ValueError: The address is in use, or does not exist.
    """
    at = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    at.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        at.bind((host, port))
    except OSError as error:
        at.close()
        raise ValueError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}. Choose another --port or --host."
        ) from None
    return at


def address_of(host: str, at: socket.socket) -> str:
    """Return the URL of a bound socket."""
    return f"http://{f'[{host}]' if ':' in host else host}:{at.getsockname()[1]}"
