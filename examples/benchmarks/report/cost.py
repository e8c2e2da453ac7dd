"""The page on what a step costs: beside its forward, by its width, in long texts and batches, in memory."""

from __future__ import annotations

from typing import Any

from jacobi_hf.results.schema import Measurement, Results

from .documents import RESULTS, document
from .tables import NOTHING, decimal, source, table


def context() -> dict[str, Any]:
    """Return what the template shows."""
    overhead = document("overhead")
    memory = document("memory")
    growth = document("growth")
    shapes = sorted(path.stem for path in RESULTS.glob("step_cost-*.json"))
    return {
        "overhead_source": source(overhead),
        "overhead": overhead_table(overhead),
        "shapes": [shape(document(name)) for name in shapes],
        "memory_source": source(memory),
        "memory_tokens": memory.measurements[0].prompts.max_new_tokens,
        "cache_mib": decimal(memory.measurements[0].extra["one_cache"] / 2**20, 0),
        "memory": memory_table(memory),
        "reserved": short_answers(document("reserved")) if (RESULTS / "reserved.json").exists() else None,
        "growth_source": source(growth),
        "growth_slots": decimal(max(m.mean_slots or 0 for m in growth.measurements), 0),
        "growth": growth_table(growth),
    }


def overhead_table(results: Results) -> str:
    """Return the table of steps beside their bare forwards."""
    rows = [
        [
            m.decoder.block_size,
            "compiled" if m.decoder.name.endswith("-compiled") else "eager",
            decimal(m.mean_slots, 1),
            decimal(m.extra["ms_per_step"]),
            decimal(m.extra["ms_bare_forward"]),
            f"{100 * m.extra['overhead']:.1f} %",
        ]
        for m in results.measurements
    ]
    return table(["n", "step", "slots", "ms per step", "ms of the bare forward", "overhead"], rows)


def memory_table(results: Results) -> str:
    """Return the table of the highest memory of a generation."""
    rows = [
        [
            m.decoder.name,
            m.forwards,
            decimal(m.extra["bytes"] / 2**20, 0),
            decimal(m.extra["share_of_one_cache"], 3),
        ]
        for m in results.measurements
    ]
    return table(["decoder", "forwards", "MiB", "in units of one cache"], rows)


def short_answers(results: Results) -> dict[str, Any]:
    """Return what the page shows of answers that are shorter than the call allows."""
    ordinary, ours = list(dict.fromkeys(m.decoder.name for m in results.measurements))
    cells = {(short_answer_key(m), m.decoder.name): m for m in results.measurements}
    compared = [m.agreement for m in results.measurements if m.agreement is not None]
    before = next((m.extra["before"]["revision"] for m in results.measurements if "before" in m.extra), None)
    rows = []
    for key in dict.fromkeys(short_answer_key(m) for m in results.measurements):
        first = cells[key, ordinary]
        second = cells[key, ours]
        earlier = [second.extra.get("before", {})] if before else []
        rows.append([*key, *map(short_answer_mib, [first.extra, *earlier, second.extra])])
    names = ["generate", *(["before"] if before else []), "Jacobi"]
    return {
        "source": source(results),
        "before": before,
        "identical": sum(one.identical for one in compared),
        "total": sum(one.total for one in compared),
        "table": table(["model", "", "rows", "max_new_tokens", *(f"MiB: {name}" for name in names)], rows),
    }


def short_answer_key(measurement: Measurement) -> tuple[str, str, int, int]:
    """Return model, way of choosing, rows and `max_new_tokens` of a measurement."""
    prompts = measurement.prompts
    return (
        measurement.model or "",
        "sampled" if prompts.do_sample else "greedy",
        prompts.batch_size,
        prompts.max_new_tokens,
    )


def short_answer_mib(figures: dict[str, Any]) -> str:
    """Return the MiB among some figures, or why there are none."""
    return decimal(figures["mib"], 0) if "mib" in figures else figures.get("failed", NOTHING)


def growth_table(results: Results) -> str:
    """Return the table of the parts of a step along the three axes."""
    parts = list(max((m.extra["ms"] for m in results.measurements), key=len))  # ordinary decoding has fewer parts
    rows = [
        [
            m.prompts.domain,
            f"{m.extra['at']}, {m.decoder.name}",
            *(decimal(m.extra["ms"][part]) if part in m.extra["ms"] else "" for part in parts),
            "" if m.extra["mib"] is None else m.extra["mib"],
        ]
        for m in results.measurements
    ]
    return table(["axis", "at", *parts, "MiB"], rows)


def shape(results: Results) -> dict[str, Any]:
    """Return what the page shows of the steps of one model shape."""
    replayed = [m for m in results.measurements if m.prompts.domain == "replay"]
    on_gpu = results.hardware.gpu is not None
    return {
        "name": results.model,
        "source": source(results),
        "copy_speed": results.measurements[0].extra["copy_gigabytes_per_second"],
        "on_gpu": on_gpu,
        "table": width_table(results, on_gpu),
        "replay": replay_table(replayed, on_gpu) if replayed else None,
    }


def width_table(results: Results, on_gpu: bool) -> str:
    """Return the table of milliseconds per step by slots."""
    found = [m for m in results.measurements if m.ms_per_forward]
    widths = sorted({width for m in found for width in m.ms_per_forward or {}})
    head = ["batch", "context", "", *map(str, widths), "MBU", *(["host"] if on_gpu else [])]
    return table(head, (width_row(m, widths, on_gpu) for m in found))


def width_row(m: Measurement, widths: list[int], on_gpu: bool) -> list[object]:
    """Return the row of one kind of step; a width that was not measured has an empty cell."""
    times = m.ms_per_forward or {}
    return [
        m.prompts.batch_size,
        m.extra["context"],
        m.decoder.name,
        *(decimal(times[width], 1) if width in times else "" for width in widths),
        m.extra["mbu_of_width_1"],
        *([m.extra.get("host_ms", {}).get("1", "")] if on_gpu else []),
    ]


def replay_table(replayed: list[Measurement], on_gpu: bool) -> str:
    """Return the table of the replays."""
    rows = [
        [
            m.decoder.name,
            decimal(m.tokens_per_forward),
            decimal(m.mean_slots, 1),
            decimal(m.tokens_per_second, 1),
            decimal(m.speedups[0].factor) if m.speedups else "",
            m.extra.get("conversion", ""),
            *([m.extra.get("idle", "")] if on_gpu else []),
        ]
        for m in replayed
    ]
    return table(["", "TPF", "slots", "tok/s", "speed-up", "conversion", *(["device idle"] if on_gpu else [])], rows)
