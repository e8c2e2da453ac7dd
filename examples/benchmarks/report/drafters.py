"""The page on drafters: by seed, controls, windows timed alone, and decoding strategies with all that they cost."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from jacobi_hf.results.schema import Measurement, Results
from jacobi_hf.results.training import Training

from .documents import DRAFTERS, FORCING, TINY, document, group
from .tables import decimal, decoder_rows, domains, held_out_loss, identical, source, speedup, table

WHOLE = "window-n2-K8-r0"
HALF = "window-n2-K8-r0-half"


def context() -> dict[str, Any]:
    """Return what the template shows."""
    drafters = group(DRAFTERS, "drafter-")
    controls = group(DRAFTERS, "control-")
    clock = document("drafter_clock")
    return {
        "sources": [described(name, results) for name, results in drafters.items()],
        "decoders": table(
            ["domain", "decoder", "drafter", "TPF", "loop-free", "slots", "identical"], decoder_rows(drafters)
        ),
        "controls": table(
            ["variation", "minutes", "arithmetic", "8 verified", "code", "8 verified", "code, loop-free"],
            (control_row(name, results) for name, results in controls.items()),
        ),
        "clock_source": source(clock),
        "clock": table(
            ["model", "decoder", "TPF", "slots", "tok/s", "speed-up over eager", "identical"],
            map(clock_row, clock.measurements),
        ),
        "strategies": strategies(drafters["drafter-seed42"]),
    }


def described(name: str, results: Results) -> str:
    """Return a list item that says how a drafter was measured and trained."""
    stage = results.training[-1]
    threads = f"{stage.threads} thread{'s' * (stage.threads != 1)}"
    amount = f"{stage.steps} steps, {stage.slots / 1e6:.2f} M draft slots"
    trained = f"Trained by `{stage.command}`, {amount}, {stage.minutes:.1f} minutes on {threads}."
    return f"- **{name}**: {source(results)}\n  {trained}"


def control_row(name: str, results: Results) -> list[str]:
    """Return the row of a variation of the short recipe."""
    found = {(m.prompts.domain, m.decoder.name): m for m in results.measurements}
    yields = [found[domain, decoder] for domain in ("arithmetic", "code") for decoder in (WHOLE, HALF)]
    return [
        name.removeprefix("control-"),
        decimal(results.training[-1].minutes, 1),
        *(decimal(m.tokens_per_forward) for m in yields),
        decimal(found["code", WHOLE].tokens_per_forward_loop_free),
    ]


def clock_row(m: Measurement) -> list[str]:
    """Return the row of a timed window."""
    return [
        str(m.model),
        m.decoder.name,
        decimal(m.tokens_per_forward),
        decimal(m.mean_slots, 1),
        decimal(m.tokens_per_second, 0),
        speedup(m, "generate"),
        identical(m),
    ]


class Strategy(NamedTuple):
    """A decoding strategy of the last table, with what it costs.

    Attributes:
        name: what the table calls it.
        model: the model of the document that it was measured on.
        decoder: the decoder's name in the document.
        megabytes: what has to be published beside the base model, or in its place.
        training: minutes of training and threads.
        changes_text: whether the model is another one than the base.
    """

    name: str
    model: str
    decoder: str
    megabytes: float = 0.0
    training: str = "0"
    changes_text: bool = False


def strategies(drafter: Results) -> str:
    """Return the table of decoding strategies: speed, change of held-out loss, size, training."""
    peers = document("peers")
    base = document(f"{FORCING}/base")
    forced = document(f"{FORCING}/forced-seed42")
    compared = compared_strategies(forced.training, drafter.training)
    rows = []
    for domain in domains(peers):
        drift = (held_out_loss(forced, domain) or 0) - (held_out_loss(base, domain) or 0)
        rows += [strategy_row(peers, domain, one, drift) for one in compared]
    head = [
        "domain",
        "strategy",
        "setting",
        "TPF",
        "tok/s",
        "speed-up over eager",
        "loss",
        "MB to publish",
        "training",
    ]
    return table(head, rows)


def compared_strategies(forced: list[Training], drafter: list[Training]) -> list[Strategy]:
    """Return the strategies of the table."""
    draft = json.loads((TINY / "draft" / "training.json").read_text(encoding="utf-8"))
    draft_minutes = f"{draft['minutes_of_this_process_to_the_end_of_training']:.0f} x {draft['threads']}"
    return [
        Strategy(
            "Jacobi Forcing",
            "forced",
            "autotuned",
            megabytes("forced/model.safetensors"),
            minutes(forced),
            changes_text=True,
        ),
        Strategy(
            "drafter", "base + drafter", "autotuned", megabytes("drafter/drafter_model.safetensors"), minutes(drafter)
        ),
        Strategy("prompt lookup", "base", "prompt-lookup-10"),
        Strategy(
            "assisted by a 1.1 M draft model", "base", "assisted", megabytes("draft/model.safetensors"), draft_minutes
        ),
    ]


def megabytes(file: str) -> float:
    """Return the size of a file of the tiny example."""
    return (TINY / file).stat().st_size / 1e6


def minutes(stages: list[Training]) -> str:
    """Return the minutes of all stages, times the threads."""
    return f"{sum(stage.minutes for stage in stages):.0f} x {stages[-1].threads}"


def strategy_row(peers: Results, domain: str, one: Strategy, drift: float) -> list[str]:
    """Return the row of a strategy on a domain; `drift` is the forced model's held-out loss less the base's."""
    place = (one.model, domain, one.decoder)
    m = next(m for m in peers.measurements if (m.model, m.prompts.domain, m.decoder.name) == place)
    return [
        domain,
        one.name,
        m.extra.get("setting", ""),
        decimal(m.tokens_per_forward),
        decimal(m.tokens_per_second, 0),
        speedup(m, "generate"),
        f"{drift:+.3f}" if one.changes_text else "0",
        decimal(one.megabytes, 1),
        one.training,
    ]
