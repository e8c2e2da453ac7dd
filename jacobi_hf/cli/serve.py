"""`jacobi-hf serve`: transformers' OpenAI-compatible server, decoding with Jacobi."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path  # noqa: TC003  (typer reads the annotation)
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jacobi_hf.cli._options import errors_in_one_line, recipe_option, with_knobs
from jacobi_hf.integration.compat import require_release

if TYPE_CHECKING:
    from jacobi_hf.config import JacobiConfig


@with_knobs
def serve(
    model: Annotated[str, typer.Argument(help="Model name or folder; also what requests call it.")],
    *,
    drafter: Annotated[str | None, typer.Option(help="Folder or Hub repository of a drafter to decode with.")] = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. There is no authentication: one that others reach is open to them."),
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    dtype: Annotated[str, typer.Option(help="auto (as the weights are), float32, bfloat16 or float16.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the steps; on CUDA they are captured.")] = False,
    config: Annotated[Path | None, recipe_option()] = None,  # noqa: ARG001  (its callback has read it)
    knobs: dict[str, Any],
) -> None:
    """Serve a model at /v1/chat/completions and /v1/completions, as the OpenAI API has them, streaming or not.

    A request may hold knobs of its own: with the openai client, extra_body={"decoding": None} or {"jacobi_block_size": 32}. Sampling
    is as the model's generation config says unless the request has a temperature; 0 is greedy.
    """
    from jacobi_hf.cli._models import check_knobs, decoding_of
    from jacobi_hf.loading import load

    with errors_in_one_line("serve"):
        require_release("serving", "5.15")
        _check_extra()
        check_knobs(knobs)
        at = listener(host, port)  # before the model is loaded, which takes long
    from jacobi_hf.serving.app import Server, build_app

    with at:
        with errors_in_one_line("serve"):
            loaded, tokenizer = load(model, dtype, drafter)
            default = decoding_of(loaded, knobs)
        make_default(loaded, default)
        app = build_app(loaded, tokenizer, model, compiled=compiled)
        shown = f"[{host}]" if ":" in host else host
        typer.echo(
            f"{model} ({default.decoding if default else 'ordinary decoding'}) at http://{shown}:{at.getsockname()[1]}/v1"
        )
        with suppress(KeyboardInterrupt):  # which is how one ends it
            Server(app).run(sockets=[at])


def _check_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}: pip install 'jacobi-hf[serve]'") from None


def listener(host: str, port: int) -> socket.socket:
    """A socket bound to an address.

    Raises:
        ValueError: it cannot be had.
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


def make_default(model: Any, config: JacobiConfig | None) -> None:
    """Let a loaded model decode like this where a call does not say otherwise; its sampling stays as it is."""
    from jacobi_hf.config import KNOBS

    knobs = config.to_knobs() if config else {}
    for name in KNOBS:
        setattr(model.generation_config, name, knobs.get(name))
