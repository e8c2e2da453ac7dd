"""Memory by what is written, not by what may be written.

Scenario: model cards recommend `max_new_tokens=32768`, and most answers are short. Ordinary `generate` then needs
memory for the text that there is. A call with Jacobi decoding needed it for the text that there might be.
"""

from __future__ import annotations

from contextlib import contextmanager

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from transformers import Cache, CompileConfig, DynamicCache, StoppingCriteria, StoppingCriteriaList

import jacobi_hf
from jacobi_hf.decoding.cache import JacobiStaticCache
from jacobi_hf.decoding.loop import Decoder
from jacobi_hf.drafts.lookup import NgramLookup
from jacobi_hf.execution import buffers, cuda_graphs
from jacobi_hf.execution.kept import kept_for
from jacobi_hf.integration.compat import CACHE
from tests.helpers.calls import BOTH, CALLS, SETTINGS, generate, prompt
from tests.helpers.cases import Case, cases, differences
from tests.helpers.models import VOCAB, fresh_model, tiny_model
from tests.helpers.properties import at_most
from tests.helpers.schedules import let_the_host_lag
from tests.helpers.tapes import TapeGraphs

LONG = 32768
CHUNK = 64  # columns that a buffer has at least
# Sizes that do not depend on the text: the vocabulary, the places of the n-gram pool, a generator's state.
FIXED = (VOCAB, 1025, len(torch.get_rng_state()))
GRAPHS = CompileConfig(backend="cudagraphs")
PLAIN = CompileConfig(backend="eager", mode=None)


class Ends(StoppingCriteria):
    """Ends each row after so many new tokens of its own."""

    def __init__(self, columns, tokens):
        self.ends = columns + torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


def owned_tensors(thing, seen):
    """Return every tensor that an object of a call holds, at any depth."""
    if id(thing) in seen or isinstance(thing, torch.nn.Module):
        return []
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        return [thing]
    module = type(thing).__module__
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        parts = list(thing)
    elif isinstance(thing, Cache) or module.startswith(("jacobi_hf", "transformers.cache_utils")):
        parts = list(getattr(thing, "__dict__", {}).values())
    else:
        parts = []
    return [tensor for part in parts for tensor in owned_tensors(part, seen)]


@contextmanager
def watching():
    """Give a list to which each step adds the columns in use, and the longest dimension of a tensor of the call."""
    found = []
    decode = Decoder._decode

    def watch(decoder):
        state = decoder._state
        used = int(state.cache.lengths_B.max()) + state.sources.slots()
        decode(decoder)
        own = owned_tensors([state, decoder._stopping, decoder._one_by_one], {})
        for expected in (state.cache.layers[-1].keys, state.text_BL, decoder._stopping.ids_BL):
            assert any(tensor is expected for tensor in own)
        used = max([used, *(before for before, _ in found)])
        found.append((used, max(size for tensor in own for size in tensor.shape if size not in FIXED)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_decode", watch)
        yield found


@hypothesis.given(
    kind=st.sampled_from(["qwen3", "qwen2-sliding"]),
    setting=st.sampled_from(sorted(SETTINGS)),
    call=st.sampled_from(["greedy", "sampled"]),
    columns=st.integers(1, 90),
    tokens=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    sees_each_token=st.booleans(),
)
@at_most(25)
def test_a_call_owns_at_most_twice_what_its_text_needs(kind, setting, call, columns, tokens, sees_each_token):
    """32768 tokens are allowed and far fewer are written: after no step has a tensor twice the columns in use."""
    ids = prompt(len(tokens), columns, alphabet=VOCAB)
    arguments = {**SETTINGS[setting], **CALLS[call]}
    if sees_each_token:  # with an end token that cannot be chosen, so that finished rows are padded
        arguments |= {"eos_token_id": VOCAB - 1, "suppress_tokens": [VOCAB - 1]}
    with watching() as found:
        output = generate(
            tiny_model(kind),
            ids,
            **arguments,
            max_new_tokens=LONG,
            stopping_criteria=StoppingCriteriaList([Ends(columns, tokens)]),
        )
    assert output.sequences.shape[1] == columns + max(tokens)
    assert bool(found) == (max(tokens) > 1)
    for used, longest in found:
        assert longest <= max(2 * used, 1.25 * (used + 1) + CHUNK + 1)


@pytest.mark.parametrize("tokens", [4, LONG])
def test_a_long_prompt_is_not_stored_twice_over(tokens):
    """A call with a long prompt begins with room for the prompt and a quarter, or for all tokens if these are few."""
    arguments = {**SETTINGS["window"], "do_sample": False, "max_new_tokens": tokens}
    ends = StoppingCriteriaList([Ends(250, [20])])
    with watching() as found:
        generate(tiny_model("qwen3"), prompt(1, 250), **arguments, stopping_criteria=ends)
    slots = 9
    assert found
    assert max(longest for _, longest in found) <= min(250 + tokens, 1.25 * (250 + 20)) + slots + CHUNK + 1


@contextmanager
def tiny_buffers(smallest=16):
    """Give a list of the capacities that buffers get, while they grow at almost every step."""
    grown = []
    grow = JacobiStaticCache.grow

    def note(cache, capacity):
        grown.append(capacity)
        grow(cache, capacity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JacobiStaticCache, "EXTENT_MULTIPLE", 1)
        patch.setattr(JacobiStaticCache, "grow", note)
        patch.setattr(buffers, "with_reserve", lambda columns, most: columns)
        patch.setattr(buffers, "SMALLEST", smallest)
        yield grown


@hypothesis.given(case=cases(), lags=st.booleans())
@at_most(60)
def test_growth_changes_nothing_that_a_caller_sees(case: Case, lags: bool) -> None:
    """Tokens, scores, logits, cache and generator are those of ordinary decoding, however often buffers grow."""
    with tiny_buffers(), pytest.MonkeyPatch.context() as patch:
        let_the_host_lag(patch, lags=lags)
        assert differences(case) == []


def test_buffers_grow_in_this_test():
    """The property above would be empty if its calls never grew."""
    with tiny_buffers() as grown:
        generate(tiny_model("qwen3"), prompt(2, 5), do_sample=False, **BOTH, max_new_tokens=40)
    assert len(grown) > 3
    assert grown == sorted(set(grown))


def test_a_callers_cache_is_continued_across_growth():
    """Turn after turn in the caller's own cache; each turn begins with room for what the cache holds."""
    model = tiny_model("qwen2-sliding")
    texts = [prompt(1, 4, alphabet=VOCAB)] * 2
    caches = [DynamicCache(config=model.config) for _ in texts]
    for turn in range(4):
        for number, knobs in enumerate(({}, BOTH | {"decoding": "jacobi_multiblock"})):
            with tiny_buffers() as grown:
                arguments = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, CACHE: caches[number]}
                text = model.generate(
                    texts[number], attention_mask=torch.ones_like(texts[number]), **arguments, **knobs
                )
            texts[number] = torch.cat([text, prompt(1, 3, seed=turn, alphabet=VOCAB)], 1)
        assert grown
        assert torch.equal(*texts)
        for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)


