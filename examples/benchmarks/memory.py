"""Measure the memory of a long generation, in units of one key/value cache.

    OMP_NUM_THREADS=1 python examples/benchmarks/memory.py

The model is random, and its cache for 2048 tokens is several times as large as its weights, so a second copy of the
cache would show. Each decoder runs in its own process. The figure is the highest resident set during the generation,
minus the resident set before it. A short warm-up loads code and thread pools first. glibc returns each freed block of
64 KiB or more at once, so resident memory is allocated memory.

Baseline: ordinary `generate`. The last line on stdout is the path of the JSON document.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from transformers import Qwen3Config, Qwen3ForCausalLM

from jacobi_hf.results.schema import Measurement, Prompts, Results

PROMPT = 16
LAYERS = 28
KV_HEADS = 8
HEAD_DIM = 128


def random_model() -> Qwen3ForCausalLM:
    """Return a random model with 28 layers of 8 key/value heads of 128, as Qwen3-1.7B has, and a hidden size of 64."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2 * KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def resident() -> int:
    """Return the resident bytes now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Return the highest number of resident bytes so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_setting(tokens: int, knobs: dict[str, Any]) -> dict[str, Any]:
    """Generate with these knobs and return bytes, forwards and the bytes of the weights; for a process of its own."""
    model = random_model()
    ids = torch.randint(1, 256, (1, PROMPT))
    model.generate(ids, max_new_tokens=40, do_sample=False, **knobs)
    # Ballast up to the highest mark so far, so that the first byte of the generation raises the mark.
    before = resident()
    ballast = torch.ones(max(0, peak() - before), dtype=torch.uint8)
    before = resident() - ballast.nbytes
    watch = common.Stopwatch.on(model)
    watch.starts.clear()
    model.generate(ids, max_new_tokens=tokens, do_sample=False, **knobs)
    used = peak() - before - ballast.nbytes
    return {"bytes": used, "forwards": len(watch.starts), "weights": sum(p.nbytes for p in model.parameters())}


def main(
    output: Annotated[Path, typer.Option(help="Path of the JSON document to write.")] = common.RESULTS / "memory.json",
    tokens: Annotated[int, typer.Option(min=64, help="New tokens.")] = 2048,
    setting: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure `generate`, and Jacobi decoding with a pool of 0 and of 4."""
    if setting is not None:
        print(json.dumps(one_setting(tokens, json.loads(setting))))
        return
    contenders = [
        common.ordinary(),
        common.jacobi("pool-0", jacobi_pool_size=0),
        common.jacobi("pool-4", jacobi_pool_size=4),
    ]
    cache = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4 * (PROMPT + tokens - 1)
    measurements = []
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for contender in contenders:
        command = [sys.executable, __file__, "--tokens", str(tokens), "--setting", json.dumps(contender.arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        found |= {"one_cache": cache, "share_of_one_cache": round(found["bytes"] / cache, 4)}
        measurements.append(
            Measurement(
                decoder=contender.decoder,
                prompts=Prompts(domain="random", source="random ids, random weights", count=1, max_new_tokens=tokens),
                new_tokens=tokens,
                forwards=found.pop("forwards"),
                extra=found,
            )
        )
        print(contender.decoder.name, found)
    Results.start(
        "Resident memory of a generation beyond the model", random_model(), "random Qwen3, 28 layers"
    ).with_measurements(measurements).write(output)
    print(output)


if __name__ == "__main__":
    typer.run(main)
