"""The command line, `jacobi-hf`: one module a verb. Heavy imports happen inside the verbs, so that `--help` is quick."""

from typing import Annotated

import typer

from jacobi_hf.cli._options import WITH_TRACEBACK
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

# Options that a dataclass describes are read by jacobi_hf.cli._recipes.
BY_DATACLASS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

# Without rich's markup, whose tables cut off the names of long options and whose boxes break errors into lines.
app = typer.Typer(
    help="Parallel decoding for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for verb in (demo, generate, chat, collect, pack, train, bench, eval_, autotune, card, push, serve, info):
    app.command(
        verb.__name__.rstrip("_"),
        short_help=" ".join(
            str(verb.__doc__).split("\n\n")[0].split()
        ),  # all of it: typer would cut it off at the width of a line
        context_settings=BY_DATACLASS if verb in (collect, pack, train, bench) else None,
    )(verb)


@app.callback()
def main(
    *,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="In front of a verb: also show where an error was raised.")
    ] = False,
) -> None:
    """Parallel decoding for Hugging Face transformers."""
    WITH_TRACEBACK.set(traceback)