@pytest.fixture
def _tapes(monkeypatch):
    monkeypatch.setitem(cuda_graphs.GRAPHS, "cpu", TapeGraphs)
    yield
    for kind in ("qwen3", "qwen2-sliding"):
        jacobi_hf.clear_graphs(tiny_model(kind))


@pytest.mark.usefixtures("_tapes")
@pytest.mark.parametrize(
    ("kind", "setting", "call", "lags"),
    [
        ("qwen3", "both", "greedy", False),
        ("qwen2-sliding", "window", "sampled", True),
        ("qwen3", "late blocks", "ends", False),
    ],
)
def test_recorded_steps_are_those_of_the_buffers_as_they_are(kind, setting, call, lags, monkeypatch):
    """A graph over buffers that have since grown would write where nobody reads. Short and long calls take turns."""
    model = tiny_model(kind)
    let_the_host_lag(monkeypatch, lags=lags)
    before = TapeGraphs.replayed
    with tiny_buffers() as grown:
        for number, tokens in enumerate((6, 60, 9, 60, 60, 60)):
            ids = prompt(2, 9 if tokens == 60 else 3 + number, seed=tokens)
            arguments = {**SETTINGS[setting], **CALLS[call], "max_new_tokens": tokens}
            plain = generate(model, ids, **arguments)
            grown.clear()
            recorded = generate(model, ids, **arguments, compile_config=GRAPHS)
            assert torch.equal(plain.sequences, recorded.sequences)
            assert all(capacity & (capacity - 1) == 0 for capacity in grown)
            assert len(kept_for(model).buffers) == 1
    assert TapeGraphs.replayed > before
    if call != "ends":  # these texts are too short for more than one size
        assert not grown
        assert recorded.jacobi_stats.cuda_graphs == 0


@pytest.mark.usefixtures("_tapes")
def test_buffers_between_calls_are_as_large_as_the_longest_text():
    """32768 tokens were allowed in every call; the buffers that stay have room for the text that there was."""
    model = fresh_model("qwen3")
    for tokens in (20, 300, 20):
        arguments = {**SETTINGS["window"], "do_sample": False, "compile_config": GRAPHS, "max_new_tokens": LONG}
        ends = StoppingCriteriaList([Ends(8, [tokens])])
        generate(model, prompt(1, 8), **arguments, stopping_criteria=ends)
        [(_, kept)] = kept_for(model).buffers
        assert kept.cache.capacity == 512
        assert max(size for tensor in owned_tensors(kept.state, {}) for size in tensor.shape) <= 640


@pytest.mark.usefixtures("_tapes")
def test_a_long_call_costs_later_short_ones_nothing():
    """Steps read the columns of their own text, in texts as in caches, however large the kept buffers are."""
    model = fresh_model("qwen3")
    read = []
    arguments = {**BOTH, "do_sample": False, "compile_config": GRAPHS}
    with tiny_buffers(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(NgramLookup, "ON_HOST", ())
        generate(model, prompt(1, 8), **arguments, max_new_tokens=200)
        propose = NgramLookup.propose

        def note(source, context):
            read.append(context.text_BL.shape[1])
            return propose(source, context)

        patch.setattr(NgramLookup, "propose", note)
        generate(model, prompt(1, 8), **arguments, max_new_tokens=4)
    assert read
    assert max(read) <= 64


@pytest.mark.slow
def test_growth_compiles_nothing():
    """Each shape of a step is compiled once, whatever the buffers have grown to."""
    model = fresh_model("qwen3", layers=1)
    arguments = {"do_sample": False, "compile_config": PLAIN, **SETTINGS["both"]}
    kinds = 0
    counters.clear()
    with tiny_buffers() as grown:
        for call, tokens in enumerate((12, 40, 150, 9, 230)):
            ids = prompt(1, 3 + 7 * call % 20, seed=call, alphabet=VOCAB)
            plain = generate(model, ids, **arguments | {"compile_config": None}, max_new_tokens=tokens)
            output = generate(model, ids, **arguments, max_new_tokens=tokens)
            assert torch.equal(output.sequences, plain.sequences)
            kinds += output.jacobi_stats.compiled_steps
    assert len(grown) > 3
    assert counters["stats"]["unique_graphs"] == kinds
