from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from jacobi_hf.decoding.cache import JacobiStaticCache
from jacobi_hf.integration.compat import CACHE
from tests.helpers.models import VOCAB, tiny_model


def states(*shape):
    return torch.randn(*shape)


@given(counts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5))
def test_rows_hold_exactly_what_was_committed(counts):
    model = tiny_model("qwen3")
    cache = JacobiStaticCache(model.config, 2, 40, torch.device("cpu"))
    kept = [[], []]
    for count in counts:
        key_column_K = cache.columns(4, int(cache.lengths_B.max()))
        cache.open_step(4, key_column_K)
        keys = states(2, 2, 4, 8)
        for layer in range(len(cache.layers)):
            read, _ = cache.update(keys, keys + 1, layer)
            assert read.shape[2] == len(key_column_K)
        cache.commit(torch.tensor(count))
        for row in (0, 1):
            kept[row] += keys[row, :, : count[row]].unbind(1)
    for row in (0, 1):
        assert cache.lengths_B[row] == len(kept[row])
        if kept[row]:
            assert torch.equal(cache.layers[-1].keys[row, :, : len(kept[row])], torch.stack(kept[row], 1))


def test_a_branch_is_moved_to_the_front():
    cache = JacobiStaticCache(tiny_model("qwen3").config, 2, 32, torch.device("cpu"))
    cache.lengths_B += torch.tensor([3, 5])
    cache.open_step(6, cache.columns(6, 5))
    keys = states(2, 2, 6, 8)
    for layer in range(len(cache.layers)):
        cache.update(keys, keys, layer)
    path = torch.tensor([[0, 4, 5], [0, 1, 2]])
    cache.commit(torch.tensor([3, 2]), path)
    assert cache.lengths_B.tolist() == [6, 7]
    assert torch.equal(cache.layers[0].keys[0, :, 3:6], keys[0][:, [0, 4, 5]])
    assert torch.equal(cache.layers[0].keys[1, :, 5:7], keys[1][:, [0, 1]])


@given(pads=st.lists(st.integers(0, 6), min_size=1, max_size=4), capacity=st.integers(1, 9), data=st.data())
def test_rows_of_a_padded_cache_are_taken_over_as_far_as_they_fit(pads, capacity, data):
    model, past = tiny_model("qwen3"), 6
    source = DynamicCache()
    keys = states(len(pads), 2, past, 8)
    for layer in range(model.config.num_hidden_layers):
        source.update(keys, keys + 1, layer)
    rows = data.draw(st.lists(st.integers(0, len(pads) - 1), min_size=1, max_size=3))
    cache = JacobiStaticCache(model.config, len(rows), capacity, torch.device("cpu"))
    place_BL = torch.arange(past) - torch.tensor([pads[row] for row in rows])[:, None]
    cache.load(source, place_BL, torch.tensor(rows))
    for number, row in enumerate(rows):
        length = min(past - pads[row], capacity)
        assert cache.lengths_B[number] == length
        # The last place may hold what had no place of its own.
        seen = min(length, capacity - 1)
        assert torch.equal(cache.layers[-1].keys[number, :, :seen], keys[row, :, pads[row] : pads[row] + seen])
        assert torch.equal(cache.layers[0].values[number, :, :seen], keys[row, :, pads[row] : pads[row] + seen] + 1)


def test_a_step_that_does_not_fit_is_refused_before_it_is_written():
    cache = JacobiStaticCache(tiny_model("qwen3").config, 1, 8, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="does not fit"):
        cache.columns(9, 0)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-sliding", "qwen2-sliding"])
@pytest.mark.parametrize(
    "make",
    [lambda c: DynamicCache(config=c), lambda c: StaticCache(config=c, max_cache_len=64)],
    ids=["dynamic", "static"],
)
@pytest.mark.parametrize("turns", [(3, 4, 5), (9, 12, 3)])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_conversation_continues_in_the_callers_cache(kind, make, turns, sampled):
    """Turn after turn, text and cache are those of ordinary decoding in its own cache."""
    model = tiny_model(kind)
    ordinary, jacobi = make(model.config), make(model.config)
    text = other = torch.zeros(1, 0, dtype=torch.long)
    for turn, new in enumerate(turns):
        addition = torch.randint(1, VOCAB, (1, 4), generator=torch.Generator().manual_seed(turn))
        text, other = torch.cat([text, addition], 1), torch.cat([other, addition], 1)
        arguments = {
            "max_new_tokens": new,
            "do_sample": sampled,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(text),
        }
        torch.manual_seed(turn)
        text = model.generate(text, **{CACHE: ordinary}, **arguments)
        torch.manual_seed(turn)
        other = model.generate(
            other, **{CACHE: jacobi}, decoding="jacobi_multiblock", jacobi_block_size=4, **arguments
        )
        assert torch.equal(text, other)
        assert int(jacobi.get_seq_length()) == int(ordinary.get_seq_length()) == text.shape[1] - 1
        for a, b in zip(ordinary.layers, jacobi.layers, strict=True):
            assert torch.allclose(a.keys, b.keys, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-sliding"])
def test_a_padded_batch_continues_in_the_callers_cache(kind):
    model = tiny_model(kind)
    ids = torch.tensor([[0, 0, 5, 6], [9, 3, 4, 9], [0, 0, 0, 2]])
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    outputs = []
    for cache, knobs in zip(caches, ({}, {"decoding": "jacobi_multiblock", "jacobi_block_size": 4}), strict=True):
        arguments = {"do_sample": False, "pad_token_id": 0, CACHE: cache, **knobs}
        mask = (ids != 0).long()
        first = model.generate(ids, attention_mask=mask, max_new_tokens=7, **arguments)
        mask = torch.cat([mask, torch.ones(3, 7 + 2, dtype=torch.long)], 1)
        second = torch.cat([first, torch.tensor([[7, 8], [8, 7], [1, 1]])], 1)
        outputs.append(model.generate(second, attention_mask=mask, max_new_tokens=9, **arguments))
    assert torch.equal(*outputs)


def test_new_ids_alone_may_be_given_with_a_full_mask():
    model = tiny_model("qwen3")
    outputs = []
    for knobs in ({}, {"decoding": "jacobi_multiblock"}):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([[5, 6, 7, 8]]), **{CACHE: cache}, use_cache=True)
        outputs.append(
            model.generate(
                torch.tensor([[9, 3]]),
                attention_mask=torch.ones(1, 6, dtype=torch.long),
                **{CACHE: cache},
                max_new_tokens=9,
                do_sample=False,
                pad_token_id=0,
                **knobs,
            )
        )
    assert torch.equal(*outputs)


@pytest.mark.parametrize("decoding", ["jacobi", "jacobi_multiblock"])
def test_the_cache_afterwards_is_that_of_a_plain_prefill_of_the_output(any_model, decoding):
    ids = torch.randint(1, VOCAB, (3, 6), generator=torch.Generator().manual_seed(4))
    output = any_model.generate(
        ids, max_new_tokens=25, do_sample=False, pad_token_id=0, decoding=decoding, return_dict_in_generate=True
    )
    plain = DynamicCache(config=any_model.config)
    any_model(output.sequences[:, :-1], **{CACHE: plain}, use_cache=True)
    for a, b in zip(plain.layers, output[CACHE].layers, strict=True):
        assert a.keys.shape == b.keys.shape
        assert torch.allclose(a.keys, b.keys, atol=2e-4)
        assert torch.allclose(a.values, b.values, atol=2e-4)
