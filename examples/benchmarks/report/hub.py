"""The page on published models that decode without this package."""

from __future__ import annotations

from typing import Any

from .documents import document
from .tables import decimal, identical, source, table


def context() -> dict[str, Any]:
    """Return what the template shows."""
    results = document("custom_generate")
    rows = [
        [
            m.prompts.domain,
            m.decoder.name.removeprefix("custom_generate, "),
            m.model,
            m.prompts.count,
            decimal(m.tokens_per_forward),
            identical(m),
        ]
        for m in results.measurements
    ]
    head = ["domain", "use", "model", "prompts", "TPF", "identical"]
    return {"source": source(results), "table": table(head, rows)}
