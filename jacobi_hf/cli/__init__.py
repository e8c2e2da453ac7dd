"""The command line, `jacobi-hf`: one module a verb. Heavy imports happen inside the verbs, so that `--help` is quick."""

import typer

from jacobi_hf.cli.demo import demo
from jacobi_hf.cli.eval import eval_
from jacobi_hf.cli.serve import serve

app = typer.Typer(
    help="Parallel decoding for Hugging Face transformers.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.command()(demo)
app.command("eval")(eval_)
app.command()(serve)


@app.callback()
def main() -> None:
    """Parallel decoding for Hugging Face transformers."""
