"""The page on equality in bf16."""

from __future__ import annotations

from typing import Any

from .documents import document
from .tables import source, table


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
    return {"source": source(results), "table": table(head, rows)}
