"""`jacobi-hf autotune`: find the fastest decoding for a model, this machine and the user's prompts."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jacobi_hf.cli._errors import check_folder
from jacobi_hf.cli._options import ModelOptions, Sampling, flag, option, required, switch, verb

if TYPE_CHECKING:
    from jacobi_hf.cli._recipes import Call
    from jacobi_hf.tuning.autotune import Tuning
    from jacobi_hf.tuning.strategies import Strategy

GENERATION_CONFIG = "generation_config.json"
ROWS = 8  # of the table that is shown, besides ordinary decoding and what is recommended


@dataclass
class AutotuneOptions(ModelOptions):
    """Options of `jacobi-hf autotune`."""

    prompts: str = required("File of prompts, see above; a dozen of the kind that will be decoded.")
    assistant_model: str | None = option(None, "Draft model, to try transformers' assisted decoding too.")
    column: str | None = option(None, "Column of the prompts, if it has another name; its texts are no questions.")
    chat: bool | None = switch("Put all texts through the chat template, or none. The default is questions only.")
    max_new_tokens: int = option(128, "Most new tokens of a text.", low=1)
    batch_size: int = option(1, "Prompts that will be decoded together.", low=1)
    seconds: float = option(60.0, "How long to try settings.")
    compile: bool = flag("Compile all strategies; allow ten minutes on a CPU.")
    save: bool = flag("Write the recommended setting into the model folder's generation config, if it is faster.")


@verb(lambda: (AutotuneOptions, Sampling), json=True)
def autotune(call: Call) -> None:
    """Try settings on your prompts and recommend one, which may be ordinary decoding. The text is always the same.

    `bench` measures given settings instead, and `eval` scores answers to benchmark questions.

    Prompts come from JSONL, JSON, parquet or text files, or from the Hub: with messages, prompt, question, turns,
    instruction or text, such as the files of GSM8K, HumanEval and MT-bench.
    """
    from jacobi_hf.cli._models import placement_of
    from jacobi_hf.prompts import encode_prompts, read_prompts

    options, sampling = call.parse()
    texts = read_prompts(options.prompts, options.column)
    if options.save:
        _check_can_save(options.model, options.assistant_model)
    from jacobi_hf.loading import check_length, load
    from jacobi_hf.tuning.autotune import autotune as tune

    model, tokenizer = load(options.model, options.dtype, options.drafter)
    assistant = None if options.assistant_model is None else _draft_model(options.assistant_model, model)
    ids = encode_prompts(texts, tokenizer, options.model, chat=options.chat)
    check_length(model, max(map(len, ids)), options.max_new_tokens)
    tuning = tune(
        model,
        ids,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seconds=options.seconds,
        progress=not call.as_json,
        assistant_model=assistant,
        **sampling.arguments(model),
        **_compile_config(compiled=options.compile),
    )
    saved = _save(model, tuning, Path(options.model)) if options.save and _is_worth_saving(model, tuning) else None
    if call.as_json:
        document = {
            "model": options.model,
            "drafter": options.drafter,
            "prompts": len(ids),
            "max_new_tokens": options.max_new_tokens,
            "batch_size": options.batch_size,
            **placement_of(model),
            **_document(tuning),
            "saved": saved,
        }
        typer.echo(json.dumps(document, indent=1))
    else:
        _show(tuning)
        if saved:
            typer.echo(f"saved in {saved}")
        elif options.save:
            typer.echo("nothing saved: no setting is surely faster than what the model does without one")


def _is_worth_saving(model: Any, tuning: Tuning) -> bool:
    """Return whether the recommended strategy is a win, or is ordinary decoding and the model has a saved one."""
    has_saved = getattr(model.generation_config, "decoding", None) is not None
    return tuning.is_win or (tuning.strategy is None and has_saved)


def _compile_config(*, compiled: bool) -> dict[str, Any]:
    from transformers import CompileConfig

    return {"compile_config": CompileConfig()} if compiled else {}


def _draft_model(name: str, model: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from jacobi_hf.loading import reading

    with reading(name, "loaded as a draft model"):
        return AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype).eval().to(model.device)


def _check_can_save(model: str, assistant_model: str | None) -> None:
    if assistant_model is not None:
        raise ValueError(
            "--save with --assistant-model: a generation config cannot name a draft model. Drop one of the two."
        )
    if not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"--save writes into the model's folder, and {model} is none: download it first, or drop --save."
        )
    check_folder(model)


def _save(model: Any, tuning: Tuning, folder: Path) -> str:
    """Write the knobs into the folder's generation config, whole or not at all. Return the file's path."""
    from jacobi_hf.cli._models import make_default

    if tuning.config:
        tuning.config.save_defaults(model)
    else:
        make_default(model, None)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        model.generation_config.save_pretrained(beside)
        (Path(beside) / GENERATION_CONFIG).replace(folder / GENERATION_CONFIG)
    return str(folder / GENERATION_CONFIG)


def _knobs_of(strategy: Strategy) -> dict[str, Any]:
    from jacobi_hf.config import JacobiConfig

    return strategy.to_knobs() if isinstance(strategy, JacobiConfig) else {"decoding": None}


def _document(tuning: Tuning) -> dict[str, Any]:
    from jacobi_hf.tuning.strategies import describe

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value  # JSON has no nan

    table = [
        {
            "strategy": describe(one.strategy, drafted=tuning.drafted),
            "knobs": _knobs_of(one.strategy),
            "prompts": one.prompts,
            "tokens_per_forward": number(one.tokens_per_forward),
            "mean_slots": number(one.mean_slots),
            "seconds": one.seconds,
            "speedup": one.speedup,
            "interval": [one.low, one.high] if one.prompts > 1 else None,
        }
        for one in tuning.table
    ]
    return {
        "recommended": table[tuning.table.index(tuning.recommended)],
        "is_surely_faster": tuning.is_win,
        "fastest": table[0],
        "table": table,
        "untried": [describe(strategy, drafted=tuning.drafted) for strategy in tuning.untried],
    }


def _show(tuning: Tuning) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from jacobi_hf.tuning.autotune import interval_of
    from jacobi_hf.tuning.strategies import describe

    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("strategy", "prompts", "TPF", "slots", "speed-up", "90 % interval"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    shown = [*tuning.table[:ROWS], *(one for one in tuning.table[ROWS:] if one.strategy in (None, tuning.strategy))]
    for one in shown:
        figures = (f"{one.tokens_per_forward:.2f}", f"{one.mean_slots:.1f}", f"{one.speedup:.2f}", interval_of(one))
        table.add_row(describe(one.strategy, drafted=tuning.drafted), str(one.prompts), *figures)
    Console().print(table)
    if len(shown) < len(tuning.table):
        typer.echo(f"{len(tuning.table) - len(shown)} more were slower; --json has all")
    if tuning.untried:
        untried = [describe(strategy, drafted=tuning.drafted) for strategy in tuning.untried]
        typer.echo(f"no time for: {'; '.join(untried)} (give more --seconds)")
    best = tuning.recommended
    name = describe(best.strategy, drafted=tuning.drafted)
    speed = "" if best.strategy is None else f", {best.speedup:.2f} times as fast as ordinary decoding"
    typer.echo(f"recommended: {name}{speed}")
    if tuning.comparison:
        typer.echo(tuning.comparison)
    knobs = ", ".join(f"{name}={value!r}" for name, value in _knobs_of(best.strategy).items())
    typer.echo(f"model.generate(**inputs, {knobs})")
