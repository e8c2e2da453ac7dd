from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from jacobi_hf import register, unregister
from jacobi_hf.attention import GROUPED, GROUPED_SLOTS, MaskBuilder, grouped_sdpa
from jacobi_hf.layout import attention_mask, build_layout
from tests.models import VOCAB, fresh_model, tiny_model

CPU = torch.device("cpu")


def dense(query, key, value, allowed, scaling):
    """Softmax attention, head by head, in words of the definition."""
    groups = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    for row in range(len(query)):
        for head in range(query.shape[1]):
            scores = query[row, head] @ key[row, head // groups].T * scaling
            weights = scores.masked_fill(~allowed[row, 0], float("-inf")).softmax(-1)
            output[row, head] = weights @ value[row, head // groups]
    return output.transpose(1, 2)


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple),
    cached=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 6), groups=st.integers(1, 4), heads=st.integers(1, 2), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_grouped_attention_is_dense_attention(lengths, cached, window, groups, heads, seed):
    """Ragged rows, trees, sliding windows."""
    torch.manual_seed(seed)
    layout, batch, width = build_layout(lengths, CPU), len(cached), 8
    extent = max(cached) + layout.slots + 3
    allowed = attention_mask(layout, torch.tensor(cached), torch.arange(extent), window)
    query = torch.randn(batch, heads * groups, layout.slots, width)
    key, value = torch.randn(batch, heads, extent, width), torch.randn(batch, heads, extent, width)
    config = fresh_model("qwen3").config
    config.num_attention_heads, config.num_key_value_heads, config._attn_implementation = heads * groups, heads, GROUPED
    mask = MaskBuilder(config, torch.float32)(lambda _: allowed, CPU)
    output, _ = grouped_sdpa(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(output, dense(query, key, value, allowed, 0.3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2-sliding"])
@pytest.mark.parametrize("columns", [5, GROUPED_SLOTS + 9])
def test_to_everybody_else_it_is_sdpa(kind, columns):
    """Ordinary forwards, padded, cached and long ones."""
    model, outputs = fresh_model(kind), []
    ids = torch.randint(1, VOCAB, (2, columns), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for implementation in ("sdpa", GROUPED):
        model.set_attn_implementation(implementation)
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache).logits
        outputs.append(torch.cat([first, model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits], 1)[mask.bool()])
    assert torch.equal(*outputs)


def test_a_call_switches_to_it_and_back():
    model, ids, seen = fresh_model("qwen3"), torch.tensor([[3, 4, 5]]), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, decoding="jacobi_multiblock")
    assert set(seen) == {GROUPED}
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
        outputs[number] = model.generate(ids[number][None], max_new_tokens=30, do_sample=False, pad_token_id=0, **knobs)

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, outputs, strict=True))
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_groups_keeps_its_sdpa():
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids, seen = GPTNeoXForCausalLM(config).eval(), torch.tensor([[3, 4, 5]]), []
    model.gpt_neox.layers[0].register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    arguments = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    register(GPTNeoXForCausalLM)
    try:
        assert torch.equal(model.generate(ids, **arguments), model.generate(ids, **arguments, decoding="jacobi_multiblock"))
    finally:
        unregister(GPTNeoXForCausalLM)
    assert set(seen) == {"sdpa"}
