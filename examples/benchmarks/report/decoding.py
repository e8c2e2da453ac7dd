"""The page on decoders: side by side, milliseconds by slots, settings, tokens that a forward commits."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from jacobi_hf.results.schema import Measurement, Results

from .documents import document
from .tables import decimal, domains, identical, of_domain, source, speedup, table

OURS = "multiblock-both"
OTHERS = ("jacobi", "multiblock-window", "multiblock-pool", "multiblock-lookup", "prompt-lookup-16")
TIMED = (
    "generate",
    "generate-static-compiled",
    "jacobi",
    "prompt-lookup-16",
    "multiblock-window",
    "multiblock-both",
    "paper",
)
SHOWN_WIDTHS = (1, 2, 8, 11, 16, 17, 32, 33, 49, 57, 65)
LENGTHS = {"1": (1, 1), "2 to 3": (2, 3), "4 to 7": (4, 7), "8 to 15": (8, 15), "16 and more": (16, 1024)}
BEST = 8


def context() -> dict[str, Any]:
    """Return what the template shows."""
    compared = document("decode_compare")
    swept = document("decode_grid")
    accepted = document("acceptance")
    first = compared.measurements[0].prompts
    looping = {m.prompts.domain: len(m.looping or []) for m in compared.measurements}
    return {
        "compared": source(compared),
        "prompts": first.count,
        "max_new_tokens": first.max_new_tokens,
        "looping": ", ".join(f"{count} of {first.count} {domain}" for domain, count in looping.items()),
        "decoders": decoders(compared),
        "lost": "\n".join(lost(compared, domain) for domain in domains(compared)),
        "widths": widths(compared),
        "swept": source(swept),
        "best": BEST,
        "settings": [settings(swept, domain) for domain in domains(swept)],
        "measurements": len(swept.measurements),
        "different": sum(m.agreement.total - m.agreement.identical for m in swept.measurements if m.agreement),
        "accepted": source(accepted),
        "accepted_prompts": accepted.measurements[0].prompts.count,
        "lengths": lengths(accepted),
    }


def acceptance_length(measurement: Measurement) -> float:
    """Return the mean acceptance length.

    Documents without it, and transformers' own decoders, count all decoding forwards, with guesses or without. Each
    prompt has one prefill, which commits one token.
    """
    if measurement.mean_acceptance_length is not None:
        return measurement.mean_acceptance_length
    prefills = measurement.prompts.count
    return ((measurement.new_tokens or 0) - prefills) / ((measurement.forwards or 0) - prefills)


def decoders(results: Results) -> str:
    """Return the table of all decoders by domain."""
    head = [
        "domain",
        "decoder",
        "TPF",
        "loop-free",
        "mean acceptance length",
        "slots",
        "positions per token",
        "tok/s",
        "speed-up over eager",
        "speed-up over compiled",
        "identical",
    ]
    return table(head, map(decoder_row, results.measurements))


def decoder_row(m: Measurement) -> list[str]:
    """Return the row of a decoder on a domain."""
    return [
        m.prompts.domain,
        m.decoder.name,
        decimal(m.tokens_per_forward),
        decimal(m.tokens_per_forward_loop_free),
        decimal(acceptance_length(m)),
        decimal(m.mean_slots, 1),
        decimal((m.mean_slots or 0) / acceptance_length(m), 1),
        decimal(m.tokens_per_second, 0),
        speedup(m, "generate"),
        speedup(m, "generate-static-compiled"),
        identical(m),
    ]


def lost(results: Results, domain: str) -> str:
    """Return a line on the prompts of a domain on which another decoder needs fewer forwards than the defaults."""
    found = {m.decoder.name: m for m in of_domain(results, domain)}
    ours = found[OURS].per_prompt_tokens_per_forward or []
    others = [
        max(row) for row in zip(*(found[name].per_prompt_tokens_per_forward or [] for name in OTHERS), strict=True)
    ]
    prompts = [f"{i} ({a:.2f} against {b:.2f})" for i, (a, b) in enumerate(zip(ours, others, strict=True)) if a < b]
    best = max(found[name].tokens_per_forward or 0 for name in OTHERS)
    ratio = (found[OURS].tokens_per_forward or 0) / best
    listed = f": {', '.join(prompts)}" if prompts else ""
    return f"- {domain}: {ratio:.2f} times as high; more forwards on {len(prompts)} prompts{listed}."


def widths(results: Results) -> str:
    """Return the table of milliseconds per forward by slots."""
    rows = []
    for name in TIMED:
        times: dict[int, list[float]] = defaultdict(list)
        for m in results.measurements:
            for width, value in (m.ms_per_forward or {}).items() if m.decoder.name == name else ():
                times[width].append(value)
        shown = [width for width in sorted(times) if width in SHOWN_WIDTHS or width == max(times)]
        rows += [[name, width, decimal(statistics.median(times[width]))] for width in shown]
    return table(["decoder", "slots", "ms"], rows)


def settings(results: Results, domain: str) -> str:
    """Return the table of the fastest settings of a domain, and of those with the highest TPF."""
    ours = [m for m in of_domain(results, domain) if m.decoder.kind == "jacobi_multiblock"]
    fastest = sorted(ours, key=lambda m: -(m.tokens_per_second or 0))[:BEST]
    highest = sorted(ours, key=lambda m: (-(m.tokens_per_forward or 0), m.mean_slots or 0))[: BEST // 2]
    rows = [
        [
            domain,
            m.decoder.name,
            decimal(m.tokens_per_forward),
            decimal(m.mean_slots, 1),
            decimal(m.tokens_per_second, 0),
            speedup(m, "generate"),
        ]
        for m in (*fastest, *highest)
    ]
    return table(["domain", "setting", "TPF", "slots", "tok/s", "speed-up over eager"], rows)


def lengths(results: Results) -> str:
    """Return the table of how many tokens the decoding forwards commit."""
    rows = [
        [m.prompts.domain, m.decoder.name, m.model, decimal(m.tokens_per_forward), *shares(m.accepted_lengths or {})]
        for m in results.measurements
    ]
    return table(["domain", "decoder", "model", "TPF", *LENGTHS], rows)


def shares(counts: dict[int, int]) -> list[str]:
    """Return the share of the forwards in each range of `LENGTHS`; `counts` has the forwards by committed tokens."""
    total = sum(counts.values())
    return [
        f"{100 * sum(n for length, n in counts.items() if low <= length <= high) / total:.0f} %"
        for low, high in LENGTHS.values()
    ]
