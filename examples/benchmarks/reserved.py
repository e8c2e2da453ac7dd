"""Measure the memory of a short answer, by what its call would have allowed.

    OMP_NUM_THREADS=1 python examples/benchmarks/reserved.py --smollm2 PATH

A criterion ends every row after five tokens, so the call needs memory for a prompt and five tokens, whatever
`max_new_tokens` says. The figure is the highest resident set during the call minus the resident set before it, after
a warm-up of one row. glibc returns each freed block of 64 KiB or more at once, so resident memory is allocated memory.
Seconds are the median of up to three calls.

Each cell runs in its own process: one of two models (SmolLM2-135M-Instruct, and a random Qwen3 of two layers with
Qwen's vocabulary), rows, `max_new_tokens`, greedy or sampled, and a decoder. Cells that the document at `--output`
holds already are not measured again, so an interrupted run goes on where it stopped. `--baseline` names the document
of an earlier revision; its figures are stored beside those of the same cells.

`HuggingFaceTB/SmolLM2-135M-Instruct` on the Hub has the model for `--smollm2`. Without it, the random model alone is
measured.

Baseline: ordinary `generate`. The last line on stdout is the path of the JSON document.
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from memory import resident
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

import jacobi_hf
from jacobi_hf.results.schema import Agreement, Measurement, Prompts, Results

COMMAND = "examples/benchmarks/reserved.py --smollm2 PATH"
SMOLLM2 = "SmolLM2-135M-Instruct"
QWEN = "random Qwen3, 2 layers, 151936 ids"
PROMPT = 16
TOKENS = 5
ROWS = (1, 4, 16)
LIMITS = (64, 4096, 32768)
SAMPLED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
DECODERS = (common.ordinary(), common.jacobi("jacobi_multiblock"))
REPEATS = 3
LONG = 5.0  # seconds after which a call is not repeated


@dataclass(frozen=True)
class Cell:
    """What one process measures: a model, a call, and the name of its decoder."""

    model: str
    rows: int
    limit: int
    sampled: bool
    decoder: str


class Ends(StoppingCriteria):
    """Ends every row after `TOKENS` new tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return whether each row has ended."""
        ended = input_ids.shape[1] >= PROMPT + TOKENS
        return torch.full((len(input_ids),), ended, device=input_ids.device)


def model_of(name: str, smollm2: str) -> PreTrainedModel:
    """Return a model in float32 by its name; `smollm2` is the folder of SmolLM2's checkpoint."""
    if name == SMOLLM2:
        jacobi_hf.register(LlamaForCausalLM)
        return LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=40960,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def peak() -> int:
    """Return the highest number of resident bytes since the last `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def forget_peak() -> None:
    """Begin to look for the highest number of resident bytes anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def figures_of(cell: Cell, smollm2: str, most_gib: float) -> dict[str, Any]:
    """Return the figures of a cell, or why there are none; for a process of its own."""
    model = model_of(cell.model, smollm2)
    ids = torch.randint(1, model.config.vocab_size, (cell.rows, PROMPT), generator=torch.Generator().manual_seed(1))
    arguments = next(one.arguments for one in DECODERS if one.decoder.name == cell.decoder)
    arguments = arguments | {"pad_token_id": 0, "eos_token_id": None}
    arguments |= SAMPLED if cell.sampled else {"do_sample": False}

    def generate(rows: int, limit: int) -> torch.Tensor:
        torch.manual_seed(2)
        given = ids[:rows]
        criteria = StoppingCriteriaList([Ends()])
        return model.generate(
            given,
            attention_mask=torch.ones_like(given),
            stopping_criteria=criteria,
            max_new_tokens=limit,
            **arguments,
        )

    generate(1, 2 * TOKENS)
    most = int(most_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # rather an error here than a machine without memory
    used = []
    seconds = []
    while len(used) < REPEATS and sum(seconds) < LONG:
        forget_peak()
        before = resident()
        started = time.perf_counter()
        try:
            output = generate(cell.rows, cell.limit)
        except (MemoryError, RuntimeError) as error:
            if "memory" not in str(error) and not isinstance(error, MemoryError):
                raise
            return {"failed": f"needs more than {most_gib:g} GiB"}
        seconds.append(time.perf_counter() - started)
        used.append(peak() - before)
    found = {"mib": round(max(used) / 2**20, 1), "repeats": len(used), "seconds": round(statistics.median(seconds), 3)}
    return found | {"tokens": output[:, PROMPT:].tolist()}


def measured_in_a_process(cell: Cell, smollm2: str, most_gib: float) -> dict[str, Any]:
    """Return the figures of a cell, from a process of its own."""
    options = ["--cell", json.dumps(asdict(cell)), "--smollm2", smollm2, "--most-gib", str(most_gib)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def measurement(cell: Cell, figures: dict[str, Any]) -> Measurement:
    """Return what the document stores of a cell."""
    figures = dict(figures)
    tokens = figures.get("tokens")
    return Measurement(
        decoder=next(one.decoder for one in DECODERS if one.decoder.name == cell.decoder),
        prompts=Prompts(
            domain="random",
            source="random ids",
            count=cell.rows,
            max_new_tokens=cell.limit,
            do_sample=cell.sampled,
            batch_size=cell.rows,
        ),
        model=cell.model,
        new_tokens=None if tokens is None else sum(map(len, tokens)),
        seconds=figures.pop("seconds", None),
        repeats=figures.pop("repeats", None),
        extra=figures,
    )


def cell_of(one: Measurement) -> Cell:
    """Return which cell a measurement is of."""
    prompts = one.prompts
    return Cell(one.model or "", prompts.batch_size, prompts.max_new_tokens, prompts.do_sample, one.decoder.name)


def compared(measurements: list[Measurement], baseline: Results | None) -> list[Measurement]:
    """Return the measurements with their agreement, and the figures that an earlier revision had in the same cell."""
    found = {cell_of(one): one for one in measurements}
    earlier = {cell_of(one): one for one in baseline.measurements} if baseline else {}
    revision = baseline.software.git_revision if baseline else None
    ordinary = DECODERS[0].decoder.name
    for cell, one in found.items():
        changes: dict[str, Any] = {}
        reference = found.get(Cell(cell.model, cell.rows, cell.limit, cell.sampled, ordinary))
        if (
            cell.decoder != ordinary
            and reference is not None
            and {"tokens"} <= reference.extra.keys() & one.extra.keys()
        ):
            changes["agreement"] = Agreement.between(one.extra["tokens"], reference.extra["tokens"], ordinary)
        before = earlier.get(cell)
        if before is not None:
            figures = {"revision": revision, "seconds": before.seconds, **before.extra}
            changes["extra"] = one.extra | {"before": {k: v for k, v in figures.items() if k != "tokens"}}
        found[cell] = one.model_copy(update=changes)
    return list(found.values())


def main(
    output: Annotated[Path, typer.Option(help="Path of the JSON document to write.")] = common.RESULTS
    / "reserved.json",
    smollm2: Annotated[
        str, typer.Option(help="Folder of SmolLM2-135M-Instruct; none for the other model alone.")
    ] = "",
    baseline: Annotated[Path | None, typer.Option(help="Document of an earlier revision.")] = None,
    most_gib: Annotated[float, typer.Option(help="GiB at which a cell gives up.")] = 12.0,
    cell: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure `generate` and Jacobi decoding, cell by cell."""
    if cell is not None:
        print(json.dumps(figures_of(Cell(**json.loads(cell)), smollm2, most_gib)))
        return
    models = ([SMOLLM2] if smollm2 else []) + [QWEN]
    names = [one.decoder.name for one in DECODERS]
    cells = [Cell(*parts) for parts in product(models, ROWS, LIMITS, (False, True), names)]
    measurements = Results.read(output).measurements if output.exists() else []
    earlier = Results.read(baseline) if baseline else None
    what = "Memory of an answer of five tokens, by what the call would have allowed"
    results = Results.start(what, model_of(QWEN, smollm2), " and ".join(models))
    results = results.model_copy(update={"command": COMMAND})  # without the folders of this machine
    known = {cell_of(one) for one in measurements}
    for number, one in enumerate(cells, 1):
        if one not in known:
            figures = measured_in_a_process(one, smollm2, most_gib)
            print(f"{number}/{len(cells)}", one, {k: v for k, v in figures.items() if k != "tokens"}, flush=True)
            measurements = [*measurements, measurement(one, figures)]
        results.with_measurements(compared(measurements, earlier)).write(output)
    print(output)


if __name__ == "__main__":
    typer.run(main)
