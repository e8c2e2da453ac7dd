"""Measure steps of one slot, in which nothing is drafted, against ordinary decoding.

    OMP_NUM_THREADS=1 python examples/benchmarks/one_slot.py --smollm2 FOLDER --qwen FOLDER

The default call decodes with a controller that always chooses one slot alone. So each call has the prefill and one
step for each token, as ordinary decoding has. `processor` cases have a logits processor of the caller's own, which
needs tokens one by one.

- *Time*: CPU time of one thread. Both decoders run in pairs, in turn first and second; the ratio is the median over
  the pairs of ours over ordinary decoding. Compiled steps are compared with `generate` with a static cache and a
  compiled forward, both compiled before the clock runs.
- *Operations*: calls of ATen operations per token of the tiny model, with the calls that an operation makes itself
  (torch.profiler), and without these (`TorchDispatchMode`). They do not depend on the machine's load.

With `--before`, for a revision without a controller: no source has a valid guess, with the default knobs.

The last line on stdout is the path of the JSON document.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import adaptive_cells
import common
import torch
import typer
from adaptive_cells import Cell
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList

from jacobi_hf.drafts.lookup import NgramLookup
from jacobi_hf.drafts.ngram_pool import NgramPool
from jacobi_hf.drafts.window import JacobiWindow
from jacobi_hf.results.schema import Cost, Results

PROMPT = "def quicksort(items):"
SPAN = (16, 48)  # operations per token: those of the longer call minus those of the shorter one
ROOM = 512


class OwnProcessor(LogitsProcessor):
    """A processor that this package does not know; it changes nothing."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores as they are."""
        return scores


class OperationCount(TorchDispatchMode):
    """Counts the operations that are dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def replaced(owner: type, name: str, replacement: Callable) -> Iterator[None]:
    """Replace a method while the context is open."""
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def one_slot() -> Iterator[None]:
    """Let every step of the default call have one slot."""
    from jacobi_hf.tuning.controller import Controller

    def alone(self: Any, _: Any) -> Any:
        return self._options[0]

    with replaced(Controller, "choose", alone):
        yield


@contextmanager
def without_guesses() -> Iterator[None]:
    """Let no source have a valid guess: each proposes as ever, but says that 0 of its guesses are valid."""
    with silenced(JacobiWindow), silenced(NgramPool), silenced(NgramLookup):
        yield


@contextmanager
def silenced(source: type) -> Iterator[None]:
    propose = source.propose  # type: ignore[attr-defined]
    nothing: dict[int, torch.Tensor] = {}  # made once for a source, so that a step has no operation more

    def silent(self: Any, context: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, lengths = propose(self, context)
        if id(self) not in nothing:
            nothing[id(self)] = torch.zeros_like(lengths)
        return tokens, nothing[id(self)]

    with replaced(source, "propose", silent):
        yield


def arguments(kind: str, *, processor: bool, compiled: bool) -> dict[str, Any]:
    """Return the arguments of `generate` for one decoder; `kind` is its `decoding`, or empty for ordinary decoding."""
    found: dict[str, Any] = {"decoding": kind or None, "do_sample": False, "eos_token_id": None}
    if processor:
        found["logits_processor"] = LogitsProcessorList([OwnProcessor()])
    if compiled:
        config = CompileConfig(mode="default", fullgraph=True)
        config._compile_all_devices = True
        found["compile_config"] = config
        if not kind:
            found |= {"cache_implementation": "static", "max_cache_len": ROOM}
    return found


def paired(model: Any, inputs: dict[str, torch.Tensor], both: list[dict[str, Any]], tokens: int, pairs: int) -> Cost:
    """Return the median milliseconds per token of the second decoder, and their ratio to the first one's."""
    seconds: list[list[float]] = [[], []]
    texts = [[], []]
    for pair in range(pairs + 1):  # the first one warms up, and compiles
        for which in (0, 1) if pair % 2 else (1, 0):
            started = time.process_time()
            output = model.generate(**inputs, max_new_tokens=tokens, **both[which])
            if pair:
                seconds[which].append(time.process_time() - started)
            texts[which] = output.tolist()
    if texts[0] != texts[1]:
        raise RuntimeError("the texts of both decoders differ.")
    factors = [ours / theirs for theirs, ours in zip(*seconds, strict=True)]
    return Cost(
        name="CPU time per token",
        value=round(statistics.median(seconds[1]) / tokens * 1e3, 4),
        unit="ms",
        repeats=pairs,
        baseline="ordinary decoding",
        factor=round(statistics.median(factors), 4),
        setting={
            "lower_quartile": round(statistics.quantiles(factors, n=4)[0], 4),
            "upper_quartile": round(statistics.quantiles(factors, n=4)[2], 4),
        },
    )


