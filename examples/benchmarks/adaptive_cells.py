"""Cells of adaptive.py: models, texts and settings, in the order in which they are measured.

The texts are those that others measure with, as files of JSON lines in one folder: `humaneval.jsonl` (code; on the Hub
`openai/openai_humaneval`), `gsm8k_test.jsonl` (math; `openai/gsm8k`), and `spec_bench.jsonl` (chat: its 80 questions
of MT-bench; summarization: its 80 articles; https://github.com/hemingkx/Spec-Bench). The tiny models also get their
own held-out `arithmetic`, the only text on which the window of the forced one is strong. Of each file, the first
prompts of at most `LONGEST` tokens are used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import jacobi_hf

# Options of the commands that load the real models.
SmolLM2 = Annotated[str, typer.Option(help="SmolLM2-135M-Instruct: name or folder.")]
Qwen = Annotated[str, typer.Option(help="Qwen2.5-Coder-0.5B-Instruct: name or folder.")]

LONGEST = 448
TINY = ("base", "forced", "drafter")
REAL = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct (dequantised Q4_1)",
    "qwen": "Qwen/Qwen2.5-Coder-0.5B-Instruct (dequantised Q4_K_M)",
}
NAMES = {
    "base": "examples/tiny_qwen3/checkpoint",
    "forced": "examples/tiny_qwen3/forced",
    "drafter": "examples/tiny_qwen3/checkpoint + drafter",
    "random": "random weights of the shape of HuggingFaceTB/SmolLM2-135M-Instruct",
    **REAL,
}
TEXTS = ("math", "chat", "code", "summarization")
SOURCES = {
    "math": "GSM8K (test)",
    "chat": "MT-bench, first turns (from Spec-Bench)",
    "code": "HumanEval",
    "summarization": "summarization of Spec-Bench",
    "arithmetic": "examples/tiny_qwen3/prompts.json",
    "readme": "the README's first lines",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Cell:
    """One cell: what is decoded, and how."""

    model: str
    text: str
    dtype: str = "fp32"
    rows: int = 1
    temperature: int = 0
    compiled: bool = False

    @property
    def name(self) -> str:
        """Name of the cell, and of its document."""
        execution = "compiled" if self.compiled else "eager"
        return f"{self.model}-{self.text}-{self.dtype}-b{self.rows}-t{self.temperature}-{execution}"

    @property
    def is_tiny(self) -> bool:
        """Whether the model is one of the tiny ones."""
        return self.model in TINY

    @property
    def prompts(self) -> int:
        """Prompts, or batches of prompts, of the cell."""
        if self.text == "readme":
            return 1
        if self.rows > 1:
            return 2
        return 8 if self.is_tiny else 4

    @property
    def rounds(self) -> int:
        """Calls of a decoder on each prompt or batch."""
        return 4 if self.text == "readme" or (self.rows > 1 and self.is_tiny) else 2

    @property
    def kept_settings(self) -> int:
        """How many of the fixed settings run in all rounds: the best ones of a short round."""
        return 2 if self.is_tiny or (self.model, self.dtype, self.rows) == ("smollm2", "fp32", 1) else 1

    @property
    def tokens(self) -> int:
        """Most new tokens of a call."""
        return 128 if self.is_tiny or self.text == "readme" else 96


def cells() -> list[Cell]:
    """Return all cells, those first whose result is awaited most."""
    awaited = [
        *[Cell("smollm2", text) for text in ("math", "chat", "code")],
        Cell("forced", "arithmetic"),
        Cell("base", "math"),
        Cell("drafter", "arithmetic"),
        Cell("qwen", "readme", "bf16"),
        Cell("random", "math"),
        Cell("smollm2", "summarization"),
    ]
    tiny = [Cell(model, text) for model in TINY for text in (*TEXTS, "arithmetic")]
    math = [Cell(model, "math") for model in (*TINY, "random", "smollm2", "qwen")]
    bf16 = [Cell(model, "math", "bf16") for model in REAL]
    settings: list[dict[str, Any]] = [{"temperature": 1}, {"rows": 8}, {"rows": 8, "temperature": 1}]
    varied = [replace(cell, **changes) for changes in settings for cell in (*math, *bf16)]
    others = [Cell(model, text) for model in ("random", "qwen") for text in TEXTS]
    rest = [replace(cell, **changes) for changes in settings for cell in tiny]
    compiled = [replace(cell, compiled=True) for cell in (*tiny, *rest)]
    return list(dict.fromkeys([*awaited, *tiny, *bf16, Cell("qwen", "math"), *varied, *others, *rest, *compiled]))


def load(cell: Cell, folders: dict[str, str]) -> tuple[Any, Any]:
    """Return model and tokenizer of a cell.

    Args:
        cell: the cell.
        folders: name on the Hub or folder of each real model.
    """
    dtype = DTYPES[cell.dtype]
    if cell.model == "random":
        config = AutoConfig.from_pretrained(folders["smollm2"])
        config.tie_word_embeddings = False
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        torch.nn.init.normal_(model.get_input_embeddings().weight)  # a weaker or tied one soon repeats its tokens
        return model, AutoTokenizer.from_pretrained(folders["smollm2"])
    source = folders.get(cell.model) or str(common.MODELS["forced" if cell.model == "forced" else "base"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    if cell.model == "drafter":
        jacobi_hf.load_drafter(model, common.TINY / "drafter")
    return model, AutoTokenizer.from_pretrained(source)


def batches(cell: Cell, tokenizer: Any, data: Path) -> list[dict[str, torch.Tensor]]:
    """Return the arguments of `generate` for each call of a cell."""
    ids = [one for text in texts(cell.text, data) if len(one := encoded(cell, tokenizer, text)) <= LONGEST]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    groups = [ids[i * cell.rows : (i + 1) * cell.rows] for i in range(cell.prompts)]
    return [
        dict(tokenizer.pad({"input_ids": group}, padding_side="left", return_tensors="pt"))
        for group in groups
        if group
    ]


def encoded(cell: Cell, tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a prompt: through the chat template for the instruct models, else as it is."""
    if cell.is_tiny or cell.text == "readme":
        return list(tokenizer(text)["input_ids"])
    if cell.text == "code":
        text = f"Complete this Python function.\n\n```python\n{text}```"
    message = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])


def texts(name: str, data: Path) -> list[str]:
    """Return the prompts of a text, in the order of its file."""
    if name == "readme":
        return ["def quicksort(items):"]
    if name == "arithmetic":
        return common.prompts(64)[name]
    if name == "code":
        return [record["prompt"] for record in lines(data / "humaneval.jsonl")]
    if name == "math":
        return [record["question"] for record in lines(data / "gsm8k_test.jsonl")]
    bench = lines(data / "spec_bench.jsonl")
    if name == "summarization":
        return [record["turns"][0] for record in bench if record["category"] == name]
    return [record["turns"][0] for record in bench[:80]]


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
