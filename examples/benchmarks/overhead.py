"""Measure the overhead of a step: its time beside the bare forward of the model.

    OMP_NUM_THREADS=1 python examples/benchmarks/overhead.py

The drafts are the true continuation, so each step accepts every guess and does all the work that a step can have. The
steps have no branches, whose slots would be part of both times.

Baseline: the bare forward. Right before each step, the same module runs with the arguments of the step: tokens, mask,
positions and cache. For a compiled step, the bare forward is compiled in the same way. The overhead is the median over
the steps of how much longer a step took than its own bare forward, relative to the forward. The speed of a shared
machine can change between two steps, but seldom within one.

The last line on stdout is the path of the JSON document.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from transformers import CompileConfig

import jacobi_hf
from jacobi_hf.decoding.step import ForwardInputs, StepPlan
from jacobi_hf.drafts.window import JacobiWindow
from jacobi_hf.execution.compiled import with_own_code
from jacobi_hf.integration import call as generate_call
from jacobi_hf.results.schema import Measurement, Prompts, Results


def replaying(truth_BT: torch.Tensor, seconds: list[float]) -> Any:
    """Return a `JacobiWindow.propose` that proposes the true continuation.

    If the step is not compiled, it appends to `seconds` the time of the replacement.
    """
    propose = JacobiWindow.propose

    def replay(self: JacobiWindow, context: Any) -> tuple[torch.Tensor, torch.Tensor]:
        token_B1W, length_B1 = propose(self, context)
        if torch.compiler.is_compiling():
            return replaced(token_B1W, context), length_B1
        started = time.perf_counter()
        token_B1W = replaced(token_B1W, context)
        seconds.append(time.perf_counter() - started)
        return token_B1W, length_B1

    def replaced(token_B1W: torch.Tensor, context: Any) -> torch.Tensor:
        index_BW = context.outcome.generated_B[:, None] + torch.arange(token_B1W.shape[2])
        return truth_BT.gather(1, index_BW.clamp(max=truth_BT.shape[1] - 1))[:, None]

    return replay


class Clock:
    """An execution that runs a bare forward before each step, and measures both.

    Args:
        model: the model of the bare forward.
        execution: the execution that runs the steps.
        compiled_forwards: the compiled forward by slots, filled on demand; None for eager bare forwards.
        replaying: seconds since the last step that the replay took, and not the decoder.

    Attributes:
        steps: seconds of each step but the last, from its start to the start of the next step.
        bare: seconds of each bare forward.
    """

    def __init__(
        self, model: Any, execution: Any, compiled_forwards: dict[int, Any] | None, replaying: list[float]
    ) -> None:
        self._model = model
        self._execution = execution
        self._forwards = compiled_forwards
        self._replaying = replaying
        self._last: float | None = None
        self.steps: list[float] = []
        self.bare: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._execution, name)

    def run(self, state: Any, forward: Any, selector: Any, plan: StepPlan) -> Any:
        """Run the bare forward, then the step; the time of the forward is no part of the step's."""
        if self._last is not None:
            self.steps.append(time.perf_counter() - self._last - sum(self._replaying))
        self._replaying.clear()
        layout = plan.layout
        token_BQ = state.inputs(plan.shape, layout).token_BQ
        bare = self._model.forward
        read_K = plan.key_column_K
        if self._forwards is not None:
            bare = self._forwards.setdefault(layout.slots, compiled(self._model))
            torch._dynamo.mark_dynamic(read_K, 0)
        state.cache.open_step(layout.slots, read_K)
        arguments = forward.arguments(ForwardInputs(layout, read_K, token_BQ))
        if self._forwards is not None:
            torch._dynamo.mark_dynamic(arguments["attention_mask"], 3)
        began = time.perf_counter()
        bare(**arguments)
        self._last = time.perf_counter()
        self.bare.append(self._last - began)
        return self._execution.run(state, forward, selector, plan)


def compiled(model: Any) -> Any:
    """Return the model's forward, compiled for one number of slots."""

    def call(arguments: dict[str, Any]) -> torch.Tensor:
        logits: torch.Tensor = model(**arguments).logits
        return logits

    run = torch.compile(with_own_code(call), fullgraph=True, dynamic=False)
    return lambda **arguments: run(arguments)


