"""The command line, `jacobi-hf`: one module a verb. Heavy imports happen inside the verbs, so that `--help` is quick."""

from typing import Annotated

import typer

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
from jacobi_hf.cli.verbs import WITH_TRACEBACK

# Options that a dataclass describes are read by jacobi_hf.cli.recipes.
BY_DATACLASS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    help="Parallel decoding for Hugging Face transformers.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.command()(demo)
app.command()(generate)
app.command()(chat)
for verb in (collect, pack, train, bench):
    app.command(context_settings=BY_DATACLASS)(verb)
app.command("eval")(eval_)
app.command()(autotune)
app.command()(card)
app.command()(push)
app.command()(serve)
app.command()(info)


@app.callback()
def main(
    *,
    traceback: Annotated[bool, typer.Option("--traceback", help="In front of a verb: also show where an error was raised.")] = False,
) -> None:
    """Parallel decoding for Hugging Face transformers."""
    WITH_TRACEBACK.set(traceback)
