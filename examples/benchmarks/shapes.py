"""Models with random weights at the shapes of known models, and the memory traffic of a step."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

# hidden size, intermediate size, layers, query heads, key/value heads, head dimension, vocabulary, tied embeddings
# "tiny" is for trying the script.
SHAPES: dict[str, tuple[type, tuple[int, int, int, int, int, int, int, bool]]] = {
    "tiny": (Qwen3Config, (64, 128, 2, 4, 2, 16, 512, True)),
    "0.1b": (Qwen3Config, (768, 2304, 12, 12, 4, 64, 32_768, True)),
    "qwen3-0.6b": (Qwen3Config, (1024, 3072, 28, 16, 8, 128, 151_936, True)),
    "qwen3-1.7b": (Qwen3Config, (2048, 6144, 28, 16, 8, 128, 151_936, True)),
    "qwen3-8b": (Qwen3Config, (4096, 12_288, 36, 32, 8, 128, 151_936, False)),
    "qwen2.5-7b": (Qwen2Config, (3584, 18_944, 28, 28, 4, 128, 152_064, False)),
}


def build(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model of a shape in `SHAPES` with random weights."""
    kind, (hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied) = SHAPES[shape]
    head = {"head_dim": head_dim} if kind is Qwen3Config else {}
    config = kind(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=32_768,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **head,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second that the best of ten copies reads and writes."""
    source = torch.empty((64 if device.type == "cpu" else 1024) * 2**20, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() * 4 / best


def bytes_read(model: Any, batch: int, context: int) -> int:
    """Return the bytes that any step must read: the weights and the cached keys and values.

    An embedding that is not tied to the output layer does not count, because a step reads few of its rows.
    """
    config = model.config
    looked_up = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in model.parameters()) - looked_up
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * batch * context * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return (weights + cached) * model.dtype.itemsize
