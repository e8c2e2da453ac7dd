"""Documents of results for the tests of cards, with one string in every place that holds a string."""

from __future__ import annotations

import re
from typing import Any

from markdown_it import MarkdownIt

from jacobi_hf.results.environment import Hardware, Software
from jacobi_hf.results.schema import Agreement, Decoder, Measurement, Prompts, Quality, Results, Speedup
from jacobi_hf.results.training import Batch, LossWeights, Training, TrainingData, TrainingDrafts


def training(text: str = "plain") -> Training:
    return Training(
        method="finetune",
        base_model=text,
        command=text,
        reference_model=text,
        data=[TrainingData(name=text, source=text, samples=1000)],
        strategy=TrainingDrafts(schedule=text, block_size=16, noise_levels=8, min_noise=0.25, visits=2),
        epochs=1.5,
        steps=200,
        optimizer=text,
        learning_rate=1e-4,
        schedule=text,
        batch=Batch(devices=8, per_device=4, accumulation=2),
        precision="bf16",
        weights_dtype=text,
        loss_weights=LossWeights(consistency=1, ar=0.5, replay=0, kl=4),
        slots=4_000_000,
        minutes=150,
        threads=3,
        hardware=Hardware(cpu=text, cores=2, gpu=text),
        seed=7,
    )


def document(text: str = "plain", dtype: str = "float32", **changes: Any) -> Results:
    """Return a document with ordinary, compiled and Jacobi decoding of one domain, and one stage of training."""
    prompts = Prompts(domain=text, source=text, count=10, max_new_tokens=64)
    score = Quality(metric=text, value=0.75, low=0.5, high=0.875, samples=10)
    jacobi = Decoder(
        name=f"jacobi {text}", kind="jacobi_multiblock", block_size=16, max_blocks=2, pool_size=2, lookup_tokens=12
    )
    compiled = Decoder(name="compiled", kind="generate-static-compiled", compiled=True)
    measurements = [
        Measurement(
            decoder=Decoder(name="generate", kind="generate"), prompts=prompts, tokens_per_second=100, quality=score
        ),
        Measurement(decoder=compiled, prompts=prompts, tokens_per_second=150),
        Measurement(
            decoder=jacobi,
            prompts=prompts,
            tokens_per_forward=3.14159,
            tokens_per_second=250.4,
            quality=score,
            speedups=[Speedup(baseline="generate", factor=2.504), Speedup(baseline="compiled", factor=1.669)],
            agreement=Agreement(baseline="generate", identical=9, total=10, different=[3]),
            accepted_lengths={1: 1, 3: 1},
        ),
    ]
    fields: dict[str, Any] = {
        "what": text,
        "command": text,
        "created": text,
        "model": text,
        "parameters": 5_800_000,
        "dtype": dtype,
        "device": text,
        "threads": 1,
        "attention": text,
        "hardware": Hardware(cpu=text, cores=2),
        "software": Software(python=text, packages={text: text}, git_revision=text),
        "measurements": measurements,
        "training": [training(text)],
    }
    return Results(**{**fields, **changes})


def outline(card: str) -> list[str]:
    """Return the structure of a card: the blocks and spans of its Markdown, without their words."""
    inert = {"text", "text_special", "code_inline", "softbreak"}
    return [
        f"{token.type} {token.tag} {token.attrs.get('href', '')}"
        for block in parsed(card)
        for token in [block, *(block.children or [])]
        if token.type not in inert
    ]


def parsed(card: str) -> list[Any]:
    """Return the Markdown tokens of a card without its metadata, parsed as GitHub does."""
    body = re.sub(r"\A---\n.*?\n---\n", "", card, count=1, flags=re.DOTALL)
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)


def words(card: str) -> str:
    """Return what a reader sees of a card, without the code in fences."""
    return "\n".join(
        "".join(child.content for child in block.children or []) for block in parsed(card) if block.type == "inline"
    )


def tables(card: str) -> list[list[list[str]]]:
    """Return the rows of each table of a card, without its head."""
    found = []
    rows = []
    for line in [*card.split("\n"), ""]:
        if line.startswith("| "):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append(rows[2:])
            rows = []
    return found
