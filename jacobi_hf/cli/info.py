"""`jacobi-hf info`: what is installed, and whether a model decodes in parallel here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import typer

from jacobi_hf.cli._options import Options, argument, option, verb

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from jacobi_hf.cli._recipes import Call
    from jacobi_hf.environment import Environment
    from jacobi_hf.inspection import ModelFacts


@dataclass
class InfoOptions(Options):
    """Options of `jacobi-hf info`."""

    model: str | None = argument("Model name or folder; if given, how it would decode.", optional=True)
    drafter: str | None = option(None, "Folder or Hub repository of a drafter; if given, whether it fits the model.")


@verb(lambda: (InfoOptions,), json=True)
def info(call: Call) -> None:
    """Print what is installed, on what it runs, and whether a model would decode with Jacobi or fall back, and why.

    Only the model's configuration is read, never its weights.
    """
    (options,) = call.parse()
    model = options.model
    drafter = options.drafter
    if drafter is not None and model is None:
        raise ValueError(
            f"--drafter {drafter} is for a model, and none is named: jacobi-hf info MODEL --drafter {drafter}"
        )
    from jacobi_hf.environment import Environment, versions

    facts = None if model is None else _facts_of(model, drafter)
    if not call.as_json:
        _show(versions().items())  # at once; the rest has to import torch
    here = Environment.here()
    if call.as_json:
        typer.echo(json.dumps({**asdict(here), "model": asdict(facts) if facts else None}, indent=1))
    else:
        _show([*_environment(here), *(_model(facts) if facts else ())])


def _show(lines: Iterable[tuple[str, str]]) -> None:
    for name, value in lines:
        typer.echo(f"{name:<14}{value}" if name else "")


def _facts_of(model: str, drafter: str | None) -> ModelFacts:
    from jacobi_hf.inspection import inspect_model  # imports transformers, which takes seconds

    return inspect_model(model, drafter)


def _environment(here: Environment) -> Iterator[tuple[str, str]]:
    yield "device", f"{here.device} ({here.device_name}), {here.threads} thread{'s' * (here.threads != 1)} on the CPU"
    yield "registered", f"up to {len(here.registered)} classes of transformers; jacobi-hf info MODEL says it of one"
    yield "kernels", ", ".join(["sdpa", *(f"{'' if there else 'no '}{name}" for name, there in here.kernels.items())])
    complete = [name for name, lacking in here.extras.items() if not lacking]
    yield "extras", ", ".join(complete) or "none"
    for name, lacking in here.extras.items():
        if lacking:
            yield "no extra", f"{name}: pip install 'jacobi-hf[{name}]' adds {', '.join(lacking)}"


def _model(facts: ModelFacts) -> Iterator[tuple[str, str]]:
    yield "", ""
    yield "model", facts.name
    how = "registered" if facts.is_registered else "not registered"
    if not facts.is_registered and facts.decoding == "runs":
        how = f"jacobi_hf.register({facts.model_class}) in Python; commands do it themselves"
    yield "class", f"{facts.model_class} ({how})"
    limit = f", {facts.positions} positions" if facts.positions else ""
    yield (
        "size",
        f"{facts.parameters:,} parameters in {facts.dtype}, {facts.vocabulary} tokens in the vocabulary{limit}",
    )
    layers = ", ".join(f"{count} layers of {kind}" for kind, count in facts.layers.items())
    yield "attention", ", ".join([facts.attention, *(f"{name} in steps" for name in facts.kernels), layers])
    if facts.drafter:
        about = facts.drafter
        yield (
            "drafter",
            f"rank {about['rank']} beside {about['weights']} weight matrices, made for {about['base_model']}",
        )
    saved = ", ".join(f"{name}={value}" for name, value in facts.saved_knobs.items())
    yield "saved knobs", saved or "none: decoding='jacobi_multiblock' is to be named in each call of generate"
    yield "decoding", facts.decoding if facts.reason is None else f"{facts.decoding}: {' '.join(facts.reason.split())}"
    if facts.inexact is not None:
        yield "exactness", facts.inexact
