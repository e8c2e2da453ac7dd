"""The page on equality in bf16 and with quantised activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .documents import document
from .tables import source, table

if TYPE_CHECKING:
    from jacobi_hf.results.schema import Measurement, Results


def context() -> dict[str, Any]:
    """Return what the template shows."""
    results = document("bf16")
    rows = [
        [
            m.prompts.domain,
            m.decoder.name,
            f"{m.agreement.total - m.agreement.identical} of {m.agreement.total}",
            m.extra["mismatches_per_1000_tokens"],
        ]
        for m in results.measurements
        if m.agreement
    ]
    head = ["domain", "decoder", "texts that differ", "per 1000 tokens"]
    quantised = document("quantised")
    return {
        "source": source(results),
        "table": table(head, rows),
        "quantised_source": source(quantised),
        "quantised": table(
            ["activations", "decoder", "texts that differ", "per 1000 tokens", "largest gap of logits"],
            _by_scheme(quantised),
        ),
    }


def _by_scheme(results: Results) -> list[list[Any]]:
    """Return a row for each scheme and decoder, with all domains together."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in results.measurements:
        groups.setdefault((measurement.extra["scheme"], measurement.decoder.name), []).append(measurement)
    rows = []
    for (scheme, decoder), group in groups.items():
        total = sum(m.agreement.total for m in group if m.agreement)
        different = total - sum(m.agreement.identical for m in group if m.agreement)
        tokens = sum(m.extra["tokens_compared"] for m in group)
        gap = max(m.extra["largest_gap"] for m in group)
        rate = f"{1000 * different / tokens:.2f}"
        rows.append([scheme, decoder, f"{different} of {total}", rate, f"{gap:.3f}" if different else "-"])
    return rows
