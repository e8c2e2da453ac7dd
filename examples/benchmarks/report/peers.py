"""The page that compares autotuned decoding with transformers' own decoding strategies."""

from __future__ import annotations

from typing import Any

from jacobi_hf.results.schema import Measurement, Results

from .documents import document
from .tables import decimal, identical, source, speedup, table

DOCUMENTS = ("peers", "peers-5.24")
HEAD = [
    "model",
    "domain",
    "",
    "autotuned",
    "tok/s",
    "speed-up over `generate`",
    "best of theirs",
    "tok/s",
    "speed-up over best of theirs",
    "identical",
]


def context() -> dict[str, Any]:
    """Return what the template shows."""
    return {"runs": [run(document(name)) for name in DOCUMENTS]}


def run(results: Results) -> dict[str, Any]:
    """Return what the page shows of one document."""
    first = results.measurements[0].prompts
    names = [m.decoder.name for m in results.measurements]
    return {
        "release": ".".join(results.software.packages["transformers"].split(".")[:2]),
        "source": source(results),
        "others": ", ".join(dict.fromkeys(name for name in names if not name.startswith("autotuned"))),
        "prompts": first.count,
        "max_new_tokens": first.max_new_tokens,
        "compiles_all": "assisted-compiled" in names,
        "early_exit": "early-exit" in names,
        "table": table(HEAD, rows(results)),
    }


def rows(results: Results) -> list[list[str]]:
    """Return two rows for each model and domain: eager and compiled."""
    places = dict.fromkeys((str(m.model), m.prompts.domain) for m in results.measurements)
    return [row(results, *place, compiled=compiled) for place in places for compiled in (False, True)]


def row(results: Results, model: str, domain: str, *, compiled: bool) -> list[str]:
    """Return autotuned decoding beside the fastest strategy of transformers that runs in the same way."""
    place = (model, domain, compiled)
    found = [m for m in results.measurements if (m.model, m.prompts.domain, m.decoder.compiled) == place]
    ours = next(m for m in found if m.decoder.name.startswith("autotuned"))
    best = max((m for m in found if m is not ours), key=lambda m: m.tokens_per_second or 0)
    return [
        model,
        domain,
        "compiled" if compiled else "eager",
        chosen(ours),
        decimal(ours.tokens_per_second, 0),
        speedup(ours, "generate-compiled" if compiled else "generate"),
        best.decoder.name,
        decimal(best.tokens_per_second, 0),
        speedup(ours, best.decoder.name),
        identical(ours),
    ]


def chosen(ours: Measurement) -> str:
    """Return what autotune chose, in words."""
    return "ordinary decoding" if ours.decoder.kind.startswith("generate") else str(ours.extra["setting"])
