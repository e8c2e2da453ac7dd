"""`jacobi-hf eval`: score a model with ordinary and with Jacobi decoding, and compare speed."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jacobi_hf.cli._errors import check_file
from jacobi_hf.cli._options import ModelOptions, flag, option, several, verb

if TYPE_CHECKING:
    from jacobi_hf.cli._recipes import Call
    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.results.schema import Results


@dataclass
class Evaluation(ModelOptions):
    """What is evaluated, and on what."""

    tasks: list[str] = several("Tasks of lm-evaluation-harness by name (or its YAML files), with commas")
    task_file: list[str] = several("JSONL file of problems, see above")
    limit: int | None = option(None, "Only the first problems of each task.", low=1)
    num_fewshot: int | None = option(
        None, "Worked examples before each problem, instead of the task's own number.", low=0
    )
    max_new_tokens: int | None = option(None, "New tokens of an answer, instead of the task's own number.", low=1)
    chat_template: bool = flag("Put prompts through the model's chat template.")
    confirm_run_unsafe_code: bool = flag("Allow tasks that run code which the model writes. Use a sandbox.")
    decoders: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={
            "help": "Knobs of each decoder, by name. If not given, the model decodes with the knobs given or its own. "
            "Ordinary decoding is always measured."
        },
    )
    output: str | None = option(None, "JSON file for the results. An interrupted run goes on when it is run again.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = [name.strip() for names in self.tasks for name in names.split(",") if name.strip()]


def _kinds() -> tuple[type, ...]:
    from jacobi_hf.cli._models import KnobOptions

    return Evaluation, KnobOptions


@verb(_kinds, json=True)
def eval_(call: Call) -> None:
    r"""Answer the same questions with ordinary and with Jacobi decoding: scores, identity, tokens per forward, speed.

    Prompts are answered one at a time, by each decoder in turn, and scored by lm-evaluation-harness. A recipe's
    section may hold `decoders`, knobs by name, to compare several.

    A task file is JSONL with a problem in each line: {"prompt": "6 * 7 =", "answer": 42}. An optional first line says
    how to read answers: {"answer_pattern": "(-?\d+)", "max_new_tokens": 32, "stop": ["\n"]}. Without a pattern the
    whole text must be the answer.
    """
    from jacobi_hf.cli._models import given_knobs

    options, knobs = call.parse()
    given = given_knobs(knobs)
    if given and options.decoders:
        raise ValueError(f"{', '.join(given)} given besides the recipe's decoders, which have knobs of their own.")
    if given:
        options.decoders = {str(given.get("decoding") or "jacobi_multiblock"): given}
    if options.output:
        call.ending.kept = lambda: (
            f"what was generated is kept in {journal_of(options.output)}; the same command goes on from there"
        )
    results = run(options, quiet=call.as_json)
    if call.as_json:
        typer.echo(results.model_dump_json(indent=1, exclude_none=True))
    else:
        _show(results, options.output)


def journal_of(output: str) -> Path:
    """Return the file that keeps outputs until the results are written."""
    return Path(f"{output}.unfinished.jsonl")


def _show(results: Results, output: str | None) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("task", "decoder", "score", "95%", "identical", "tokens per forward", "tok/s", "speed-up"):
        table.add_column(
            column, justify="left" if column in ("task", "decoder") else "right", no_wrap=" " not in column
        )
    for m in results.measurements:
        score, interval = (
            (f"{m.quality.value:.3f}", f"{m.quality.low:.2f}\u2013{m.quality.high:.2f}") if m.quality else ("", "")
        )
        same = f"{m.agreement.identical}/{m.agreement.total}" if m.agreement else ""
        speed = f"{m.speedups[0].factor:.2f}" if m.speedups else ""
        took = (f"{m.tokens_per_forward:.2f}", f"{m.tokens_per_second:.0f}", speed)
        table.add_row(m.prompts.domain, m.decoder.name, score, interval, same, *took)
    console = Console()
    console.print(table)
    console.print(
        f"{results.model}, {results.dtype} on {results.hardware.gpu or results.device}; "
        "one prompt at a time, each generated once; identical and speed-up: to eager generate().",
        style="dim",
    )
    if output:
        console.print(output, style="dim")


def run(options: Evaluation, *, quiet: bool = False) -> Results:
    """Evaluate a model and write the results to `options.output`.

    Args:
        options: What is evaluated, and on what.
        quiet: Whether to show no progress.

    Raises:
        ValueError: Options or files cannot be used. Nothing was generated.
    """
    _check(options)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("evaluation needs lm-evaluation-harness: pip install 'jacobi-hf[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if options.confirm_run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    from rich.console import Console
    from rich.progress import track

    from jacobi_hf.cli._models import arguments_of
    from jacobi_hf.evaluation.decoding import BASELINE
    from jacobi_hf.evaluation.harness import AlternatingLM, Journal, measure
    from jacobi_hf.evaluation.tasks import TaskFile, load_tasks
    from jacobi_hf.loading import load
    from jacobi_hf.results.schema import Results
    from jacobi_hf.resume import Progress

    tasks = load_tasks(
        options.tasks, [TaskFile.read(path) for path in options.task_file], runs_code=options.confirm_run_unsafe_code
    )
    model, tokenizer = load(options.model, options.dtype, options.drafter)
    decoders: dict[str, JacobiConfig | None] = {BASELINE: None, **_decoders(options, model)}
    _configure(tasks, options, model, tokenizer)
    results = Results.start(
        "Scores, tokens per forward and speed of ordinary and Jacobi decoding on the same tasks", model, options.model
    )
    settings = {**asdict(options), "dtype": results.dtype, "device": results.device, "threads": results.threads}
    file = journal_of(options.output) if options.output else None
    lm = AlternatingLM(
        model,
        tokenizer,
        {name: arguments_of(config) for name, config in decoders.items()},
        lambda requests: Journal(Progress(file, {**settings, "requests": requests}) if file else None),
        lambda rows: track(rows, "Generating", console=Console(stderr=True), disable=quiet),
    )
    measured = measure(lm, tasks, decoders, limit=options.limit, chat=options.chat_template, drafter=options.drafter)
    results = results.with_measurements(measured)
    if options.output:
        results.write(options.output)
    return results


def _decoders(options: Evaluation, model: Any) -> dict[str, JacobiConfig | None]:
    """Return how each decoder decodes, by name; if none is given, the model's own decoding unless it is ordinary."""
    from jacobi_hf.cli._models import decoding_of

    if options.decoders:
        return {name: decoding_of(model, knobs) for name, knobs in options.decoders.items()}
    own = decoding_of(model, {})
    return {own.decoding: own} if own else {}