def operations(model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> tuple[float, float]:
    """Return the operations per token of a decoder: with those that operations call, and without them."""
    nested, direct = [], []
    for tokens in SPAN:
        model.generate(**inputs, max_new_tokens=tokens, **options)
        with profile(activities=[ProfilerActivity.CPU]) as events:
            model.generate(**inputs, max_new_tokens=tokens, **options)
        nested.append(sum(event.name.startswith("aten::") for event in events.events()))
        with OperationCount() as counted:
            model.generate(**inputs, max_new_tokens=tokens, **options)
        direct.append(counted.count)
    steps = SPAN[1] - SPAN[0]
    return (nested[1] - nested[0]) / steps, (direct[1] - direct[0]) / steps


def measured(
    cell: Cell, model: Any, inputs: dict[str, torch.Tensor], *, processor: bool, pairs: int, tokens: int
) -> list[Cost]:
    """Return the costs of one case."""
    both = [arguments(kind, processor=processor, compiled=cell.compiled) for kind in ("", "jacobi_multiblock")]
    execution = "compiled" if cell.compiled else "eager"
    case = f"{cell.model} {cell.dtype} {execution}{', own processor' * processor}"
    setting = {
        "model": adaptive_cells.NAMES[cell.model],
        "dtype": cell.dtype,
        "execution": execution,
        "own processor": processor,
    }
    costs = [paired(model, inputs, both, tokens, pairs)]
    if cell.is_tiny and not cell.compiled:
        theirs, ours = (operations(model, inputs, options) for options in both)
        for name, number in (("operations per token", 0), ("operations per token, without nested ones", 1)):
            factor = round(ours[number] / theirs[number], 4)
            costs.append(
                Cost(name=name, value=ours[number], unit="calls", baseline="ordinary decoding", factor=factor)
            )
    named = [
        cost.model_copy(update={"name": f"{case}: {cost.name}", "setting": setting | cost.setting}) for cost in costs
    ]
    for cost in named:
        print(cost.name, cost.value, cost.unit, cost.factor, cost.setting, flush=True)
    return named


def cases() -> list[tuple[Cell, bool]]:
    """Return the cells, each with whether the caller has a processor of its own."""
    eager = [Cell("base", ""), Cell("smollm2", ""), Cell("qwen", ""), Cell("smollm2", "", "bf16")]
    found = [(cell, processor) for cell in eager for processor in (False, True)]
    return [*found, (Cell("qwen", "", "bf16"), False), (Cell("base", "", compiled=True), False)]


def main(
    smollm2: adaptive_cells.SmolLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct",
    qwen: adaptive_cells.Qwen = "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    output: Annotated[Path, typer.Option(help="Path of the JSON document to write.")] = common.RESULTS
    / "one_slot.json",
    only: Annotated[str, typer.Option(help="Run the cases with this in their name, such as base-.")] = "",
    before: Annotated[bool, typer.Option(help="Measure an earlier revision, which has no controller.")] = False,
) -> None:
    """Measure steps of one slot."""
    folders = {"smollm2": smollm2, "qwen": qwen}
    document = Results.start("Steps of one slot against ordinary decoding", common.load(None)[0], "see the costs")
    costs: list[Cost] = []
    for cell, processor in cases():
        if only not in cell.name:
            continue
        model, tokenizer = adaptive_cells.load(cell, folders)
        inputs = dict(tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False))
        pairs, tokens = (15, 64) if cell.is_tiny else (7, 24)
        with without_guesses() if before else one_slot():
            costs += measured(cell, model, inputs, processor=processor, pairs=pairs, tokens=tokens)
        document.model_copy(update={"costs": costs}).write(output)
    print(output)


if __name__ == "__main__":
    typer.run(main)
