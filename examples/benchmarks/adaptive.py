"""Measure the default call, which adapts its steps, against ordinary decoding and against the best fixed setting.

    OMP_NUM_THREADS=1 python examples/benchmarks/adaptive.py --smollm2 FOLDER --qwen FOLDER --data FOLDER

A cell is a model, a text, a dtype, a number of rows, a temperature, and eager or compiled execution. Each cell runs in
a process of its own and writes its own document, `results/adaptive/CELL.json`; a cell whose document is there is
skipped, so the same command continues an interrupted run. `--cells math-fp32` runs the cells with that in their name.
The weights, and the files of `--data`, are named in adaptive_cells.py, with where to get them.

In a cell:

- *First call*: a model that has just been loaded decodes one prompt in both ways. This is repeated with other prompts,
  each time with the model loaded anew. Compilation is not part of it: compiled cells have no first call.
- *Fixed settings*: `jacobi_schedule="constant"` with different knobs. In a short round each runs on one or two
  prompts, and the best of them run in all rounds. A window is not tried where 16 slots cost more than eight times one
  slot.
- *Later calls*: ordinary decoding, the default call and the best fixed settings, on every prompt, in random order in
  each round; the fixed settings in the first round only. The time of a decoder is the sum over the prompts of the
  median of its rounds.

A factor is tokens per second of CPU time (`time.process_time`, one thread) over those of ordinary decoding: other
programs on the machine change CPU time less than wall time. `extra` has the factor by wall time. With `--before`, the
default call runs once per prompt, without fixed settings, for a revision that does not adapt.

The last line on stdout is the folder of the documents.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import adaptive_cells
import common
import torch
import typer
from adaptive_calls import Bench, Contender, kept_stats
from adaptive_cells import Cell
from transformers import DynamicCache

from jacobi_hf import JacobiConfig
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.results.schema import Agreement, Cost, Decoder, Measurement, Prompts, Results, Speedup

FOLDER = common.RESULTS / "adaptive"
FIXED: dict[str, dict[str, Any]] = {
    "lookup 4": {"jacobi_max_blocks": 0, "jacobi_lookup_tokens": 4},
    "lookup 8": {"jacobi_max_blocks": 0, "jacobi_lookup_tokens": 8},
    "lookup 16": {"jacobi_max_blocks": 0, "jacobi_lookup_tokens": 16},
    "window 16": {
        "jacobi_block_size": 16,
        "jacobi_max_blocks": 1,
        "jacobi_lookup_tokens": 0,
        "jacobi_pool_size": 0,
    },
    "window 16 + lookup 16": {
        "jacobi_block_size": 16,
        "jacobi_max_blocks": 1,
        "jacobi_lookup_tokens": 16,
        "jacobi_pool_size": 0,
    },
    "default knobs": {},
}
OURS = {"decoding": "jacobi_multiblock"}
DEAR = 8  # a window is not tried where 16 slots cost more than this many times one slot


def ordinary(cell: Cell, suffix: str = "") -> Contender:
    """Return ordinary decoding as its entry in the results."""
    kind = "generate-static-compiled" if cell.compiled else "generate"
    return Contender(Decoder(name=f"generate{suffix}", kind=kind, compiled=cell.compiled), {"decoding": None})


def adaptive(cell: Cell, suffix: str = "") -> Contender:
    """Return the default call as its entry in the results."""
    decoder = Decoder.of(f"default call{suffix}", JacobiConfig(), drafter_of(cell))
    return Contender(decoder.model_copy(update={"compiled": cell.compiled}), OURS)


def fixed(cell: Cell) -> list[Contender]:
    """Return the fixed settings."""
    found = [common.jacobi(name, drafter_of(cell), **knobs) for name, knobs in FIXED.items()]
    return [Contender(one.decoder.model_copy(update={"compiled": cell.compiled}), one.arguments) for one in found]


def drafter_of(cell: Cell) -> str | None:
    """Return the drafter that the model of a cell has loaded, or None."""
    return "examples/tiny_qwen3/drafter" if cell.model == "drafter" else None


def slot_seconds(model: Any, batch: dict[str, torch.Tensor], slots: tuple[int, ...] = (1, 8, 16)) -> dict[int, float]:
    """Return the CPU seconds of a forward by its slots, after the prompt: the median of five rounds."""
    cache = DynamicCache(config=model.config)
    seconds: dict[int, list[float]] = {count: [] for count in slots}
    with torch.no_grad():
        model(**batch, **{CACHE: cache})
        for _ in range(6):
            for count in slots:
                ids = batch["input_ids"][:, :1].expand(-1, count)
                started = time.process_time()
                model(ids, **{CACHE: cache})
                seconds[count].append(time.process_time() - started)
                cache.crop(-count)
    return {count: statistics.median(values[1:]) for count, values in seconds.items()}


def screened(bench: Bench, cost_of_16: float, order: random.Random) -> tuple[list[Contender], dict[str, float]]:
    """Return the best fixed settings of a short round, and the factor of each setting over ordinary decoding."""
    settings = [one for one in fixed(bench.cell) if cost_of_16 <= DEAR or one.decoder.name.startswith("lookup")]
    contenders = [ordinary(bench.cell), *settings]
    tokens = bench.cell.tokens if bench.cell.is_tiny else bench.cell.tokens // 2
    for prompt in range(2 if bench.cell.is_tiny else 1):
        if bench.cell.compiled:
            for one in contenders:
                bench.call(one.arguments, prompt, tokens)
        bench.compared(contenders, prompt, tokens, order)
    base = contenders[0].rate()
    factors = {one.decoder.name: round(one.rate() / base, 4) for one in settings}
    best = sorted(settings, key=lambda one: -factors[one.decoder.name])[: bench.cell.kept_settings]
    return [Contender(one.decoder, one.arguments) for one in best], factors


def measured(bench: Bench, contender: Contender, base: Contender, **extra: Any) -> Measurement:
    """Return the measurement of a contender beside ordinary decoding."""
    cell = bench.cell
    name = base.decoder.name
    pairs = [
        (ours.outputs, theirs.outputs)
        for prompt, calls in contender.calls.items()
        for ours, theirs in zip(calls, base.calls[prompt], strict=False)
    ]
    stats = [call.stats for calls in contender.calls.values() for call in calls if call.stats is not None]
    seconds = [call for calls in contender.calls.values() for call in calls]
    tokens = sum(calls[0].tokens for calls in contender.calls.values())
    forwards = sum(one.forwards for one in stats)
    written = sum(call.tokens for call in seconds)
    return Measurement(
        decoder=contender.decoder,
        model=adaptive_cells.NAMES[cell.model],
        prompts=Prompts(
            domain=cell.text,
            source=adaptive_cells.SOURCES[cell.text],
            count=len(contender.calls) * cell.rows,
            max_new_tokens=cell.tokens,
            do_sample=bool(cell.temperature),
            batch_size=cell.rows,
        ),
        new_tokens=tokens,
        tokens_per_forward=round(written / cell.rows / forwards, 3) if forwards else None,
        mean_slots=round(statistics.mean(one.mean_slots for one in stats), 2) if stats else None,
        seconds=round(tokens / contender.rate("wall"), 4),
        repeats=min(map(len, contender.calls.values())),
        tokens_per_second=round(contender.rate("wall"), 2),
        speedups=[Speedup(baseline=name, factor=round(contender.rate() / base.rate(), 4))] if stats else [],
        agreement=Agreement.between(
            [row for ours, _ in pairs for row in ours], [row for _, theirs in pairs for row in theirs], name
        )
        if stats
        else None,
        extra={
            "calls": len(seconds),
            "cpu_seconds": round(tokens / contender.rate(), 4),
            "factor_by_wall_time": round(contender.rate("wall") / base.rate("wall"), 4),
            **steps(stats),
            **extra,
        },
    )


def steps(stats: list[Any]) -> dict[str, Any]:
    """Return which shapes ran how often and what a step of each cost, where the decoder reports shapes."""
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for one in stats:
        counts.update(getattr(one, "steps_by_shape", {}))
        seconds.update(getattr(one, "seconds_by_shape", {}))
    if not counts:
        return {}
    probing = sum(one.probing_seconds for one in stats)
    return {
        "steps": dict(counts.most_common()),
        "ms_per_step": {shape: round(seconds[shape] / count * 1e3, 3) for shape, count in counts.most_common()},
        "probing": round(probing / max(1e-9, sum(one.decode_seconds for one in stats)), 4),
    }


def first_calls(cell: Cell, folders: dict[str, str], data: Path, stats: list[Any]) -> tuple[Bench, list[Measurement]]:
    """Measure first calls, each on a model loaded anew; return the last of these models with what was measured."""
    base = ordinary(cell, ", first call")
    ours = adaptive(cell, ", first call")
    order = random.Random(cell.name)
    count = min(cell.prompts, 3 if cell.is_tiny else 2)
    for prompt in range(count):
        model, tokenizer = adaptive_cells.load(cell, folders)
        bench = Bench(cell, model, adaptive_cells.batches(cell, tokenizer, data), stats)
        if cell.compiled:
            return bench, []
        bench.call(base.arguments, prompt, 4)
        bench.compared([base, ours], prompt % len(bench.batches), 128, order)
    return bench, [measured(bench, one, base) for one in (base, ours)]


def run_cell(cell: Cell, folders: dict[str, str], data: Path, output: Path, *, before: bool) -> None:
    """Measure a cell and write its document."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    order = random.Random(cell.name)
    with kept_stats() as stats:
        if before:
            model, tokenizer = adaptive_cells.load(cell, folders)
            bench = Bench(cell, model, adaptive_cells.batches(cell, tokenizer, data), stats)
            bench.call({"decoding": None}, 0, 4)
            first, best, factors, rounds = [], [], {}, 1
            costs = {}
        else:
            bench, first = first_calls(cell, folders, data, stats)
            costs = slot_seconds(bench.model, bench.batches[0])
            best, factors = screened(bench, costs[16] / costs[1], order) if cell.text != "readme" else ([], {})
            rounds = cell.rounds
        contenders = [ordinary(cell), adaptive(cell), *best]
        compiling = time.perf_counter()
        if cell.compiled:
            for one in contenders:
                for prompt in range(len(bench.batches)):
                    bench.call(one.arguments, prompt, cell.tokens)
        compiling = time.perf_counter() - compiling
        for number in range(rounds):
            for prompt in range(len(bench.batches)):
                bench.compared(contenders[: 2 if number else None], prompt, cell.tokens, order)
    base, ours, *others = contenders
    results = [
        measured(bench, base, base),
        measured(bench, ours, base, short_round=factors),
        *[measured(bench, one, base) for one in others],
    ]
    one_slot = costs.get(1, 0)
    listed = [
        Cost(
            name=f"forward of {slots} slots",
            value=round(seconds * 1e3, 4),
            unit="ms",
            repeats=5,
            baseline="forward of 1 slots",
            factor=round(seconds / one_slot, 3),
        )
        for slots, seconds in costs.items()
    ]
    if cell.compiled:
        listed.append(Cost(name="warm-up with compilation", value=round(compiling, 1), unit="s"))
    listed.append(Cost(name="cell", value=round(time.perf_counter() - began, 1), unit="s"))
    name = f"{'before-' * before}{cell.name}"
    what = f"The default call against ordinary decoding and fixed settings, {name}"
    document = Results.start(what, bench.model, adaptive_cells.NAMES[cell.model])
    document.model_copy(update={"measurements": first + results, "costs": listed}).write(output / f"{name}.json")
    for m in first + results:
        equal = m.agreement and f"{m.agreement.identical}/{m.agreement.total}"
        factor = m.speedups[0].factor if m.speedups else ""
        print(name, m.decoder.name, factor, equal or "", m.extra.get("steps", ""), flush=True)


