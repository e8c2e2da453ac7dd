"""`jacobi-hf generate`: continue one prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from jacobi_hf.cli._options import ModelOptions, Sampling, argument, flag, option, verb
from jacobi_hf.io import STDIN, read_text
from jacobi_hf.prompts import encode_prompts

if TYPE_CHECKING:
    from jacobi_hf.cli._answers import Answer
    from jacobi_hf.cli._recipes import Call


@dataclass
class GenerateOptions(ModelOptions):
    """Options of `jacobi-hf generate`."""

    prompt: str | None = argument("The prompt; - reads it from stdin.", optional=True)
    file: str | None = option(None, "Text file with the prompt, instead of one on the command line.")
    chat: bool = flag("Put the prompt through the model's chat template.")
    max_new_tokens: int = option(256, "Most new tokens of the text.", low=1)
    seed: int | None = option(
        None, "Seed of torch's random generator; with the same seed, the same text is sampled.", low=0
    )
    compare: bool = flag("Also decode the ordinary way, and compare texts and speed.")


def _kinds() -> tuple[type, ...]:
    from jacobi_hf.cli._models import KnobOptions

    return GenerateOptions, Sampling, KnobOptions


@verb(_kinds, json=True)
def generate(call: Call) -> None:
    """Continue a prompt. The text is shown while it is written; its figures go to stderr.

    jacobi-hf generate --model Qwen/Qwen3-1.7B "def quicksort(items):"
    """
    from jacobi_hf.cli import _models

    options, sampling, knobs = call.parse()
    text = read_prompt(options.prompt, options.file)
    given = _models.given_knobs(knobs)
    _models.check_knobs(given)
    from jacobi_hf.cli._answers import say, write
    from jacobi_hf.loading import check_table, load

    model, tokenizer = load(options.model, options.dtype, options.drafter)
    knobs = _models.arguments_of(_models.decoding_of(model, given))
    (ids,) = encode_prompts([text], tokenizer, options.model, chat=options.chat)
    check_table(model, len(ids), options.max_new_tokens)
    arguments = {"max_new_tokens": options.max_new_tokens, **sampling.arguments(model)}
    seed = _seed(options.seed, arguments)
    if options.compare:
        _warm_up(model, tokenizer, ids, arguments, knobs)
    answer = write(model, tokenizer, ids, arguments | knobs, seed=seed, show=None if call.as_json else say)
    if not call.as_json:
        _report(answer, knobs)
    ordinary = None
    if options.compare:
        ordinary = write(model, tokenizer, ids, arguments | {"decoding": None}, seed=seed)
    if call.as_json:
        document = {
            "model": options.model,
            "drafter": options.drafter,
            "prompt": text,
            "text": answer.text,
            "prompt_tokens": len(ids),
            **answer.figures,
            "knobs": knobs,
            "sampling": {**arguments, "seed": seed},
            **_models.placement_of(model),
            "warnings": answer.warnings,
            **(_comparison(answer, ordinary) if ordinary else {}),
        }
        typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
    elif ordinary:
        _report_comparison(answer, ordinary, str(model.dtype))


def read_prompt(prompt: str | None, file: str | None) -> str:
    """Return the prompt that was given: as an argument, in a file, or on standard input.

    Raises:
        ValueError: There is no prompt, there are two, or the prompt is empty.
    """
    if (prompt is None) == (file is None):
        raise ValueError("give one prompt: as an argument, - for stdin, or with --file.")
    text = read_text(file or STDIN) if file or prompt == STDIN else str(prompt)
    if not text.strip():
        raise ValueError("the prompt is empty.")
    return text


def _seed(seed: int | None, arguments: dict[str, Any]) -> int | None:
    """Return the seed for both decodings. If they sample without a given seed, one is drawn and reported."""
    import torch

    return torch.seed() % 2**32 if seed is None and arguments["do_sample"] else seed


def _warm_up(model: Any, tokenizer: Any, ids: list[int], arguments: dict[str, Any], knobs: dict[str, Any]) -> None:
    """Decode two tokens in both ways, so that the costs of a process's first calls are in neither time."""
    from jacobi_hf.cli._answers import write

    for decoding in (knobs, {"decoding": None}):
        write(model, tokenizer, ids, arguments | {"max_new_tokens": 2} | decoding)


def _report(answer: Answer, knobs: dict[str, Any]) -> None:
    from jacobi_hf.cli._answers import note

    typer.echo()
    note(f"{answer} ({knobs['decoding'] or 'ordinary decoding'})")
    for warning in answer.warnings:
        note(f"jacobi-hf generate: {warning}")


def _comparison(answer: Answer, ordinary: Answer) -> dict[str, Any]:
    return {"ordinary": {"text": ordinary.text, **ordinary.figures}, "identical": ordinary.ids == answer.ids}


def _report_comparison(answer: Answer, ordinary: Answer, dtype: str) -> None:
    from jacobi_hf.cli._answers import note

    note(f"{ordinary} (ordinary decoding)")
    if answer.ids == ordinary.ids:
        note(f"the texts are identical; speed-up {ordinary.seconds / answer.seconds:.2f}")
        return
    pairs = enumerate(zip(answer.ids, ordinary.ids, strict=False))
    first = next((at for at, (ours, theirs) in pairs if ours != theirs), len(ordinary.ids))
    why = "" if dtype == "torch.float32" else f"; in {dtype} two tokens can tie, --dtype float32 shows whether they do"
    note(f"the texts differ from new token {first + 1} on{why}. Ordinary decoding wrote:")
    typer.echo(ordinary.text)
