"""What docs/results.md says of lossless forcing; report.py puts it there."""

from __future__ import annotations

import json
from pathlib import Path

from jacobi_hf.results.schema import Measurement, Results, Training

TINY = Path(__file__).resolve().parents[1] / "tiny_qwen3"


def loop_free(m: Measurement) -> str:
    """Tokens per forward of the outputs that do not end in a loop."""
    return "-" if m.tokens_per_forward_loop_free is None else f"{m.tokens_per_forward_loop_free:.2f}"


def training(results: Results) -> str:
    """How the drafter of a document was trained, in a line."""
    t = results.training[-1]
    slots, threads = f"{t.slots / 1e6:.2f} M noisy slots", f"{t.threads} thread{'s' * (t.threads != 1)}"
    return f"`{t.command}`, {t.steps} steps, {slots}, {t.minutes:.1f} minutes on {threads}"


def drafter_rows(documents: dict[str, Results]) -> list[list[str]]:
    """Every decoder of every seed."""
    rows = []
    decoders = dict.fromkeys((m.prompts.domain, m.decoder.name) for r in documents.values() for m in r.measurements)
    for domain, decoder in decoders:
        for name, results in documents.items():
            for m in results.measurements:
                if (m.prompts.domain, m.decoder.name) == (domain, decoder) and m.agreement is not None:
                    same = f"{m.agreement.identical} of {m.agreement.total}"
                    rows.append(
                        [
                            domain,
                            decoder,
                            name,
                            f"{m.tokens_per_forward:.2f}",
                            loop_free(m),
                            f"{m.mean_slots:.1f}",
                            same,
                        ]
                    )
    return rows


def control_rows(documents: dict[str, Results]) -> list[list[str]]:
    """The short recipe and what was changed in it."""
    rows = []
    for name, results in documents.items():
        found = {(m.prompts.domain, m.decoder.name): m for m in results.measurements}
        whole, half = "window-n2-K8-r0", "window-n2-K8-r0-half"
        yields = [
            f"{found[domain, decoder].tokens_per_forward:.2f}"
            for domain in ("arithmetic", "code")
            for decoder in (whole, half)
        ]
        minutes = f"{results.training[-1].minutes:.1f}"
        rows.append([name.removeprefix("control-"), minutes, *yields, loop_free(found["code", whole])])
    return rows


def minutes_of(stages: list[Training]) -> str:
    """Minutes of training, and on how many threads."""
    return f"{sum(stage.minutes for stage in stages):.0f} x {stages[-1].threads}"


def way_rows(peers: Results, forced: Results, base: Results, drafted: Results) -> list[list[str]]:
    """Full forcing, the drafter, prompt lookup, assisted decoding: speed, loss of quality, bytes to publish, minutes to train."""
    draft = json.loads((TINY / "draft" / "training.json").read_text(encoding="utf-8"))
    trained = {
        "full forcing": minutes_of(forced.training),
        "drafter": minutes_of(drafted.training),
        "assisted by a 1.1 M draft": f"{draft['minutes_of_this_process_to_the_end_of_training']:.0f} x {draft['threads']}",
    }
    size = {
        "forced": (TINY / "forced" / "model.safetensors").stat().st_size,
        "base + drafter": (TINY / "drafter" / "drafter_model.safetensors").stat().st_size,
        "assisted": (TINY / "draft" / "model.safetensors").stat().st_size,
    }

    def loss(results: Results, domain: str) -> float:
        return next(
            m.held_out_loss for m in results.measurements if m.prompts.domain == domain and m.held_out_loss is not None
        )

    rows = []
    for domain in dict.fromkeys(m.prompts.domain for m in peers.measurements):
        for way, model, name, drift, published in (
            (
                "full forcing",
                "forced",
                "autotuned",
                f"{loss(forced, domain) - loss(base, domain):+.3f}",
                size["forced"],
            ),
            ("drafter", "base + drafter", "autotuned", "0", size["base + drafter"]),
            ("prompt lookup", "base", "prompt-lookup-10", "0", 0),
            ("assisted by a 1.1 M draft", "base", "assisted", "0", size["assisted"]),
        ):
            m = next(
                m for m in peers.measurements if (m.model, m.prompts.domain, m.decoder.name) == (model, domain, name)
            )
            factor = next(s.factor for s in m.speedups if s.baseline == "generate")
            tpf = "-" if m.tokens_per_forward is None else f"{m.tokens_per_forward:.2f}"
            rows.append(
                [
                    domain,
                    way,
                    m.extra.get("setting", ""),
                    tpf,
                    f"{m.tokens_per_second:.0f}",
                    f"{factor:.2f}",
                    drift,
                    f"{published / 1e6:.1f}",
                    trained.get(way, "0"),
                ]
            )
    return rows


def source_rows(sources: Results) -> list[list[str]]:
    """What may be drafted from, by domain, each group's figures side by side; the last column of sampled decoding is at temperature 1."""
    names = list(dict.fromkeys(m.decoder.name for m in sources.measurements if m.decoder.name != "generate"))
    groups = list(dict.fromkeys(m.model for m in sources.measurements))
    rows = []
    for domain in dict.fromkeys(m.prompts.domain for m in sources.measurements):
        for name in names:
            for sampled in (False, True):
                found = {
                    m.model: m
                    for m in sources.measurements
                    if (m.prompts.domain, m.decoder.name, m.prompts.do_sample) == (domain, name, sampled)
                }
                if found:
                    cells = [
                        f"{found[g].tokens_per_forward:.2f} ({loop_free(found[g])})" if g in found else "-"
                        for g in groups
                    ]
                    slots = " / ".join(f"{found[g].mean_slots:.0f}" if g in found else "-" for g in groups)
                    same = {f"{m.agreement.identical} of {m.agreement.total}" for m in found.values() if m.agreement}
                    rows.append([domain, name + ", T = 1" * sampled, *cells, slots, ", ".join(sorted(same))])
    return rows


def clock_rows(clock: Results) -> list[list[str]]:
    """Windows alone on arithmetic, with a drafter and after forcing."""
    rows = []
    for m in clock.measurements:
        factor = next((f"{s.factor:.2f}" for s in m.speedups if s.baseline == "generate"), "-")
        same = f"{m.agreement.identical} of {m.agreement.total}" if m.agreement else "-"
        rows.append(
            [
                str(m.model),
                m.decoder.name,
                f"{m.tokens_per_forward:.2f}",
                f"{m.mean_slots:.1f}",
                f"{m.tokens_per_second:.0f}",
                factor,
                same,
            ]
        )
    return rows
