"""Folders as `save_pretrained` and the trainer write them, with tiny weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from jacobi_hf.drafts.lora_format import CONFIG_FILE, WEIGHTS_FILE, LoraDrafterConfig

CARD = "---\nlicense: apache-2.0\n---\n# A model\n"
DRAFTER = LoraDrafterConfig("user/base", "abc", "qwen3", 8, 1, 11, 2, 2.0, ["q_proj"])
KINDS = {
    "model": ("config.json", {"model_type": "qwen3"}, "model.safetensors"),
    "adapter": (
        "adapter_config.json",
        {"base_model_name_or_path": "user/base", "revision": "abc"},
        "adapter_model.safetensors",
    ),
    "drafter": (CONFIG_FILE, asdict(DRAFTER), WEIGHTS_FILE),
}


def weights(path: Path, value: float = 0.0) -> None:
    save_file({"w": torch.full((3,), value, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})


def make(folder: Path, kind: str = "model", value: float = 0.0) -> Path:
    """Write a folder of this kind with card, tokenizer and generation config."""
    folder.mkdir(parents=True, exist_ok=True)
    config_file, config, weights_file = KINDS[kind]
    texts = {config_file: json.dumps(config), "tokenizer_config.json": "{}", "tokenizer.json": "{}", "README.md": CARD}
    texts["generation_config.json"] = '{"decoding": "jacobi_multiblock"}'
    for name, text in texts.items():
        (folder / name).write_text(text)
    weights(folder / weights_file, value)
    return folder
