"""`jacobi-hf autotune`: which setting is fastest for a model, this machine and somebody's prompts."""

from __future__ import annotations

import json as json_module
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from jacobi_hf.cli._answers import (
    DoSample,
    Dtype,
    MaxNewTokens,
    Sampling,
    Temperature,
    TopK,
    TopP,
)
from jacobi_hf.cli._options import check_folder, errors_in_one_line, recipe_option

if TYPE_CHECKING:
    from jacobi_hf.tuning.autotune import Tuning
    from jacobi_hf.tuning.strategies import Strategy

GENERATION_CONFIG = "generation_config.json"


def autotune(
    *,
    model: Annotated[str, typer.Option(help="Model name or folder.")],
    prompts: Annotated[
        Path, typer.Option(help="File of prompts, see above; a dozen of the kind that will be decoded.")
    ],
    drafter: Annotated[str | None, typer.Option(help="Folder or Hub repository of a drafter to decode with.")] = None,
    assistant_model: Annotated[
        str | None, typer.Option(help="Draft model, to try transformers' assisted decoding too.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the model's chat template.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that will be decoded together.")] = 1,
    seconds: Annotated[float, typer.Option(help="How long to try settings.")] = 60.0,
    do_sample: DoSample = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile all strategies; allow ten minutes on a CPU.")
    ] = False,
    dtype: Dtype = "auto",
    save: Annotated[
        bool, typer.Option("--save", help="Write the fastest setting into the model folder's generation config.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print what was measured as one JSON document and nothing else.")
    ] = False,
    config: Annotated[Path | None, recipe_option()] = None,  # noqa: ARG001  (its callback has read it)
) -> None:
    """Try settings on your prompts and tell the fastest, which may be ordinary decoding. The text is the same with all of them.

    A .jsonl file of prompts has one a line, a .json file a list: texts, or objects with "prompt" or "messages". Any other file is text
    with a prompt a line.
    """
    with errors_in_one_line("autotune"):
        from jacobi_hf.io import encode_prompts, read_prompts
        from jacobi_hf.loading import check_length, load
        from jacobi_hf.tuning.autotune import autotune as tune

        sampling, texts = Sampling(do_sample, temperature, top_p, top_k), read_prompts(prompts)
        if save:
            _check_can_save(model, assistant_model)
        loaded, tokenizer = load(model, dtype, drafter)
        assistant = None if assistant_model is None else _draft_model(assistant_model, loaded)
        ids = encode_prompts(texts, tokenizer, model, chat=chat)
        check_length(loaded, max(map(len, ids)), max_new_tokens)
        tuning = tune(
            loaded,
            ids,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seconds=seconds,
            progress=not json,
            assistant_model=assistant,
            **sampling.arguments(loaded),
            **_compile_config(compiled=compiled),
        )
        saved = _save(loaded, tuning, Path(model)) if save else None
    if json:
        where = {
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }
        asked = {
            "model": model,
            "drafter": drafter,
            "prompts": len(ids),
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
        }
        typer.echo(json_module.dumps({**asked, **where, **_document(tuning), "saved": saved}, indent=1))
    else:
        _show(tuning, saved)


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
    """Put the knobs into the folder's generation config, whole or not at all."""
    from jacobi_hf.cli.serve import make_default

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
        }
        for one in tuning.table
    ]
    return {
        "fastest": table[0],
        "table": table,
        "untried": [describe(strategy, drafted=tuning.drafted) for strategy in tuning.untried],
    }


def _show(tuning: Tuning, saved: str | None) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from jacobi_hf.tuning.strategies import describe

    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("strategy", "prompts", "tokens per forward", "slots", "speed-up"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for one in tuning.table:
        figures = (f"{one.tokens_per_forward:.2f}", f"{one.mean_slots:.1f}", f"{one.speedup:.2f}")
        table.add_row(describe(one.strategy, drafted=tuning.drafted), str(one.prompts), *figures)
    Console().print(table)
    if tuning.untried:
        typer.echo(
            f"no time for: {'; '.join(describe(strategy, drafted=tuning.drafted) for strategy in tuning.untried)}"
        )
    best = tuning.table[0]
    typer.echo(
        f"fastest: {describe(best.strategy, drafted=tuning.drafted)}, {best.speedup:.2f} times as fast as ordinary decoding"
    )
    typer.echo(", ".join(f"{name}={value!r}" for name, value in _knobs_of(best.strategy).items()))
    if saved:
        typer.echo(f"saved in {saved}")
