"""The page on draft sources, alone and together, on the base, with a drafter, and on the forced model."""

from __future__ import annotations

from typing import Any

from jacobi_hf.results.schema import Measurement, Results

from .documents import document
from .tables import decimal, domains, of_domain, source, table


def context() -> dict[str, Any]:
    """Return what the template shows."""
    results = document("draft_sources")
    models = list(dict.fromkeys(str(m.model) for m in results.measurements))
    return {
        "source": source(results),
        "prompts": results.measurements[0].prompts.count,
        "table": table(["domain", "draft sources", *models, "slots", "identical"], rows(results, models)),
    }


def rows(results: Results, models: list[str]) -> list[list[str]]:
    """Return the rows of all domains: greedy, then sampled where that was measured."""
    names = list(dict.fromkeys(m.decoder.name for m in results.measurements if m.decoder.name != "generate"))
    found = []
    for domain in domains(results):
        for name in names:
            measured = [m for m in of_domain(results, domain) if m.decoder.name == name]
            for sampled in (False, True):
                by_model = {str(m.model): m for m in measured if m.prompts.do_sample == sampled}
                if by_model:
                    found.append([domain, name + ", T = 1" * sampled, *cells(by_model, models)])
    return found


def cells(by_model: dict[str, Measurement], models: list[str]) -> list[str]:
    """Return TPF (loop-free) of each model, the slots of each, and the outputs that are identical."""
    same = {f"{m.agreement.identical} of {m.agreement.total}" for m in by_model.values() if m.agreement}
    return [
        *(tokens_per_forward(by_model.get(model)) for model in models),
        " / ".join(decimal(by_model[model].mean_slots, 0) if model in by_model else "-" for model in models),
        ", ".join(sorted(same)),
    ]


def tokens_per_forward(m: Measurement | None) -> str:
    """Return TPF, and loop-free TPF in brackets; a dash where nothing was measured."""
    return "-" if m is None else f"{decimal(m.tokens_per_forward)} ({decimal(m.tokens_per_forward_loop_free)})"
