r"""Train the tiny Qwen3 that the demo, the tests and the training examples start from.

    OMP_NUM_THREADS=2 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 \
        MALLOC_TOP_PAD_=200000000 python examples/tiny_qwen3/train.py --output-dir build/tiny_qwen3

With the `MALLOC_*` variables, glibc keeps the memory of the logits after each step, which saves about a quarter of the
time. After an interruption, the same command continues from the last checkpoint. The finished model is in
`OUTPUT_DIR/final`, with its held-out losses and its settings in `training.json`. The committed checkpoint is a copy of
that folder.

For the draft model of the benchmarks (1.1 M parameters), add `--hidden-size 128 --layers 3 --tokenizer
examples/tiny_qwen3/checkpoint`.
"""

from __future__ import annotations

import json
import os
import platform
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import arithmetic
import corpus
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
START = "<|im_start|>"
END = "<|im_end|>"
# Words with their leading space, single digits, runs of punctuation, runs of white space without the last one.
PRE_TOKENS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|endoftext|>"
    "{% else %}Question: {{ m.content }}\nAnswer:{% endif %}{% endfor %}"
)


@dataclass
class Recipe:
    """The size of the model, and the amounts of its training data."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints and the finished model."})
    tokens: int = field(default=12_000_000, metadata={"help": "Training tokens, all domains together."})
    code_share: float = field(default=0.55, metadata={"help": "Share of the tokens that is source code."})
    arithmetic_share: float = field(
        default=0.35, metadata={"help": "Share of the tokens that is arithmetic; the rest is prose."}
    )
    row_length: int = field(default=512, metadata={"help": "Tokens per training row."})
    batch_size: int = field(default=4, metadata={"help": "Rows per step."})
    learning_rate: float = field(
        default=2.5e-3, metadata={"help": "Peak learning rate (linear warm-up, cosine decay)."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Number of entries of the byte-level BPE."})
    hidden_size: int = field(default=256, metadata={"help": "Hidden size; heads have 64 dimensions."})
    layers: int = field(default=6, metadata={"help": "Number of layers."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder of a tokenizer to use (default: train one on the texts)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the weights, the order of rows and dropout."})
    compile: bool = field(
        default=False, metadata={"help": "torch.compile the model (needs a C compiler; a third faster)."}
    )


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE that splits digits, with the chat template of the arithmetic domain."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], tokens: int, rng: random.Random) -> np.ndarray:
    """Return `tokens` ids of the shuffled texts, with end-of-text after each; texts repeat until there are enough."""
    encoded = [
        np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16)
        for ids in tokenizer(texts, return_attention_mask=False)["input_ids"]
    ]
    chunks: list[np.ndarray] = []
    while (have := sum(map(len, chunks))) < tokens:
        rng.shuffle(encoded)
        chunks += encoded
    assert have >= tokens
    return np.concatenate(chunks)[:tokens]


class Rows(torch.utils.data.Dataset):
    """Rows of fixed length of a flat array of ids, as inputs of a causal language model."""

    def __init__(self, ids: np.ndarray, length: int) -> None:
        self.rows = ids[: len(ids) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Qwen3ForCausalLM:
    """Return a random Qwen3 with tied embeddings.

    By default it has 5.8 M parameters: hidden size 256, 6 layers, 4 query heads and 2 key/value heads of 64.
    """
    heads = recipe.hidden_size // 64
    config = Qwen3Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def exact_match(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[arithmetic.Problem]
) -> float:
    """Return the share of problems whose greedy completion ends with the right number."""
    right = 0
    for start in range(0, len(problems), 50):
        part = problems[start : start + 50]
        batch = tokenizer([p.prompt for p in part], return_tensors="pt", padding=True, return_token_type_ids=False)
        ids = model.generate(**batch, max_new_tokens=96, do_sample=False)[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        right += sum(arithmetic.read_answer(text) == p.result for text, p in zip(texts, part, strict=True))
    return right / len(problems)


def training_texts(recipe: Recipe) -> dict[str, list[str]]:
    """Return the texts of each domain to train on."""
    problems = max(1000, int(recipe.tokens * recipe.arithmetic_share / 60))
    return {
        "code": corpus.code_texts(held_out=False),
        "prose": corpus.prose_texts(held_out=False),
        "arithmetic": corpus.arithmetic_texts(held_out=False, count=problems),
    }


def held_out_rows(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> dict[str, Rows]:
    """Return at most 120 000 tokens of held-out text of each domain."""
    held_out = {
        "code": corpus.code_texts(held_out=True),
        "prose": corpus.prose_texts(held_out=True),
        "arithmetic": corpus.arithmetic_texts(held_out=True, count=500),
    }
    found = {}
    for domain, texts in held_out.items():
        count = min(120_000, sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts))
        found[domain] = Rows(pack(tokenizer, texts, count, random.Random(0)), recipe.row_length)
    return found


def training_rows(
    tokenizer: PreTrainedTokenizerFast, texts: dict[str, list[str]], recipe: Recipe, rng: random.Random
) -> Rows:
    """Return the training rows of all domains, each domain with its share of the tokens."""
    shares = {
        "code": recipe.code_share,
        "arithmetic": recipe.arithmetic_share,
        "prose": 1 - recipe.code_share - recipe.arithmetic_share,
    }
    streams = [pack(tokenizer, texts[d], int(recipe.tokens * shares[d]), rng) for d in corpus.DOMAINS]
    rows = np.concatenate([Rows(ids, recipe.row_length).rows for ids in streams])
    return Rows(rows.reshape(-1), recipe.row_length)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Return the arguments of the trainer."""
    return TrainingArguments(
        output_dir=recipe.output_dir,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        seed=recipe.seed,
        num_train_epochs=1,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=150,
        weight_decay=0.1,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        report_to="none",
        torch_compile=recipe.compile,
        dataloader_drop_last=True,
    )


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Qwen3ForCausalLM:
    """Write model and tokenizer, and return the model with its weights rounded to bf16, in float32."""
    model = model.to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    model.config.use_cache = True  # Trainer turns it off
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.float()


