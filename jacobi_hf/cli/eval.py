"""`jacobi-hf eval`: what decoding in parallel leaves of a model's scores, and what it gains."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.results import Results


@dataclass
class Evaluation:
    """What is evaluated, and on what.

    Attributes:
        model, drafter: names or folders.
        tasks: of lm-evaluation-harness, by name.
        task_files: JSONL files of problems, see `jacobi_hf.cli.eval_tasks`.
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

    from jacobi_hf.cli.eval_tasks import TaskFile, load_tasks
    from jacobi_hf.cli.evaluation import BASELINE, AlternatingLM, Journal, measure
    from jacobi_hf.cli.loading import decoding_of, load
    from jacobi_hf.results import Results

    tasks = load_tasks(options.tasks, [TaskFile.read(path) for path in options.task_files], runs_code=options.runs_code)
    model, tokenizer = load(options.model, options.dtype, options.drafter)
    decoders: dict[str, JacobiConfig | None] = {BASELINE: None}
    for name, knobs in options.decoders.items():
        decoders[name] = decoding_of(model, knobs)
    if not options.decoders and (own := decoding_of(model, {})):
        decoders[own.decoding] = own
    _configure(tasks, options, model, tokenizer)
    results = Results.start("Scores, tokens per forward and speed of ordinary and Jacobi decoding on the same tasks", model, options.model)
    settings = {**asdict(options), "dtype": results.dtype, "device": results.device, "threads": results.threads}
    journal_file = Path(f"{options.output}.unfinished.jsonl") if options.output else None
    lm = AlternatingLM(
        model, tokenizer, {name: config.to_knobs() if config else {"decoding": None} for name, config in decoders.items()},
        lambda requests: Journal(journal_file, {**settings, "requests": requests}),
        lambda rows: track(rows, "Generating", console=Console(stderr=True), disable=quiet),
    )  # fmt: skip
    measured = measure(lm, tasks, decoders, limit=options.limit, chat=options.chat_template, drafter=options.drafter)
    results = results.with_measurements(measured)
    if options.output:
        results.write(options.output)
    return results


def _check(options: Evaluation) -> None:
    if not options.tasks and not options.task_files:
        raise ValueError("there is nothing to evaluate on: name --tasks, or give a --task-file.")
    for name, least in (("limit", 1), ("num_fewshot", 0), ("max_new_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} cannot be used; it must be at least {least}.")
    if "generate" in options.decoders:
        raise ValueError("'generate' is the name of ordinary decoding, which is always measured: give the decoder another name.")
    for name, knobs in options.decoders.items():
        if "decoding" in knobs and knobs["decoding"] in (None, "none"):
            raise ValueError(f"the decoder {name!r} decodes ordinarily, which is always measured: leave it out.")
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
            raise ValueError(f"{name} asks for up to {longest} new tokens; the model has {room} positions: give fewer --max-new-tokens.")
