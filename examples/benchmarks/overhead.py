"""What a step costs beside its forward, at 100 % acceptance.

    OMP_NUM_THREADS=1 python examples/benchmarks/overhead.py

Drafts are replaced by the true continuation, so that every guess is confirmed and each step does all the work it ever does. The
bare forward is the same module called again with the very arguments of the step (width, mask, positions, cache), alternating with
steps in one process. No candidates: their slots would be part of both.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer

from jacobi_hf.results import Measurement, Prompts, Results
from jacobi_hf.window import Window


def replaying(truth_BT: torch.Tensor) -> Any:
    """A `Window.redraft` that drafts the true continuation."""
    redraft = Window.redraft

    def replay(self: Window, generated_B: torch.Tensor, *rest: Any) -> None:
        redraft(self, generated_B, *rest)
        index_BW = generated_B[:, None] + torch.arange(self.draft_BW.shape[1])
        self.draft_BW = truth_BT.gather(1, index_BW.clamp(max=truth_BT.shape[1] - 1))

    return replay


def one_width(model: Any, tokenizer: Any, prompt: str, block: int, max_new_tokens: int, repeats: int) -> Measurement:
    """Median step and median bare forward with windows of up to 2 `block` guesses."""
    contender = common.jacobi(f"replay-n{block}", jacobi_block_size=block, jacobi_pool_size=0, jacobi_lookup_tokens=0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": None}
    reference = model.generate(**inputs, **arguments)
    truth = torch.cat([reference[:, inputs["input_ids"].shape[1] :], torch.zeros(1, 4 * block, dtype=torch.long)], 1)
    original, steps, bare, tokens, forwards = Window.redraft, [], [], 0, 0
    Window.redraft = replaying(truth)  # type: ignore[method-assign]
    try:
        for _ in range(repeats):
            starts: list[float] = []

            def repeat_alone(_: Any, __: tuple, kwargs: dict[str, Any], starts: list[float] = starts) -> None:
                """Before the step's own forward: the same forward, bare and on the clock; then the step's clock goes on."""
                if starts:
                    steps.append(time.perf_counter() - starts[-1])
                    began = time.perf_counter()
                    model.forward(**kwargs)
                    bare.append(time.perf_counter() - began)
                starts.append(time.perf_counter())

            hook = model.register_forward_pre_hook(repeat_alone, with_kwargs=True)
            output = model.generate(**inputs, **arguments, **contender.arguments, return_dict_in_generate=True)
            hook.remove()
            if not torch.equal(output.sequences, reference) or output.jacobi_stats.window_acceptance < 1:
                raise SystemExit("the replay was not accepted throughout")
            del steps[-len(starts) + 1]  # from the prefill to the first step
            del bare[-len(starts) + 1]
            tokens, forwards = tokens + max_new_tokens, forwards + output.jacobi_stats.forwards
    finally:
        Window.redraft = original  # type: ignore[method-assign]
    step, alone = statistics.median(steps) * 1e3, statistics.median(bare) * 1e3
    return Measurement(
        decoder=contender.decoder,
        prompts=Prompts(domain="replay", source="the first held-out code prompt", count=1, max_new_tokens=max_new_tokens),
        new_tokens=tokens,
        forwards=forwards,
        tokens_per_forward=round(tokens / forwards, 3),
        mean_slots=round(output.jacobi_stats.mean_slots, 2),
        repeats=repeats,
        extra={
            "ms_per_step": round(step, 4),
            "ms_bare_forward": round(alone, 4),
            "overhead": round(step / alone - 1, 4),
            "steps_timed": len(steps),
        },
    )


def main(
    model: Annotated[str | None, typer.Option(help="Model name or folder; the tiny checkpoint when not given.")] = None,
    output: Annotated[Path, typer.Option(help="Where the JSON document goes.")] = common.RESULTS / "overhead.json",
    max_new_tokens: Annotated[int, typer.Option(min=8)] = 512,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
) -> None:
    """Overhead of a step for n = 4, 8, 16 and 32, K = 2."""
    loaded, tokenizer, name = common.load(model)
    prompt = common.prompts(1)["code"][0]
    measurements = [one_width(loaded, tokenizer, prompt, block, max_new_tokens, repeats) for block in (4, 8, 16, 32)]
    Results.start("Cost of a step beside its forward, at 100 % acceptance", loaded, name).with_measurements(measurements).write(output)
    for m in measurements:
        print(f"n={m.decoder.block_size}: {m.extra}")
    print(output)


if __name__ == "__main__":
    typer.run(main)
