"""`jacobi-hf eval`: what decoding in parallel leaves of a model's scores, and what it gains."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jacobi_hf.cli._options import errors_in_one_line, mapping, recipe_option, with_knobs

if TYPE_CHECKING:
    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.results.schema import Results


@dataclass
class Evaluation:
    """What is evaluated, and on what.

    Attributes:
        model, drafter: names or folders.
        tasks: of lm-evaluation-harness, by name.
        task_files: JSONL files of problems, see `jacobi_hf.evaluation.tasks`.
        limit: most problems of a task.
        num_fewshot: worked examples before each problem; as the task says, when None.
        max_new_tokens: instead of the tasks' own.
        chat_template: whether prompts go through the chat template.
        runs_code: whether tasks may run code that the model writes.
        decoders: knobs of each decoder by name; one with the model's own knobs when there are none. Ordinary decoding is always measured.
        output: JSON file of the results; beside it, outputs are kept until the evaluation is finished.
    """

    model: str
    drafter: str | None = None
    tasks: list[str] = field(default_factory=list)
    task_files: list[str] = field(default_factory=list)
    limit: int | None = None
    num_fewshot: int | None = None
    max_new_tokens: int | None = None
    chat_template: bool = False
    runs_code: bool = False
    dtype: str = "auto"
    decoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    output: str | None = None


@with_knobs
def eval_(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Option(help="Model name or folder.")],
    drafter: Annotated[str | None, typer.Option(help="Folder or Hub repository of a drafter to decode with.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness by name (or its YAML files), with commas.")
    ] = None,
    task_file: Annotated[
        list[str] | None, typer.Option(help="JSONL file of problems, see above; may be given several times.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Worked examples before each problem, instead of the task's own.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="New tokens of an answer, instead of the task's own.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put prompts through the model's chat template.")
    ] = False,
    runs_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="Allow tasks that run code which the model writes. Use a sandbox."
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto (as the weights are), float32, bfloat16 or float16.")] = "auto",
    output: Annotated[
        str | None, typer.Option(help="JSON file for the results. An interrupted run goes on when it is run again.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON document and nothing else.")
    ] = False,
    config: Annotated[Path | None, recipe_option("decoders")] = None,  # noqa: ARG001  (its callback has read it)
    knobs: dict[str, Any],
) -> None:
    r"""Answer the same questions with ordinary and with Jacobi decoding: scores, identity, tokens per forward, speed.

    Prompts are answered one at a time, by each decoder in turn, and scored by lm-evaluation-harness. A recipe's section may hold
    `decoders`, knobs by name, to compare several.

    A task file is JSONL. A problem a line: {"prompt": "6 * 7 =", "answer": 42}. An optional first line says how to read answers:
    {"answer_pattern": "(-?\d+)", "max_new_tokens": 32, "stop": ["\n"]}; without a pattern the whole text has to be the answer.
    """
    with errors_in_one_line("eval") as ending:
        decoders = mapping(context, "decoders")
        if knobs and decoders:
            raise ValueError(f"{', '.join(knobs)} given besides the recipe's decoders, which have knobs of their own.")
        if knobs:
            decoders = {str(knobs.get("decoding") or "jacobi_multiblock"): knobs}
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        options = Evaluation(
            model,
            drafter,
            names,
            task_file or [],
            limit,
            num_fewshot,
            max_new_tokens,
            chat_template,
            runs_code,
            dtype,
            decoders,
            output,
        )
        if output:
            ending.kept = lambda: (
                f"what was generated is kept in {journal_of(output)}; the same command goes on from there"
            )
        results = run(options, quiet=json)
    typer.echo(results.model_dump_json(indent=1, exclude_none=True)) if json else _show(results, output)


def journal_of(output: str) -> Path:
    """Where outputs are kept until the results are there."""
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
        f"{results.model}, {results.dtype} on {results.hardware.gpu or results.device}; one prompt at a time, each generated once; "
        "identical and speed-up: to eager generate().",
        style="dim",
    )
    if output:
        console.print(output, style="dim")


def run(options: Evaluation, *, quiet: bool = False) -> Results:
    """Evaluate, and write the results where `output` says.

    Raises:
        ValueError, OSError: something is wrong with the options; nothing was generated.
    """
    _check(options)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("evaluation needs lm-evaluation-harness: pip install 'jacobi-hf[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if options.runs_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    from rich.console import Console
    from rich.progress import track

    from jacobi_hf.cli._models import decoding_of
    from jacobi_hf.evaluation.harness import BASELINE, AlternatingLM, Journal, measure
    from jacobi_hf.evaluation.tasks import TaskFile, load_tasks
    from jacobi_hf.loading import load
    from jacobi_hf.results.schema import Results
    from jacobi_hf.resume import Progress

    tasks = load_tasks(
        options.tasks, [TaskFile.read(path) for path in options.task_files], runs_code=options.runs_code
    )
    model, tokenizer = load(options.model, options.dtype, options.drafter)
    decoders: dict[str, JacobiConfig | None] = {BASELINE: None}
    for name, knobs in options.decoders.items():
        decoders[name] = decoding_of(model, knobs)
    if not options.decoders and (own := decoding_of(model, {})):
        decoders[own.decoding] = own
    _configure(tasks, options, model, tokenizer)
    results = Results.start(
        "Scores, tokens per forward and speed of ordinary and Jacobi decoding on the same tasks", model, options.model
    )
    settings = {**asdict(options), "dtype": results.dtype, "device": results.device, "threads": results.threads}
    file = journal_of(options.output) if options.output else None
    lm = AlternatingLM(
        model,
        tokenizer,
        {name: config.to_knobs() if config else {"decoding": None} for name, config in decoders.items()},
        lambda requests: Journal(Progress(file, {**settings, "requests": requests}) if file else None),
        lambda rows: track(rows, "Generating", console=Console(stderr=True), disable=quiet),
    )
    measured = measure(lm, tasks, decoders, limit=options.limit, chat=options.chat_template, drafter=options.drafter)
    results = results.with_measurements(measured)
    if options.output:
        results.write(options.output)
    return results


def _check(options: Evaluation) -> None:
    from jacobi_hf.cli._models import check_decoder

    if not options.tasks and not options.task_files:
        raise ValueError("there is nothing to evaluate on: name --tasks, or give a --task-file.")
    for name, least in (("limit", 1), ("num_fewshot", 0), ("max_new_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} cannot be used; it must be at least {least}.")
    for name, knobs in options.decoders.items():
        check_decoder(name, knobs)
    if options.output and Path(options.output).is_dir():
        raise ValueError(f"{options.output} is a folder: give the file that the results go to.")
    if options.output:
        parent = Path(options.output).resolve().parent
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK):
            raise ValueError(f"{parent} is not writable: choose another output.")


def _configure(tasks: dict[str, Any], options: Evaluation, model: Any, tokenizer: Any) -> None:
    """What the options say instead of the tasks; checked against what the model can hold."""
    if options.chat_template and tokenizer.chat_template is None:
        raise ValueError(f"{options.model} has no chat template: leave --chat-template out.")
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for name, task in tasks.items():
        if options.max_new_tokens is not None:
            task.set_config("generation_kwargs", {"max_gen_toks": options.max_new_tokens}, update=True)
        if options.num_fewshot is not None and name not in {Path(file).stem for file in options.task_files}:
            task.set_config("num_fewshot", options.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        longest = (task.config.generation_kwargs or {}).get("max_gen_toks", 256)
        if room is not None and longest >= room:
            raise ValueError(
                f"{name} asks for up to {longest} new tokens; the model has {room} positions: give fewer --max-new-tokens."
            )
