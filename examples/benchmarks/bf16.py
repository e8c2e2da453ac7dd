"""Equality in bf16: how often Jacobi decoding differs from `generate`, and how often `generate` differs from itself.

    OMP_NUM_THREADS=1 python examples/benchmarks/bf16.py

In bf16 two logits often round to the same value. Then the shape of a matrix product decides the argmax, so texts can
differ between decoders, and also between batch sizes of ordinary decoding. Both rates are measured on the same
prompts.

Baseline: ordinary `generate` at batch 1. The last line on stdout is the path of the JSON document.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import common
import torch
import typer
from agreement import compared, outputs

from jacobi_hf.results.schema import Results


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
            measurements.append(compared(contender, other, reference, domain, max_new_tokens, batch))
            print(
                domain,
                measurements[-1].decoder.name,
                f"{len(measurements[-1].agreement.different)} of {len(texts)} differ",
                measurements[-1].extra,
            )
    results.with_measurements(measurements).write(output)
    print(output)


if __name__ == "__main__":
    typer.run(main)
