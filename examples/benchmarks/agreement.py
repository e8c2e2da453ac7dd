"""Parts that the benchmarks of equality share: continuations in batches, and how far two of them agree."""

from __future__ import annotations

from typing import Any

from common import Contender
from rich.progress import track

from jacobi_hf.results.schema import Agreement, Measurement, Prompts


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


def compared(
    contender: Contender,
    others: list[list[int]],
    references: list[list[int]],
    domain: str,
    max_new_tokens: int,
    batch_size: int,
    **extra: Any,
) -> Measurement:
    """Return the comparison of a contender's continuations with those of ordinary `generate` at batch 1.

    Args:
        contender: what decoded.
        others: its continuations.
        references: those of ordinary `generate`.
        domain: kind of the prompts.
        max_new_tokens: most tokens of a continuation.
        batch_size: prompts that the contender decoded together.
        extra: further entries of the measurement.
    """
    tokens = sum(map(until_difference, references, others))
    agreement = Agreement.between(others, references, "generate, batch 1")
    return Measurement(
        decoder=contender.decoder.model_copy(update={"name": f"{contender.decoder.name}, batch {batch_size}"}),
        prompts=Prompts(
            domain=domain,
            source="examples/tiny_qwen3/prompts.json",
            count=len(others),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        ),
        agreement=agreement,
        extra={
            "mismatches_per_1000_tokens": round(1000 * len(agreement.different) / tokens, 4),
            "tokens_compared": tokens,
            **extra,
        },
    )
