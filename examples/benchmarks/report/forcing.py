"""The page on Jacobi Forcing: the forced model, ablations of its recipe, the cost of collecting and training."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from jacobi_hf.results.schema import Cost, Results
from jacobi_hf.results.training import Training

from .documents import FORCING, TINY, document, group
from .tables import decimal, decoder_rows, domains, exact_match, held_out_loss, source, table

TIMES = TINY / "forced" / "times.tsv"


def context() -> dict[str, Any]:
    """Return what the template shows."""
    models = {**group(FORCING, "base"), **group(FORCING, "forced"), **group(FORCING, "control")}
    varied = group(FORCING, "ablation-")
    costs = document("training")
    minutes = minutes_by_part()
    head = ["domain", "decoder", "model", "TPF", "loop-free", "slots", "identical"]
    return {
        "sources": [described(name, results) for name, results in models.items()],
        "decoders": table(head, decoder_rows(models)),
        "quality": quality(models),
        "minutes": decimal(sum(minutes.values()), 1),
        "parts": ", ".join(f"{name} {value:.1f}" for name, value in minutes.items()),
        "ablations_source": source(next(iter(varied.values()))),
        "ablations": ablations(varied),
        "costs_source": source(costs),
        "costs": table(["what", "measured", "relative to", "repeats"], map(cost_row, costs.costs)),
    }


def described(name: str, results: Results) -> str:
    """Return a list item that says how a model was measured and trained."""
    trained = f"\n  Trained by {training(results.training[-1])}." if results.training else ""
    return f"- **{name}**: {source(results)}{trained}"


def training(stage: Training) -> str:
    """Return the command, length and time of a stage of training, in a phrase."""
    threads = f"{stage.threads} thread{'s' * (stage.threads != 1)}"
    amount = f"{stage.steps} steps, {stage.slots / 1e6:.2f} M slots"
    return f"`{stage.command}`, {amount}, {stage.minutes:.1f} minutes on {threads}, seed {stage.seed}"


def quality(models: dict[str, Results]) -> str:
    """Return the table of held-out loss and exact match."""
    names = dict.fromkeys(domain for results in models.values() for domain in domains(results))
    rows = [
        [domain, name, decimal(held_out_loss(results, domain), 3), exact_match(results, domain)]
        for domain in names
        for name, results in models.items()
    ]
    return table(["domain", "model", "held-out loss", "exact match"], rows)


def minutes_by_part() -> dict[str, float]:
    """Return the minutes of each part of force.sh, over all its starts.

    times.tsv has a line for the end of each part and for each start of the script: the name and the second.
    """
    lines = [line.split("\t") for line in TIMES.read_text(encoding="utf-8").splitlines()]
    minutes: dict[str, float] = defaultdict(float)
    for (_, before), (name, after) in itertools.pairwise(lines):
        if name != "start":  # the time before a start is a pause
            minutes[name] += (int(after) - int(before)) / 60
    return minutes


def ablations(documents: dict[str, Results]) -> str:
    """Return the table of the variations of the short recipe."""
    head = [
        "variation",
        "revision",
        "minutes",
        "TPF arithmetic",
        "TPF code",
        "code, loop-free",
        "exact match",
        "held-out loss, code",
    ]
    return table(head, (ablation_row(name, results) for name, results in documents.items()))


def ablation_row(name: str, results: Results) -> list[str]:
    """Return the row of a variation."""
    by_domain = {m.prompts.domain: m for m in results.measurements if m.tokens_per_forward is not None}
    return [
        name.removeprefix("ablation-"),
        results.software.git_revision or "-",
        decimal(results.training[-1].minutes, 1),
        decimal(by_domain["arithmetic"].tokens_per_forward),
        decimal(by_domain["code"].tokens_per_forward),
        decimal(by_domain["code"].tokens_per_forward_loop_free or 0),
        exact_match(results, "arithmetic"),
        decimal(held_out_loss(results, "code"), 3),
    ]


def cost_row(cost: Cost) -> list[object]:
    """Return the row of a cost of collecting or training."""
    against = "-" if cost.factor is None else f"{cost.factor:.2f} x {cost.baseline}"
    return [cost.name, f"{cost.value:.4g} {cost.unit}", against, cost.repeats]
