"""Measure the cost of collecting and training.

    OMP_NUM_THREADS=1 python examples/benchmarks/training.py

- *collection*: rows per second of collection with all blocks together, in batches. Baseline: the plain decoder at
  batch 1, with the same prompts and model.
- *throughput*: slots per second of `JacobiForcingTrainer` with its defaults. Baseline: tokens per second of
  transformers' `Trainer` on rows of the same length. Both use sdpa and alternate in one process. All P + 2nT slots of
  a record count, although with clean context the slots up to the first wrong token of a noisy block are not computed.
- *loss memory*: highest resident set of one forward and backward with the losses, over 8192 packed tokens and a
  vocabulary of 151936. Baseline: the model's own forward and backward over the same tokens. Each runs in its own
  process.

The last line on stdout is the path of the JSON document.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import common
import memory
import torch
import typer
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from jacobi_hf.results.schema import Cost, Results
from jacobi_hf.trainer import (
    AnswerConfig,
    JacobiForcingConfig,
    JacobiForcingTrainer,
    PackedRecord,
    collect_trajectories,
    record_trajectories,
)

VOCAB = 151_936
TOKENS = 8_192
BLOCK = 16


def collection(model: Any, tokenizer: Any, prompts: int, repeats: int) -> list[Cost]:
    """Return rows per second of both collectors, on so many prompts of code and as many of arithmetic.

    The two domains are separate sets, as in `jacobi-hf collect`.
    """
    texts = json.loads(common.PROMPTS.read_text(encoding="utf-8"))["prompts"]
    sets = [
        sorted((tokenizer(text)["input_ids"] for text in texts[domain][:prompts]), key=len)
        for domain in ("code", "arithmetic")
    ]
    ids = [prompt for of_domain in sets for prompt in of_domain]
    answers = AnswerConfig(max_new_tokens=96)
    seconds = {"plain": [], "together": []}
    for _ in range(repeats):
        started = time.perf_counter()
        for prompt in ids:
            record_trajectories(model, [prompt], BLOCK, answers)
        seconds["plain"].append(time.perf_counter() - started)
        started = time.perf_counter()
        for of_domain in sets:
            for first in range(0, len(of_domain), 64):
                collect_trajectories(model, of_domain[first : first + 64], BLOCK, answers)
        seconds["together"].append(time.perf_counter() - started)
    setting = {
        "prompts": len(ids),
        "block_size": BLOCK,
        "max_new_tokens": 96,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    rate = {name: len(ids) / statistics.median(values) for name, values in seconds.items()}
    dtype = setting["dtype"]
    plain = Cost(
        name=f"collection, plain decoder, batch 1, {dtype}",
        value=rate["plain"],
        unit="rows/s",
        repeats=repeats,
        setting=setting,
    )
    return [
        plain,
        Cost(
            name=f"collection, all blocks together, batch 64, {dtype}",
            value=rate["together"],
            unit="rows/s",
            repeats=repeats,
            baseline=plain.name,
            factor=rate["together"] / rate["plain"],
            setting=setting,
        ),
    ]


def random_record(rng: random.Random, length: int, vocab: int) -> dict[str, Any]:
    """Return a packed record of exactly `length` slots: a prompt, and blocks that are wrong from a random place on."""
    blocks = (length - 8) // (2 * BLOCK)
    prompt = [rng.randrange(2, vocab) for _ in range(length - 2 * BLOCK * blocks)]
    noisy, clean = [], []
    for _ in range(blocks):
        clean.append([rng.randrange(2, vocab) for _ in range(BLOCK)])
        wrong = rng.randint(1, BLOCK)
        noisy.append([*clean[-1][:wrong], *(rng.randrange(2, vocab) for _ in range(BLOCK - wrong))])
    return {"data_id": "random", **PackedRecord.build(prompt, [noisy], clean, states=[0] * blocks).to_row()}


def throughput(length: int, batch: int, steps: int, repeats: int) -> list[Cost]:
    """Return tokens per second of `Trainer` and slots per second of `JacobiForcingTrainer`, measured in turn."""
    rng = random.Random(0)
    model, _, _ = common.load(None)
    vocab = model.config.vocab_size
    options = {
        "output_dir": "build/benchmark",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": True,
        "report_to": "none",
        "max_steps": steps,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 10**6,
        "per_device_train_batch_size": batch,
    }
    rows = [[rng.randrange(2, vocab) for _ in range(length)] for _ in range(batch * steps)]
    plain = Trainer(
        model, TrainingArguments(**options), train_dataset=[{"input_ids": row, "labels": row} for row in rows]
    )
    forced = JacobiForcingTrainer(
        common.load(None)[0],
        JacobiForcingConfig(**options, max_length=length, block_size=BLOCK),
        [random_record(rng, length, vocab) for _ in range(batch * steps)],
    )
    seconds: dict[str, list[float]] = {"sft": [], "forcing": []}
    for _ in range(repeats + 1):  # the first round is a warm-up
        for name, trainer in (("sft", plain), ("forcing", forced)):
            started = time.perf_counter()
            trainer.train()
            seconds[name].append(time.perf_counter() - started)
    rate = {name: batch * steps * length / statistics.median(values[1:]) for name, values in seconds.items()}
    setting = {"row_length": length, "rows_per_step": batch, "steps": steps, "bf16": True}
    sft = Cost(name=f"Trainer, rows of {length}", value=rate["sft"], unit="tokens/s", repeats=repeats, setting=setting)
    return [
        sft,
        Cost(
            name=f"JacobiForcingTrainer, rows of {length}",
            value=rate["forcing"],
            unit="slots/s",
            repeats=repeats,
            baseline=sft.name,
            factor=rate["forcing"] / rate["sft"],
            setting=setting,
        ),
    ]


def loss_model() -> Qwen3ForCausalLM:
    """Return a random model of hidden size 64 with Qwen's vocabulary."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def one_memory(setting: str) -> int:
    """Return the bytes of one step with the losses, or with the sum of the hidden states; for a process of its own."""
    rng = random.Random(0)
    args = JacobiForcingConfig(
        output_dir="build/benchmark",
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=1024,
        block_size=BLOCK,
        context="noisy",
    )
    records = [random_record(rng, 1024, VOCAB) for _ in range(TOKENS // 1024)]
    trainer = JacobiForcingTrainer(loss_model(), args, records)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(records))])
    assert batch["input_ids"].numel() == TOKENS
    before = memory.resident()
    if setting == "losses":
        trainer.compute_loss(trainer.model, batch).backward()
    else:
        mask = trainer.attention_mask(batch)
        hidden = trainer.model.model(
            batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"], use_cache=False
        )[0]
        (hidden.sum() + trainer.model.lm_head.weight.sum()).backward()
    return memory.peak() - before


