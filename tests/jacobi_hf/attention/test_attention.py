from __future__ import annotations

import sys
import threading
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from transformers import CompileConfig, DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jacobi_hf import register, unregister
from jacobi_hf.attention import interface as attention
from jacobi_hf.attention import kernels as jacobi_kernels
from jacobi_hf.attention.interface import (
    FLASH,
    FLEX,
    GROUPED_SLOTS,
    OURS,
    SDPA,
    StepMasks,
    step_attention,
    usable_kernels,
)
from jacobi_hf.attention.masks import attention_mask
from jacobi_hf.decoding.layout import build_layout, chain_layout
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.integration.forward import jacobi_attention
from tests.helpers.models import VOCAB, fresh_model, tiny_model
from tests.helpers.properties import at_most

CPU = torch.device("cpu")


def dense(query, key, value, allowed, scaling):
    """Return softmax attention, computed head by head as it is defined."""
    groups = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    for row in range(len(query)):
        for head in range(query.shape[1]):
            scores = query[row, head] @ key[row, head // groups].T * scaling
            weights = scores.masked_fill(~allowed[row, 0], float("-inf")).softmax(-1)
            output[row, head] = weights @ value[row, head // groups]
    return output.transpose(1, 2)


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, window_size):
    """Return what flash-attn documents: the queries are the last of the `cache_seqlens` keys, under a causal mask."""
    assert causal
    assert cache_seqlens.dtype == torch.int32
    assert cache_seqlens.shape == (len(q),)
    output = torch.full_like(q, float("nan"))
    for row, filled in enumerate(cache_seqlens.tolist()):
        key, value = (
            states[row, :filled].repeat_interleave(q.shape[2] // states.shape[2], 1) for states in (k_cache, v_cache)
        )
        scores = torch.einsum("qhd,khd->hqk", q[row], key) * softmax_scale
        distance = torch.arange(q.shape[1])[:, None] + filled - q.shape[1] - torch.arange(filled)
        hidden = distance < 0
        if window_size[0] >= 0:
            hidden |= distance > window_size[0]
        if window_size[1] >= 0:
            hidden |= -distance > window_size[1]
        output[row] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value)
    return output


@pytest.fixture
def kernels(monkeypatch):
    """Make the kernels of CUDA run on the CPU, and return a counter of their calls.

    FlexAttention runs uncompiled, and flash-attn is emulated by the function above.
    """
    counts = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(attention, name, call)

    package = ModuleType("flash_attn")
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("jacobi_hf.attention.kernels._compiled_flex_attention", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(attention, "usable_kernels", lambda own, *_: {own})
    for name in ("flex", "flash", "grouped_sdpa"):
        counted(name, getattr(attention, name))
    return counts


@pytest.mark.parametrize("own", [SDPA, FLEX, FLASH])
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple) | st.sampled_from([(150,), (90, 60)]),
    cached=st.lists(st.integers(0, 9) | st.sampled_from([127, 140]), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 6) | st.just(130),
    groups=st.integers(1, 4),
    heads=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)
