"""The command line, `jacobi-hf`: one module for each verb.

Help texts and errors in options come without an import of torch, transformers or an extra, which would take seconds.
So the dataclasses of options live in modules that import none of them, and verbs import what they need after
`call.parse`. `tests/field/test_start_up.py` checks both.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from jacobi_hf._version import __version__
from jacobi_hf.cli._errors import WITH_TRACEBACK
from jacobi_hf.cli.autotune import autotune
from jacobi_hf.cli.bench import bench
from jacobi_hf.cli.card import card
from jacobi_hf.cli.chat import chat
from jacobi_hf.cli.collect import collect
from jacobi_hf.cli.demo import demo
from jacobi_hf.cli.eval import eval_
from jacobi_hf.cli.generate import generate
from jacobi_hf.cli.info import info
from jacobi_hf.cli.pack import pack
from jacobi_hf.cli.push import push
from jacobi_hf.cli.serve import serve
from jacobi_hf.cli.train import train

VERBS = {
    verb.__name__: verb
    for verb in (demo, generate, chat, collect, pack, train, bench, eval_, autotune, card, push, serve, info)
}

# Without rich's markup: its tables cut off the names of long options, and its boxes break errors into lines.
app = typer.Typer(
    help="Parallel decoding for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class _Verb(TyperCommand):
    """A command that leaves its words to `jacobi_hf.cli._recipes`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


for _name, _verb in VERBS.items():
    # The whole first paragraph: typer would cut it off at the width of a line.
    _summary = " ".join(str(_verb.__doc__).split("\n\n")[0].split())
    app.command(_name, cls=_Verb, short_help=_summary)(_verb)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jacobi-hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    *,
    version: Annotated[  # noqa: ARG001  (its callback reads it)
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and leave.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Before a verb: also show where an error was raised.")
    ] = False,
) -> None:
    """Parallel decoding for Hugging Face transformers."""
    token = WITH_TRACEBACK.set(traceback)
    context.call_on_close(lambda: WITH_TRACEBACK.reset(token))