def loss_memory() -> list[Cost]:
    """Return the memory of the losses: the highest resident set with them minus that without them."""
    used = {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for setting in ("model", "losses"):
        command = [sys.executable, __file__, "--setting", setting]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        used[setting] = int(done.stdout.splitlines()[-1])
    described = {"packed_tokens": TOKENS, "vocabulary": VOCAB, "hidden": 64, "bytes": used}
    return [
        Cost(
            name="losses above the model's own",
            value=(used["losses"] - used["model"]) / 2**30,
            unit="GiB",
            setting=described,
        )
    ]


def main(
    output: Annotated[Path, typer.Option(help="Path of the JSON document to write.")] = common.RESULTS
    / "training.json",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of code, and as many of arithmetic.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per measurement.")] = 15,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    lengths: Annotated[str, typer.Option(help="Row lengths, separated by commas.")] = "256,512",
    setting: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure collection, throughput and memory."""
    if setting is not None:
        print(one_memory(setting))
        return
    model, tokenizer, name = common.load(None)
    results = Results.start("What collecting and training cost", model, name)
    costs = loss_memory()
    for length in map(int, lengths.split(",")):
        costs += throughput(length, max(1, 2048 // length), steps, repeats)
    costs += collection(model, tokenizer, prompts, repeats)
    costs += collection(model.to(torch.bfloat16), tokenizer, prompts, repeats)
    results.model_copy(update={"costs": costs}).write(output)
    for cost in costs:
        print(cost.name, f"{cost.value:.4g} {cost.unit}", "" if cost.factor is None else f"x {cost.factor:.2f}")
    print(output)


if __name__ == "__main__":
    typer.run(main)
