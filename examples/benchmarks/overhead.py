"""What a step costs beside its forward, at 100 % acceptance, as it stands and compiled.

    OMP_NUM_THREADS=1 python examples/benchmarks/overhead.py

Drafts are replaced by the true continuation, so that every guess is confirmed and each step does all the work it ever does. The
bare forward is the same module called with the very arguments of the step (tokens, mask, positions, cache) right before it, alternating
with steps in one process; beside the compiled step, it is compiled in the same way. No candidates: their slots would be part of both.
The overhead is the median over the steps of what each took more than its own bare forward, in parts of that: the clock of a machine that
others share may change between two steps, seldom within one.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from transformers import CompileConfig

import jacobi_hf
from jacobi_hf.decoding.step import ForwardInputs
from jacobi_hf.drafts.window import JacobiWindow
from jacobi_hf.execution.compiled import with_own_code
from jacobi_hf.integration import call as generate_call
from jacobi_hf.results.schema import Measurement, Prompts, Results


def replaying(truth_BT: torch.Tensor, seconds: list[float]) -> Any:
    """Return a `JacobiWindow.propose` that proposes the true continuation.

    Uncompiled, it adds to `seconds` what this took in addition to an ordinary proposal.
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
    """An execution whose every step is preceded by its own forward, bare and on a clock of its own.

    Args:
        compiled_forwards: the compiled forward of each width, filled as they are needed; None for bare ones as they stand.
        replaying: seconds since the last step that are not the decoder's.
    """

    def __init__(
        self, model: Any, execution: Any, compiled_forwards: dict[int, Any] | None, replaying: list[float]
    ) -> None:
        self._model, self._execution, self._forwards, self._replaying = model, execution, compiled_forwards, replaying
        self._last: float | None = None
        self.steps: list[float] = []
        self.bare: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._execution, name)

    def run(
        self,
        state: Any,
        forward: Any,
        selector: Any,
        shape: Any,
        layout: Any,
        key_column_K: torch.Tensor,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """From one step's beginning to the next one's, less the bare forward in between."""
        if self._last is not None:
            self.steps.append(time.perf_counter() - self._last - sum(self._replaying))
        self._replaying.clear()
        token_BQ = state.inputs(shape, layout).token_BQ
        bare, read_K = self._model.forward, key_column_K.view(-1)
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
        return self._execution.run(state, forward, selector, shape, layout, key_column_K, *rest, **options)


def compiled(model: Any) -> Any:
    """The model's forward compiled for one width."""

    def call(arguments: dict[str, Any]) -> torch.Tensor:
        logits: torch.Tensor = model(**arguments).logits
        return logits

    run = torch.compile(with_own_code(call), fullgraph=True, dynamic=False)
    return lambda **arguments: run(arguments)


def one_width(
    model: Any, tokenizer: Any, prompt: str, block: int, max_new_tokens: int, repeats: int, *, compiles: bool
) -> Measurement:
    """Median step and median bare forward with windows of up to 2 `block` guesses."""
    name = f"replay-n{block}" + "-compiled" * compiles
    contender = common.jacobi(name, jacobi_block_size=block, jacobi_pool_size=0, jacobi_lookup_tokens=0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": None}
    reference = model.generate(**inputs, **arguments)
    truth = torch.cat([reference[:, inputs["input_ids"].shape[1] :], torch.zeros(1, 4 * block, dtype=torch.long)], 1)
    if compiles:
        arguments["compile_config"] = CompileConfig()
    steps, bare, tokens, forwards = [], [], 0, 0
    original, execution_for, clocks = JacobiWindow.propose, generate_call.execution_for, []
    compiled_forwards: dict[int, Any] = {}
    seconds: list[float] = []

    def clocked(*arguments: Any) -> Clock:
        clocks.append(Clock(model, execution_for(*arguments), compiled_forwards if compiles else None, seconds))
        return clocks[-1]

    JacobiWindow.propose = replaying(truth, seconds)  # type: ignore[method-assign]
    generate_call.execution_for = clocked  # type: ignore[assignment]
    try:
        for repeat in range(repeats + 1):  # the first one warms up, and compiles
            output = model.generate(**inputs, **arguments, **contender.arguments, return_dict_in_generate=True)
            if not torch.equal(output.sequences, reference) or output.jacobi_stats.window_acceptance < 1:
                raise SystemExit("the replay was not accepted throughout")
            if repeat:
                steps += clocks[-1].steps
                bare += clocks[-1].bare[: len(clocks[-1].steps)]
                tokens, forwards = tokens + max_new_tokens, forwards + output.jacobi_stats.forwards
    finally:
        JacobiWindow.propose = original  # type: ignore[method-assign]
        generate_call.execution_for = execution_for
        jacobi_hf.clear_graphs(model)
    step, alone = statistics.median(steps) * 1e3, statistics.median(bare) * 1e3
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
            "ms_per_step": round(step, 4),
            "ms_bare_forward": round(alone, 4),
            "overhead": round(statistics.median(s / b for s, b in zip(steps, bare, strict=True)) - 1, 4),
            "steps_timed": len(steps),
        },
    )


def main(
    model: Annotated[
        str | None, typer.Option(help="Model name or folder; the tiny checkpoint when not given.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the JSON document goes.")] = common.RESULTS / "overhead.json",
    max_new_tokens: Annotated[int, typer.Option(min=8)] = 512,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
) -> None:
    """Overhead of a step for n = 4, 8, 16 and 32, K = 2, eager and compiled."""
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
