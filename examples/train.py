"""Train a model to guess several of its own tokens at once (Jacobi Forcing).

    python examples/train.py --model Qwen/Qwen3-1.7B --prompts prompts.jsonl --output_dir build/forced --bf16 True

A few steps on a CPU, with the small model of this repository:

    python examples/train.py --model examples/tiny_qwen3/checkpoint --prompts examples/tiny_qwen3/newcomer.jsonl \
        --prompt_count 8 --max_new_tokens 32 --output_dir build/forced --max_steps 2 --per_device_train_batch_size 2
        --use_cpu True

Every field of `JacobiForcingConfig` is an option. For long runs use `jacobi-hf collect`, `pack` and `train`, which
resume after an interruption.
"""

import itertools
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from jacobi_hf.trainer import (
    AnswerConfig,
    JacobiForcingConfig,
    JacobiForcingTrainer,
    NoiseSchedule,
    collect_trajectories,
    pack,
)


@dataclass
class ScriptArguments:
    """Arguments of this script."""

    model: str = field(metadata={"help": "Name on the Hub, or a folder."})
    prompts: str = field(metadata={"help": 'JSONL file with a "prompt" in each line.'})
    prompt_count: int = field(default=256, metadata={"help": "Prompts to read."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, a multiple of block_size."})
    batch_size: int = field(default=16, metadata={"help": "Prompts answered together."})


def main() -> None:
    script, config = HfArgumentParser((ScriptArguments, JacobiForcingConfig)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    model = AutoModelForCausalLM.from_pretrained(script.model, dtype=torch.float32, device_map=config.device).eval()

    # 1. Read the prompts. The model writes the answers itself.
    lines = Path(script.prompts).read_text(encoding="utf-8").splitlines()[: script.prompt_count]
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]

    # 2. Collect trajectories: each answer, with the guesses that Jacobi iteration makes on the way to it.
    answers = AnswerConfig(max_new_tokens=script.max_new_tokens)
    batches = [prompts[start : start + script.batch_size] for start in range(0, len(prompts), script.batch_size)]
    trajectories = itertools.chain.from_iterable(
        collect_trajectories(model, batch, config.block_size, answers) for batch in batches
    )

    # 3. Pack: pair a noisy state of each block with the clean block.
    schedule, rng = NoiseSchedule(), random.Random(config.seed)
    records = [pack(trajectory, schedule, f"prompt {i}", rng) for i, trajectory in enumerate(trajectories)]

    # 4. Train. This is transformers' Trainer with other losses.
    trainer = JacobiForcingTrainer(model=model, args=config, train_dataset=records, processing_class=tokenizer)
    trainer.train()

    # 5. Save a plain checkpoint. Its generation config asks for Jacobi decoding.
    trainer.save_model(config.output_dir)


if __name__ == "__main__":
    main()
