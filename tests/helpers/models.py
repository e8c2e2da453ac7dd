"""The models that the tests run: a few thousand random weights of each architecture."""

from __future__ import annotations

from functools import cache

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 23
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TINY = ("qwen2", "qwen2-sliding", "qwen3", "qwen3-sliding")
OTHERS = ("llama", "mistral", "gpt-neox", "qwen2-moe", "qwen3-moe")


def _build(kind: str, layers: int):
    shape = {**_SHAPE, "num_hidden_layers": layers}
    match kind:
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**shape))
        case "qwen2-sliding":
            return Qwen2ForCausalLM(Qwen2Config(**shape, **_SLIDING))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **shape))
        case "qwen3-sliding":
            return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **shape, **_SLIDING))
        case "gpt-neox":  # has no heads for keys and values alone, in its config neither
            return GPTNeoXForCausalLM(GPTNeoXConfig(**{k: v for k, v in shape.items() if k != "num_key_value_heads"}))
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**shape))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**shape, sliding_window=9))
        case "qwen2-moe":
            return Qwen2MoeForCausalLM(Qwen2MoeConfig(**shape, **_EXPERTS, shared_expert_intermediate_size=16))
        case "qwen3-moe":
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(head_dim=8, **shape, **_EXPERTS))
    raise ValueError(kind)


def fresh_model(kind: str, seed: int = 0, layers: int = 3):
    """Return a new tiny model; its weights are wide enough that its text is not one token over and over.

    One layer is enough, and compiles faster, where a test is about what is compiled rather than what it computes.
    """
    torch.manual_seed(seed)
    return _build(kind, layers).eval()


@cache
def tiny_model(kind: str):
    """The shared tiny model of a kind. Tests must leave it as they found it."""
    return fresh_model(kind)
