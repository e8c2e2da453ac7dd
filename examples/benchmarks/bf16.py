"""Equality in bf16: how often Jacobi decoding differs from `generate`, and how often `generate` differs from itself.

    OMP_NUM_THREADS=1 python examples/benchmarks/bf16.py

In bf16 two logits often round to the same value. Then the shape of a matrix product decides the argmax, so texts can
differ between decoders, and also between batch sizes of ordinary decoding. Both rates are measured on the same
prompts.

Baseline: ordinary `generate` at batch 1. The last line on stdout is the path of the JSON document.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from rich.progress import track

from jacobi_hf.results.schema import Agreement, Measurement, Prompts, Results


def outputs(
    model: Any, tokenizer: Any, texts: list[str], batch_size: int, max_new_tokens: int, **knobs: Any
) -> list[list[int]]:
    """Return greedy continuations, each up to its end-of-text token. Batches are padded on the left."""
    found: list[list[int]] = []
    for start in track(
        range(0, len(texts), batch_size), description=f"batch {batch_size} {knobs.get('decoding', 'generate')}"
    ):
        inputs = tokenizer(
            texts[start : start + batch_size], return_tensors="pt", padding=True, return_token_type_ids=False
        )
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **knobs)[
            :, inputs["input_ids"].shape[1] :
        ]
        end = model.generation_config.eos_token_id
        found += [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]
    return found


def until_difference(first: list[int], second: list[int]) -> int:
    """Return how many tokens there are up to the first difference, that token included."""
    return next((i + 1 for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))


def main(
    model: Annotated[str | None, typer.Option(help="Model name or folder (default: the tiny checkpoint).")] = None,
    output: Annotated[Path, typer.Option(help="Path of the JSON document to write.")] = common.RESULTS / "bf16.json",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per domain.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
) -> None:
    """Count the prompts whose text differs, and the tokens that were compared up to the first difference."""
    loaded, tokenizer, name = common.load(model, torch.bfloat16)
    results = Results.start("Equality in bf16: decoders against generate at batch 1", loaded, name)
    multiblock = common.jacobi("jacobi_multiblock")
    contenders = [
        (common.jacobi("jacobi", decoding="jacobi"), 1),
        (multiblock, 1),
        (common.ordinary(), 4),
        (multiblock, 4),
    ]
    measurements = []
    for domain, texts in common.prompts(prompts).items():
        reference = outputs(loaded, tokenizer, texts, 1, max_new_tokens)
        for contender, batch in contenders:
            other = outputs(loaded, tokenizer, texts, batch, max_new_tokens, **contender.arguments)
            different = [i for i, (a, b) in enumerate(zip(reference, other, strict=True)) if a != b]
            compared = sum(until_difference(a, b) for a, b in zip(reference, other, strict=True))
            measurements.append(
                Measurement(
                    decoder=contender.decoder.model_copy(update={"name": f"{contender.decoder.name}, batch {batch}"}),
                    prompts=Prompts(
                        domain=domain,
                        source="examples/tiny_qwen3/prompts.json",
                        count=len(texts),
                        max_new_tokens=max_new_tokens,
                        batch_size=batch,
                    ),
                    agreement=Agreement(
                        baseline="generate, batch 1",
                        identical=len(texts) - len(different),
                        total=len(texts),
                        different=different,
                    ),
                    extra={
                        "mismatches_per_1000_tokens": round(1000 * len(different) / compared, 4),
                        "tokens_compared": compared,
                    },
                )
            )
            print(
                domain,
                measurements[-1].decoder.name,
                f"{len(different)} of {len(texts)} differ",
                measurements[-1].extra,
            )
    results.with_measurements(measurements).write(output)
    print(output)


if __name__ == "__main__":
    typer.run(main)