def main(
    data: Annotated[Path, typer.Option(help="Folder of the files of the texts; see adaptive_cells.py.")],
    smollm2: adaptive_cells.SmolLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct",
    qwen: adaptive_cells.Qwen = "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    output: Annotated[Path, typer.Option(help="Folder of the documents.")] = FOLDER,
    cells: Annotated[str, typer.Option(help="Run the cells with this in their name.")] = "",
    before: Annotated[bool, typer.Option(help="Measure the default call of an earlier revision.")] = False,
    cell: Annotated[str | None, typer.Option(hidden=True, help="Run this cell in this process.")] = None,
) -> None:
    """Measure all cells, or those of a substring."""
    folders = {"smollm2": smollm2, "qwen": qwen}
    if cell is not None:
        found = next(one for one in adaptive_cells.cells() if one.name == cell)
        run_cell(found, folders, data, output, before=before)
        return
    for one in adaptive_cells.cells():
        if cells not in one.name or (output / f"{'before-' * before}{one.name}.json").exists():
            continue
        options = ["--data", data, "--smollm2", smollm2, "--qwen", qwen, "--output", output, *["--before"] * before]
        subprocess.run([sys.executable, __file__, *map(str, options), "--cell", one.name], check=False)
    print(output)


if __name__ == "__main__":
    typer.run(main)