def measured(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: dict[str, Rows], args: TrainingArguments
) -> dict[str, Any]:
    """Return held-out losses and exact match."""
    options = TrainingArguments(output_dir=args.output_dir, use_cpu=args.use_cpu, report_to="none")
    evaluator = Trainer(model=model, args=options)
    new_templates = arithmetic.held_out_problems(200, arithmetic.HELD_OUT_TEMPLATES)
    return {
        "held_out_loss_nats_per_token": {d: evaluator.evaluate(found)["eval_loss"] for d, found in rows.items()},
        "held_out_tokens": {d: int(found.rows.size) for d, found in rows.items()},
        "arithmetic_exact_match": {
            "held_out_seeds": exact_match(model, tokenizer, arithmetic.held_out_problems(400)),
            "held_out_templates": exact_match(model, tokenizer, new_templates),
        },
    }


def environment() -> dict[str, Any]:
    """Return the machine and the versions of the packages."""
    return {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def main() -> None:
    (recipe,) = HfArgumentParser(Recipe).parse_args_into_dataclasses()
    transformers.set_seed(recipe.seed)
    started = time.perf_counter()
    texts = training_texts(recipe)
    if recipe.tokenizer is None:
        tokenizer = train_tokenizer(texts["code"] + texts["prose"] + texts["arithmetic"][:5000], recipe.vocab_size)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.tokenizer)
    rows = training_rows(tokenizer, texts, recipe, random.Random(recipe.seed))
    held_out = held_out_rows(tokenizer, recipe)
    args = training_arguments(recipe)
    model = build_model(tokenizer, recipe)
    trainer = Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    out = Path(recipe.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    minutes = (time.perf_counter() - started) / 60

    model = save(model, tokenizer, out / "final")
    report = {
        "recipe": {name: value for name, value in asdict(recipe).items() if name != "output_dir"},
        "parameters": model.num_parameters(),
        "unique_training_tokens": {d: int(sum(map(len, tokenizer(found)["input_ids"]))) for d, found in texts.items()},
        **measured(model, tokenizer, held_out, args),
        "minutes_of_this_process_to_the_end_of_training": round(minutes, 1),
        **environment(),
    }
    (out / "final" / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(out / "final" / "training.json")


if __name__ == "__main__":
    main()
