"""Markdown tables, and the cells that several pages share."""

from __future__ import annotations

from collections.abc import Iterable

from jacobi_hf.results.schema import Measurement, Results

NOTHING = "-"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; all columns except the first two are aligned right."""
    names = list(head)
    rule = "|".join("---" if number < 2 else "---:" for number in range(len(names)))
    lines = [" | ".join(map(str, row)) for row in (names, *rows)]
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def source(results: Results) -> str:
    """Return the command, machine and versions of a document, in two sentences."""
    packages = results.software.packages
    threads = f"{results.threads} thread{'s' * (results.threads != 1)}"
    parts = [
        f"`{results.command}` on {results.hardware.cpu} ({results.device}, {threads})",
        results.dtype,
        results.attention,
        f"torch {packages['torch']}",
        f"transformers {packages['transformers']}",
        f"revision {results.software.git_revision}",
        results.created[:10],
    ]
    return f"{', '.join(parts)}. Model: {results.model}, {results.parameters / 1e6:.1f} M parameters."


def decimal(value: float | None, digits: int = 2) -> str:
    """Return a number with so many digits, or a dash for None."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def speedup(measurement: Measurement, baseline: str) -> str:
    """Return the speed-up over a baseline, or a dash where the document has none."""
    return decimal(next((s.factor for s in measurement.speedups if s.baseline == baseline), None))


def identical(measurement: Measurement) -> str:
    """Return how many outputs have the tokens of the reference, or a dash."""
    agreement = measurement.agreement
    return NOTHING if agreement is None else f"{agreement.identical} of {agreement.total}"


def domains(results: Results) -> list[str]:
    """Return the domains of a document in their order."""
    return list(dict.fromkeys(m.prompts.domain for m in results.measurements))


def of_domain(results: Results, domain: str) -> list[Measurement]:
    """Return the measurements on a domain."""
    return [m for m in results.measurements if m.prompts.domain == domain]


def decoder_rows(documents: dict[str, Results]) -> list[list[str]]:
    """Return a row for each domain, decoder and document that compared outputs with `generate`."""
    found = [(name, m) for name, results in documents.items() for m in results.measurements]
    keys = dict.fromkeys((m.prompts.domain, m.decoder.name) for _, m in found if m.tokens_per_forward is not None)
    return [
        [
            *key,
            name,
            decimal(m.tokens_per_forward),
            decimal(m.tokens_per_forward_loop_free),
            decimal(m.mean_slots, 1),
            identical(m),
        ]
        for key in keys
        for name, m in found
        if (m.prompts.domain, m.decoder.name) == key and m.agreement is not None
    ]


def held_out_loss(results: Results, domain: str) -> float | None:
    """Return the loss on held-out text of a domain in nats per token, or None."""
    return next((m.held_out_loss for m in of_domain(results, domain) if m.held_out_loss is not None), None)


def exact_match(results: Results, domain: str) -> str:
    """Return the share of right answers of a domain with its interval, or a dash."""
    found = next((m.quality for m in of_domain(results, domain) if m.quality is not None), None)
    if found is None:
        return NOTHING
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] of {found.samples}"
