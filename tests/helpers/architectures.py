"""Tiny random models of all causal classes of the installed transformers, built from their config classes.

A config class is filled with small numbers by the names of its fields, so that a class of a new release needs no
entry here. Where that does not give a model, `build` raises, and the sweep counts the class as not built.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import jacobi_hf
from jacobi_hf.integration.mixin import JacobiGenerationMixin

VOCAB = 61
# Positions that a sliding or chunked layer looks back. Texts of the sweep are longer.
WINDOW = 9
LAYERS = 4
MOST_WEIGHTS = 12_000_000
# What to try, one after the other, until a model generates: some classes check their numbers against each other.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_kv_shared_layers": 0},
    {"bos_token_id": 1, "eos_token_id": 2},
    {"num_experts_per_tok": 1},
    {"mamba_n_heads": 4, "mamba_d_head": 16, "num_heads": 4, "head_dim": 16},
    {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    {"attention_types": [[["global", "local"], LAYERS // 2]]},
    {"default_language": "en_XX"},
    {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    {"num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2},
)
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "multi_query_group_num": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "kv_channels": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_window_size": WINDOW,
    "window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "chunk_size": 16,  # of state space layers: with 256 some releases make tensors of 16 GiB
    "mamba_chunk_size": 16,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "moe_intermediate_size": 16,
    "moe_ffn_hidden_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 2,
    "dim_model_base": 16,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "hidden_dropout": 0.0,
    "dropout": 0.0,
    "is_decoder": True,
}


def causal_classes() -> dict[str, str]:
    """Return the class name of each model type for which `AutoModelForCausalLM` has one, every class once."""
    types: dict[str, str] = {}
    for model_type, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        if name not in types.values():
            types[model_type] = name
    return types


def class_of(name: str) -> type | None:
    """Return a class of transformers by its name; None if the installed transformers cannot import it."""
    try:
        return getattr(transformers, name)
    except (AttributeError, ImportError):
        return None


def tiny_config(config_class: type[PreTrainedConfig], **values: Any) -> PreTrainedConfig:
    """Return a config of a class with small numbers, the nested text config too.

    Args:
        config_class: a config class.
        values: fields to set to something else; those that the class does not have are left out.
    """
    sub_configs = getattr(config_class, "sub_configs", {})
    fields = _fields(config_class)
    small = {name: value for name, value in (_SMALL | values).items() if name in fields}
    if "text_config" in sub_configs:
        text_class = sub_configs["text_config"]
        if text_class is not AutoConfig:
            small["text_config"] = tiny_config(text_class, **values).to_dict()
    return config_class(**small)


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """Return the names of a config class's own fields."""
    names = set(inspect.signature(config_class.__init__).parameters)
    names |= set(getattr(config_class, "__dataclass_fields__", {}))
    names |= set(getattr(config_class, "attribute_map", {}))
    return names


def build(model_type: str, name: str, seed: int = 0, **values: Any) -> Any:
    """Return a tiny random model of a class.

    Args:
        model_type: key of the class's config in transformers' mapping.
        name: of the class.
        seed: of the weights.
        values: config fields to set to something else.

    Raises:
        Exception: the class cannot be built in this way.
    """
    model_class = class_of(name)
    if model_class is None or not issubclass(model_class, GenerationMixin):
        raise TypeError(f"{name} cannot be imported here, or does not generate")
    config_class = model_class.config_class or CONFIG_MAPPING[model_type]
    config = tiny_config(config_class, **values)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > MOST_WEIGHTS:
        raise ValueError(f"{name} has {count} weights even with small numbers in its config")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some classes leave weights as they came, or all zeros
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            if not parameter.isfinite().all():
                parameter.fill_(0.5)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def build_that_generates(model_type: str, name: str) -> Any:
    """Return a tiny random model of a class that generates, with the first of `_VARIANTS` that works.

    Raises:
        Exception: none works; the error is that of the first one.
    """
    first: Exception | None = None
    for values in _VARIANTS:
        try:
            model = build(model_type, name, **values)
            model.generate(torch.tensor([[5, 6, 7], [8, 9, 3]]), max_new_tokens=3, do_sample=False)
        except Exception as error:  # whatever a class does not like about its config
            first = first or error
        else:
            return model
    assert first is not None
    raise first


@dataclass
class Finding:
    """What the sweep has found out about a class.

    Attributes:
        outcome: "equal", "falls back", "refused", "not built", or "FAILS".
        detail: the reason, or what is wrong.
    """

    outcome: str
    detail: str = ""


def calls_of(kind: str) -> dict[str, Any]:
    """Return the arguments of a call of the sweep: greedy, of a batch with pads, or sampled."""
    ids = torch.randint(3, VOCAB, (2, WINDOW + 4), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :3] = 0
    mask[1, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 2 * WINDOW, "do_sample": False}
    if kind == "greedy":
        return batch | {"input_ids": ids[:1], "attention_mask": mask[:1], "max_new_tokens": 3 * WINDOW}
    return batch | {"do_sample": True, "top_k": 5} if kind == "sampled" else batch


def judge(model_type: str, name: str) -> Finding:
    """Return what happens if a class decodes with Jacobi, compared with its ordinary decoding."""
    try:
        model = build_that_generates(model_type, name)
    except Exception as error:
        return Finding("not built", f"{type(error).__name__}: {error}".split("\n")[0])
    was_registered = issubclass(type(model), JacobiGenerationMixin)
    try:
        jacobi_hf.register(type(model))
    except TypeError as error:
        return Finding("refused", str(error))
    try:
        return _compare(model)
    finally:
        if not was_registered:
            jacobi_hf.unregister(type(model))


def _compare(model: Any) -> Finding:
    reasons: list[str] = []
    compared = 0
    own = model.config.get_text_config(decoder=True)._attn_implementation
    for kind, attention in (("greedy", own), ("batch", own), ("sampled", own), ("batch", "eager")):
        if attention != own:
            model.set_attn_implementation(attention)
        arguments = calls_of(kind)
        torch.manual_seed(3)
        try:
            plain = model.generate(**arguments)
        except Exception:  # the class does not serve such a call
            continue
        compared += 1
        torch.manual_seed(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                output = model.generate(**arguments, decoding="jacobi_multiblock")
            except Exception as error:
                return Finding("FAILS", f"{kind}, {attention}: {type(error).__name__}: {error}")
        reasons += [str(one.message) for one in caught if "decoding ordinarily" in str(one.message)]
        if not torch.equal(plain, output):
            return Finding("FAILS", f"{kind}, {attention}: another text")
    if reasons:
        return Finding(
            "falls back", reasons[0].partition("does not support ")[2].removesuffix(": decoding ordinarily.")
        )
    return Finding("equal" if compared else "not built")