def _check(options: Evaluation) -> None:
    """Raise `ValueError` for options that cannot be used, before a model is loaded."""
    from jacobi_hf.cli._models import check_decoder

    if not options.tasks and not options.task_file:
        raise ValueError("there is nothing to evaluate on: name --tasks, or give a --task-file.")
    for name, knobs in options.decoders.items():
        check_decoder(name, knobs)
    if options.output:
        check_file(options.output)


def _configure(tasks: dict[str, Any], options: Evaluation, model: Any, tokenizer: Any) -> None:
    """Set the tasks' options that were given, and check them against the model's positions."""
    from jacobi_hf.loading import positions_of

    if options.chat_template and tokenizer.chat_template is None:
        raise ValueError(f"{options.model} has no chat template: leave --chat-template out.")
    positions = positions_of(model)
    for name, task in tasks.items():
        if options.max_new_tokens is not None:
            task.set_config("generation_kwargs", {"max_gen_toks": options.max_new_tokens}, update=True)
        if options.num_fewshot is not None and name not in {Path(file).stem for file in options.task_file}:
            task.set_config("num_fewshot", options.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        longest = (task.config.generation_kwargs or {}).get("max_gen_toks", 256)
        if longest >= positions:
            raise ValueError(
                f"{name} asks for up to {longest} new tokens; the model has {positions} positions: "
                "give fewer --max-new-tokens."
            )