@contextmanager
def replays(model: Any, truth_BT: torch.Tensor, *, compiles: bool) -> Iterator[list[Clock]]:
    """Let calls of `generate` propose the true continuation, and yield their clocks, one for each call."""
    propose = JacobiWindow.propose
    execution_for = generate_call.execution_for
    clocks: list[Clock] = []
    compiled_forwards: dict[int, Any] | None = {} if compiles else None
    seconds: list[float] = []

    def clocked(*arguments: Any) -> Clock:
        clocks.append(Clock(model, execution_for(*arguments), compiled_forwards, seconds))
        return clocks[-1]

    JacobiWindow.propose = replaying(truth_BT, seconds)  # type: ignore[method-assign]
    generate_call.execution_for = clocked  # type: ignore[assignment]
    try:
        yield clocks
    finally:
        JacobiWindow.propose = propose  # type: ignore[method-assign]
        generate_call.execution_for = execution_for
        jacobi_hf.clear_graphs(model)


def one_width(
    model: Any, tokenizer: Any, prompt: str, block: int, max_new_tokens: int, repeats: int, *, compiles: bool
) -> Measurement:
    """Return the medians of step and bare forward with windows of up to 2 blocks of `block` guesses.

    Raises:
        RuntimeError: a step did not accept every guess, or the text is not that of ordinary decoding.
    """
    name = f"replay-n{block}" + "-compiled" * compiles
    contender = common.jacobi(name, jacobi_block_size=block, jacobi_pool_size=0, jacobi_lookup_tokens=0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": None}
    reference = model.generate(**inputs, **arguments)
    truth = torch.cat([reference[:, inputs["input_ids"].shape[1] :], torch.zeros(1, 4 * block, dtype=torch.long)], 1)
    if compiles:
        arguments["compile_config"] = CompileConfig()
    steps: list[float] = []
    bare: list[float] = []
    forwards = 0
    with replays(model, truth, compiles=compiles) as clocks:
        for repeat in range(repeats + 1):  # the first one compiles and warms up
            output = model.generate(**inputs, **arguments, **contender.arguments, return_dict_in_generate=True)
            if not torch.equal(output.sequences, reference) or output.jacobi_stats.window_acceptance < 1:
                raise RuntimeError(f"{name}: a step did not accept every guess of the replay.")
            if repeat:
                steps += clocks[-1].steps
                bare += clocks[-1].bare[: len(clocks[-1].steps)]
                forwards += output.jacobi_stats.forwards
    tokens = repeats * max_new_tokens
    return Measurement(
        decoder=contender.decoder,
        prompts=Prompts(
            domain="replay", source="the first held-out code prompt", count=1, max_new_tokens=max_new_tokens
        ),
        new_tokens=tokens,
        forwards=forwards,
        tokens_per_forward=round(tokens / forwards, 3),
        mean_slots=round(output.jacobi_stats.mean_slots, 2),
        repeats=repeats,
        extra={
            "ms_per_step": round(statistics.median(steps) * 1e3, 4),
            "ms_bare_forward": round(statistics.median(bare) * 1e3, 4),
            "overhead": round(statistics.median(s / b for s, b in zip(steps, bare, strict=True)) - 1, 4),
            "steps_timed": len(steps),
        },
    )


def main(
    model: Annotated[str | None, typer.Option(help="Model name or folder (default: the tiny checkpoint).")] = None,
    output: Annotated[Path, typer.Option(help="Path of the JSON document to write.")] = common.RESULTS
    / "overhead.json",
    max_new_tokens: Annotated[int, typer.Option(min=8)] = 512,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
) -> None:
    """Measure the overhead of a step for n = 4, 8, 16 and 32 with K = 2, eager and compiled."""
    loaded, tokenizer, name = common.load(model)
    prompt = common.prompts(1)["code"][0]
    measurements = [
        one_width(loaded, tokenizer, prompt, block, max_new_tokens, repeats, compiles=compiles)
        for compiles in (False, True)
        for block in (4, 8, 16, 32)
    ]
    Results.start("Cost of a step beside its forward, at 100 % acceptance", loaded, name).with_measurements(
        measurements
    ).write(output)
    for m in measurements:
        print(f"{m.decoder.name}: {m.extra}")
    print(output)


if __name__ == "__main__":
    typer.run(main)