@at_most(50)
def test_every_kernel_is_dense_attention(kernels, own, lengths, cached, window, groups, heads, seed):
    """Ragged rows, trees and sliding windows. Columns after a row's slots are never read."""
    torch.manual_seed(seed)
    layout, batch, width, lengths_B = build_layout(lengths, CPU), len(cached), 8, torch.tensor(cached)
    extent = max(cached) + layout.slots + 3
    query = torch.randn(batch, heads * groups, layout.slots, width)
    key, value = torch.randn(batch, heads, extent, width), torch.randn(batch, heads, extent, width)
    allowed = attention_mask(layout, lengths_B, torch.arange(extent), window)
    config = fresh_model("qwen3").config
    config.num_attention_heads, config.num_key_value_heads, config._attn_implementation = (
        heads * groups,
        heads,
        OURS[own],
    )
    config.layer_types, config.sliding_window = ["full_attention" if window is None else "sliding_attention"], window
    masks = StepMasks(SimpleNamespace(config=config, dtype=torch.float32), CPU)
    mask = masks.of_step(layout, lengths_B, torch.arange(extent))
    module = SimpleNamespace(num_key_value_groups=groups)
    kernels.clear()
    output, _ = step_attention(own, module, query, key, value, mask, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(output, dense(query, key, value, allowed, 0.3), atol=1e-5, rtol=1e-5)
    sdpa = {"grouped_sdpa"} if groups > 1 else set()
    assert set(kernels) == ({"flex"} if own == FLEX else {"flash"} if own == FLASH and layout.is_chain else sdpa)


@given(
    length=st.integers(1, 12),
    window=st.none() | st.integers(1, 14),
    groups=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_a_prefill_without_past_is_causal_without_a_mask(length, window, groups, seed):
    torch.manual_seed(seed)
    layout, zero_B = chain_layout(length, CPU, without_past=True), torch.zeros(2, dtype=torch.long)
    query, key, value = torch.randn(2, 2 * groups, length, 8), torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8)
    config = fresh_model("qwen3").config
    config.num_attention_heads, config.num_key_value_heads, config._attn_implementation = 2 * groups, 2, OURS[SDPA]
    config.layer_types, config.sliding_window = ["full_attention" if window is None else "sliding_attention"], window
    mask = StepMasks(SimpleNamespace(config=config, dtype=torch.float32), CPU).of_step(
        layout, zero_B, torch.arange(16)
    )
    assert (mask.numel() == 0) == (window is None or window >= length)
    output, _ = step_attention(
        SDPA, SimpleNamespace(num_key_value_groups=groups), query, key, value, mask, scaling=0.3
    )
    allowed = attention_mask(layout, zero_B, torch.arange(16), window)
    torch.testing.assert_close(output, dense(query, key, value, allowed, 0.3), atol=1e-5, rtol=1e-5)


WINDOW = {"jacobi_block_size": 4, "jacobi_lookup_tokens": 0, "jacobi_pool_size": 0}
TREE = {"jacobi_block_size": 4, "jacobi_lookup_tokens": 4, "jacobi_pool_size": 2, "jacobi_branch_length": 3}


@pytest.mark.parametrize("kind", ["qwen3", "qwen2-sliding", "mistral"])
@pytest.mark.parametrize(
    ("own", "knobs", "expected"),
    [
        (SDPA, TREE, {"grouped_sdpa"}),
        (FLEX, WINDOW, {"flex"}),
        (FLEX, TREE, {"flex"}),
        (FLASH, WINDOW, {"flash"}),
        (FLASH, TREE, {"flash", "grouped_sdpa"}),
    ],
)
def test_the_same_tokens_whichever_runs(kernels, kind, own, knobs, expected):
    """Batch 1 and a ragged batch of 3, prompts longer than the sliding window."""
    model = fresh_model(kind)
    register(type(model))
    try:
        for prompt in prompts():
            reference = model.generate(**prompt, max_new_tokens=24)
            kernels.clear()
            model.config._attn_implementation = own
            output = model.generate(**prompt, max_new_tokens=24, decoding="jacobi_multiblock", **knobs)
            assert model.config._attn_implementation == own
            model.config._attn_implementation = SDPA
            assert torch.equal(output, reference)
            # The sliding layers of a prefill take a mask whatever runs.
            assert set(kernels) - {"grouped_sdpa"} == expected - {"grouped_sdpa"}
            assert own == FLEX or ("grouped_sdpa" in kernels) == ("grouped_sdpa" in expected)
    finally:
        if kind == "mistral":
            unregister(type(model))


def prompts():
    ids = torch.randint(1, 7, (3, 11), generator=torch.Generator().manual_seed(0))
    ids[0, :4] = ids[2, :9] = 0
    for rows in (ids[1:2], ids):
        yield {"input_ids": rows, "attention_mask": (rows != 0).long(), "pad_token_id": 0, "do_sample": False}


@pytest.mark.slow
def test_compiled_steps_of_an_sdpa_model_run_flex(kernels, monkeypatch):
    """Each shape compiles once, for any lengths: one block of columns or more, with or without whole blocks."""
    model, compiler = fresh_model("qwen3"), CompileConfig(backend="eager", mode=None)
    monkeypatch.setattr(attention, "usable_kernels", lambda *_: {FLEX})
    monkeypatch.setattr(attention, "flex", jacobi_kernels.flex)  # not counted, as counting is no tensor operation
    monkeypatch.setattr(attention, "grouped_sdpa", lambda *_: pytest.fail("sdpa ran"))
    knobs = {"jacobi_block_size": 2, "jacobi_max_blocks": 0, "jacobi_lookup_tokens": 3, "jacobi_pool_size": 0}
    shapes = 0
    for columns, new_tokens in ((5, 12), (125, 30)):
        prompt = {
            "input_ids": torch.arange(columns)[None] % 5 + 1,
            "do_sample": False,
            "pad_token_id": 0,
            "max_new_tokens": new_tokens,
        }
        reference = model.generate(**prompt)
        output = model.generate(
            **prompt, decoding="jacobi_multiblock", **knobs, compile_config=compiler, return_dict_in_generate=True
        )
        assert torch.equal(output.sequences, reference)
        shapes += output.jacobi_stats.compiled_steps
        if columns == 5:
            counters.clear()
            first = shapes
    assert first > 0
    assert counters["stats"]["unique_graphs"] == shapes - first


def test_a_flex_model_is_served_where_flex_has_no_kernel():
    model = tiny_model("qwen3")
    assert usable_kernels(FLEX, CPU, torch.bfloat16, 64) == set()
    for prompt in prompts():
        reference = model.generate(**prompt, max_new_tokens=12)
        model.config._attn_implementation = FLEX
        try:
            output = model.generate(**prompt, max_new_tokens=12, decoding="jacobi_multiblock")
        finally:
            model.config._attn_implementation = SDPA
        assert torch.equal(output, reference)


@pytest.mark.parametrize(
    ("own", "dtype", "head_dim", "usable"),
    [
        (SDPA, torch.bfloat16, 128, {FLEX}),
        (FLEX, torch.float16, 64, {FLEX}),
        (FLASH, torch.bfloat16, 128, {FLEX, FLASH}),
        (FLASH, torch.bfloat16, 100, {FLEX}),
        (FLASH, torch.float32, 128, set()),
        (FLEX, torch.bfloat16, 8, set()),
    ],
)
def test_kernels_that_cuda_has(monkeypatch, own, dtype, head_dim, usable):
    monkeypatch.setattr(attention, "has_flex", lambda: True)
    assert usable_kernels(own, torch.device("cuda"), dtype, head_dim) == usable


@pytest.mark.parametrize("own", [FLEX, FLASH])
def test_what_is_not_ours_goes_to_the_implementation_that_the_model_has(monkeypatch, own):
    seen = []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS,
        own,
        lambda module, *args, **_: seen.append((module.config._attn_implementation, args[3])),
    )
    model = fresh_model("qwen3")
    module, states = model.model.layers[0].self_attn, torch.zeros(1, 4, 3, 8)
    model.config._attn_implementation = OURS[own]
    for mask in (None, torch.ones(1, 3)):
        step_attention(own, module, states, states[:, :2], states[:, :2], mask)
        assert seen.pop() == (own if own == FLASH else OURS[own], mask)
    assert module.config._attn_implementation == OURS[own]
    with pytest.raises(ValueError, match="softcap"):
        step_attention(own, module, states, states[:, :2], states[:, :2], torch.zeros(1, 1, 6, 3), softcap=3.0)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2-sliding"])
