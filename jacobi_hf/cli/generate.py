"""`jacobi-hf generate`: continue one prompt."""

from __future__ import annotations

import json as json_module
from pathlib import Path  # noqa: TC003  (typer reads the annotation)
from typing import Annotated, Any

import torch
import typer

from jacobi_hf.cli._answers import (
    Answer,
    DoSample,
    Dtype,
    MaxNewTokens,
    Sampling,
    Seed,
    Temperature,
    TopK,
    TopP,
    note,
    say,
    write,
)
from jacobi_hf.cli._options import errors_in_one_line, recipe_option, with_knobs
from jacobi_hf.io import STDIN, encode_prompts, read_text


@with_knobs
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from stdin.")] = None,
    *,
    model: Annotated[str, typer.Option(help="Model name or folder.")],
    drafter: Annotated[str | None, typer.Option(help="Folder or Hub repository of a drafter to decode with.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Text file with the prompt, instead of one on the command line.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    do_sample: DoSample = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode the ordinary way too: are the texts identical, and how fast?")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print text and figures as one JSON document and nothing else.")
    ] = False,
    config: Annotated[Path | None, recipe_option()] = None,  # noqa: ARG001  (its callback has read it)
    knobs: dict[str, Any],
) -> None:
    """Continue a prompt, shown as it is written; what it took goes to stderr.

    jacobi-hf generate --model Qwen/Qwen3-1.7B "def quicksort(items):"
    """
    from jacobi_hf.cli._models import check_knobs, decoding_of
    from jacobi_hf.loading import check_length, load

    with errors_in_one_line("generate"):
        sampling, text = Sampling(do_sample, temperature, top_p, top_k), read_prompt(prompt, file)
        check_knobs(knobs)
        loaded, tokenizer = load(model, dtype, drafter)
        decoding = decoding_of(loaded, knobs)
        (ids,) = encode_prompts([text], tokenizer, model, chat=chat)
        check_length(loaded, len(ids), max_new_tokens)
        used = decoding.to_knobs() if decoding else {"decoding": None}
        arguments = {"max_new_tokens": max_new_tokens, **sampling.arguments(loaded)}
        if seed is None and arguments["do_sample"]:
            seed = torch.seed() % 2**32  # so that both decodings have the same, and it can be reported
        if compare:
            _warm_up(loaded, tokenizer, ids, arguments, used)
        answer = write(loaded, tokenizer, ids, arguments | used, seed=seed, show=None if json else say)
        if not json:
            _report(answer, used)
        ordinary = write(loaded, tokenizer, ids, arguments | {"decoding": None}, seed=seed) if compare else None
    if json:
        where = {
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }
        document = {
            "model": model,
            "drafter": drafter,
            "prompt": text,
            "text": answer.text,
            "prompt_tokens": len(ids),
            **answer.figures,
            "knobs": used,
            "sampling": {**arguments, "seed": seed},
            **where,
            "warnings": answer.warnings,
        }
        if ordinary:
            document |= {
                "ordinary": {"text": ordinary.text, **ordinary.figures},
                "identical": ordinary.ids == answer.ids,
            }
        typer.echo(json_module.dumps(document, indent=1, ensure_ascii=False))
    elif ordinary:
        _report_comparison(answer, ordinary, loaded.dtype)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt that was given: as an argument, in a file, or on stdin.

    Raises:
        ValueError: there is none, or there are two, or it is empty.
    """
    if (prompt is None) == (file is None):
        raise ValueError("give one prompt: as an argument, - for stdin, or with --file.")
    text = read_text(file or STDIN) if file or prompt == STDIN else str(prompt)
    if not text.strip():
        raise ValueError("the prompt is empty.")
    return text


def _warm_up(model: Any, tokenizer: Any, ids: list[int], arguments: dict[str, Any], knobs: dict[str, Any]) -> None:
    """What only the first calls of a process pay for is in neither of the times that are compared."""
    for way in (knobs, {"decoding": None}):
        write(model, tokenizer, ids, arguments | {"max_new_tokens": 2} | way)


def _report(answer: Answer, knobs: dict[str, Any]) -> None:
    typer.echo()
    note(f"{answer} ({knobs['decoding'] or 'ordinary decoding'})")
    for warning in answer.warnings:
        note(f"jacobi-hf generate: {warning}")


def _report_comparison(answer: Answer, ordinary: Answer, dtype: torch.dtype) -> None:
    note(f"{ordinary} (ordinary decoding)")
    if answer.ids == ordinary.ids:
        note(f"the texts are identical; speed-up {ordinary.seconds / answer.seconds:.2f}")
        return
    same = next(
        (at for at, (a, b) in enumerate(zip(answer.ids, ordinary.ids, strict=False)) if a != b), len(ordinary.ids)
    )
    why = "" if dtype == torch.float32 else f"; in {dtype} two tokens can tie, --dtype float32 tells"
    note(f"the texts differ from new token {same + 1} on{why}. Ordinary decoding wrote:")
    typer.echo(ordinary.text)
