from __future__ import annotations

import copy
import pickle
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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    padding_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jacobi_hf import register, unregister
from jacobi_hf.attention import dispatch
from jacobi_hf.attention import interface as attention
from jacobi_hf.attention import kernels as jacobi_kernels
from jacobi_hf.attention.dispatch import FLASH, FLEX, SDPA, AttentionProbe, is_of_step, window_of
from jacobi_hf.attention.interface import GROUPED_SLOTS, StepMasks, usable_kernels
from jacobi_hf.attention.masks import attention_mask
from jacobi_hf.decoding.layout import build_layout, chain_layout
from jacobi_hf.integration.compat import CACHE
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

        monkeypatch.setattr(dispatch, name, call)

    package = ModuleType("flash_attn")
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("jacobi_hf.attention.kernels._compiled_flex_attention", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(attention, "usable_kernels", lambda own, *_: {own})
    for name in ("flex", "flash", "grouped_sdpa"):
        counted(name, getattr(dispatch, name))
    return counts


def masks_of(own, query, key, window):
    """Return the masks of a model at whose attention these states arrive, and which asks for this window."""
    config = fresh_model("qwen3").config
    config._attn_implementation = own
    masks = StepMasks(SimpleNamespace(config=config, dtype=torch.float32), CPU)
    probe = AttentionProbe(lambda window: torch.zeros(1, 1, 1, 1))
    mask = probe.ask(causal_mask_function if window is None else sliding_window_causal_mask_function(window), window)
    probe.arrive(own, None, query, key, key, mask, {})
    assert masks.learn(probe) is None
    return masks


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
    mask = masks_of(own, query, key, window).of_step(layout, lengths_B, torch.arange(extent))
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    kernels.clear()
    output, _ = ALL_ATTENTION_FUNCTIONS[own](
        module, query, key, value, mask, dropout=0.0, scaling=0.3, sliding_window=window
    )
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
    mask = masks_of(SDPA, query, key, window).of_step(layout, zero_B, torch.arange(16))
    assert (mask.numel() == 0) == (window is None or window >= length)
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    output, _ = ALL_ATTENTION_FUNCTIONS[SDPA](module, query, key, value, mask, dropout=0.0, scaling=0.3)
    allowed = attention_mask(layout, zero_B, torch.arange(16), window)
    torch.testing.assert_close(output, dense(query, key, value, allowed, 0.3), atol=1e-5, rtol=1e-5)


WINDOW = {"jacobi_schedule": "constant", "jacobi_block_size": 4, "jacobi_lookup_tokens": 0, "jacobi_pool_size": 0}
TREE = {**WINDOW, "jacobi_lookup_tokens": 4, "jacobi_pool_size": 2, "jacobi_branch_length": 3}


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
    monkeypatch.setattr(dispatch, "flex", jacobi_kernels.flex)  # not counted, as counting is no tensor operation
    monkeypatch.setattr(dispatch, "grouped_sdpa", lambda *_: pytest.fail("sdpa ran"))
    knobs = {**WINDOW, "jacobi_max_blocks": 0, "jacobi_lookup_tokens": 3}
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


@pytest.mark.parametrize("own", [SDPA, FLEX, FLASH])
def test_masks_that_are_not_of_a_step_go_to_transformers_function(own):
    states = torch.zeros(1, 4, 3, 8)
    ordinary = [None, torch.ones(1, 3)]
    if own == SDPA:
        ordinary += [torch.ones(1, 1, 3, 3, dtype=torch.bool), torch.zeros(1, 4, 3, 3), torch.zeros(1, 1, 1, 3)]
    if own == FLEX:
        ordinary += [torch.zeros(1, 1, 3, 3)]
    assert not any(is_of_step(own, states, states[:, :2], mask) for mask in ordinary)
    of_step = [torch.empty(1, 1, 0, 0), torch.zeros(1, 1, 6, 3), torch.ones(1, 1, 1, 1, dtype=torch.int32)]
    assert all(is_of_step(own, states, states[:, :2], mask) for mask in of_step)


def test_transformers_functions_keep_their_names():
    for own in (SDPA, FLEX, FLASH):
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            function = registry[own]
            assert function.__module__.startswith("transformers.")
            assert pickle.loads(pickle.dumps(function)) is function.__wrapped__
            assert copy.deepcopy(function) is function


@pytest.mark.parametrize("local", [False, True])
def test_a_library_registers_its_own_sdpa_after_the_import(local, monkeypatch):
    """Both before the first call of a model and between two calls."""
    calls = []

    def of_a_library(*args, **kwargs):
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", dict(ALL_ATTENTION_FUNCTIONS._local_mapping))
    before = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    warm = fresh_model("qwen3")
    prompt = {"input_ids": torch.tensor([[3, 4, 5]]), "do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}
    reference = warm.generate(**prompt)
    assert torch.equal(warm.generate(**prompt, decoding="jacobi_multiblock"), reference)
    try:
        if local:
            ALL_ATTENTION_FUNCTIONS[SDPA] = of_a_library
        else:
            type(ALL_ATTENTION_FUNCTIONS).register(SDPA, of_a_library)
        for model in (warm, fresh_model("qwen3")):
            calls.clear()
            output = model.generate(**prompt, decoding="jacobi_multiblock", **TREE, return_dict_in_generate=True)
            assert torch.equal(output.sequences, reference)
            assert output.jacobi_stats.forwards < 12
            assert calls
    finally:
        type(ALL_ATTENTION_FUNCTIONS)._global_mapping.update(before)
        monkeypatch.undo()
        dispatch._functions[SDPA] = before[SDPA].__wrapped__


@pytest.mark.parametrize("kind", ["qwen3", "qwen2-sliding"])
@pytest.mark.parametrize("columns", [5, GROUPED_SLOTS + 9])
def test_ordinary_forwards_are_those_of_transformers(kind, columns, monkeypatch):
    """Ordinary forwards, padded, cached and long ones."""
    model, outputs = fresh_model(kind), []
    ids = torch.randint(1, VOCAB, (2, columns), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :-1], attention_mask=mask[:, :-1], **{CACHE: cache}).logits
        outputs.append(
            torch.cat([first, model(ids[:, -1:], attention_mask=mask, **{CACHE: cache}).logits], 1)[mask.bool()]
        )
        monkeypatch.setitem(registry, SDPA, registry[SDPA].__wrapped__)
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("function", "size", "window"),
    [
        (causal_mask_function, None, None),
        (and_masks(causal_mask_function), None, None),
        (sliding_window_causal_mask_function(1), 1, 1),
        (sliding_window_causal_mask_function(7), 7, 7),
        (sliding_window_causal_mask_function(4096), 4096, 4096),
    ],
)
def test_the_window_of_a_mask_function(function, size, window):
    assert window_of(function, size) == window


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (bidirectional_mask_function, None),
        (chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), 4),
        (sliding_window_causal_mask_function(7), None),
        (sliding_window_causal_mask_function(7), 8),
        (and_masks(causal_mask_function, padding_mask_function(torch.ones(1, 2, dtype=torch.bool))), None),
        (lambda *_: None, None),
    ],
)
def test_masks_of_another_kind_have_no_window(function, size):
    with pytest.raises(ValueError, match="neither causal nor a sliding window"):
        window_of(function, size)


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
    model, ids = GPTNeoXForCausalLM(config).eval(), torch.tensor([[3, 4, 5]])
    arguments = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    register(GPTNeoXForCausalLM)
    try:
        assert torch.equal(
            model.generate(ids, **arguments), model.generate(ids, **arguments, decoding="jacobi_multiblock")
        )
    finally:
        unregister(GPTNeoXForCausalLM)