@pytest.mark.parametrize("columns", [5, GROUPED_SLOTS + 9])
def test_to_everybody_else_it_is_sdpa(kind, columns):
    """Ordinary forwards, padded, cached and long ones."""
    model, outputs = fresh_model(kind), []
    ids = torch.randint(1, VOCAB, (2, columns), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for implementation in ("sdpa", OURS[SDPA]):
        model.set_attn_implementation(implementation)
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :-1], attention_mask=mask[:, :-1], **{CACHE: cache}).logits
        outputs.append(
            torch.cat([first, model(ids[:, -1:], attention_mask=mask, **{CACHE: cache}).logits], 1)[mask.bool()]
        )
    assert torch.equal(*outputs)


def test_a_call_switches_to_it_and_back():
    model, ids, seen = fresh_model("qwen3"), torch.tensor([[3, 4, 5]]), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, decoding="jacobi_multiblock")
    assert set(seen) == {OURS[SDPA]}
    assert model.config._attn_implementation == "sdpa"

    def fails(*_):
        raise RuntimeError("broken off")

    handle = model.model.layers[1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="broken off"):
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, decoding="jacobi_multiblock")
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    seen.clear()
    model.set_attn_implementation("eager")
    model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, decoding="jacobi_multiblock")
    assert set(seen) == {"eager"}


def test_calls_that_overlap_leave_the_model_as_it_was():
    model = tiny_model("qwen3")
    model.set_attn_implementation("sdpa")
    ids = torch.randint(1, VOCAB, (4, 6), generator=torch.Generator().manual_seed(1))
    alone = [model.generate(row[None], max_new_tokens=30, do_sample=False, pad_token_id=0) for row in ids]
    outputs = [None] * 4

    def decode(number):
        knobs = {"decoding": "jacobi_multiblock"} if number % 2 else {}
        outputs[number] = model.generate(
            ids[number][None], max_new_tokens=30, do_sample=False, pad_token_id=0, **knobs
        )

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, outputs, strict=True))
    assert model.config._attn_implementation == "sdpa"


def test_models_that_share_a_config():
    """A call of the second model begins during one of the first, and ends after it."""
    first = fresh_model("qwen3")
    second = type(first)(first.config).eval()
    assert first.config is second.config
    one, other = jacobi_attention(first), jacobi_attention(second)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert first.config._attn_implementation == OURS[SDPA]
    other.__exit__(None, None, None)
    assert first.config._attn_implementation == "sdpa"


def test_a_model_without_groups():
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model, ids, seen = GPTNeoXForCausalLM(config).eval(), torch.tensor([[3, 4, 5]]), []
    model.gpt_neox.layers[0].register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    arguments = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    register(GPTNeoXForCausalLM)
    try:
        assert torch.equal(
            model.generate(ids, **arguments), model.generate(ids, **arguments, decoding="jacobi_multiblock")
        )
    finally:
        unregister(GPTNeoXForCausalLM)
    assert set(seen) == {SDPA, OURS[SDPA]}  # the ordinary call, and ours
