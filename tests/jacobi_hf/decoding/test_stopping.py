"""Criteria, processors and streamers see what they see in ordinary decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import BaseStreamer

from jacobi_hf.integration.compat import CACHE
from tests.helpers.models import TINY, VOCAB, tiny_model
from tests.helpers.properties import at_most


class Recorder(BaseStreamer):
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append((tuple(value.shape), value.tolist()))

    def end(self):
        self.calls.append("end")


class Stateful(StoppingCriteria):
    """A criterion that records its calls, and stops a row after any of the tokens `stops`."""

    def __init__(self, stops, at_once_after=None):
        self.stops, self.at_once_after, self.calls, self.scores = stops, at_once_after, [], []
        self.done = None

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids.tolist(), None if scores is None else len(scores)))
        self.scores += [] if scores is None else [scores[-1].clone()]
        if self.done is None:
            self.done = [False] * len(input_ids)
        self.done = [was or row[-1] in self.stops for was, row in zip(self.done, input_ids.tolist(), strict=True)]
        if self.at_once_after is not None and len(self.calls) >= self.at_once_after:
            self.done = [True] * len(input_ids)
        return torch.tensor(self.done)


class Counting(LogitsProcessor):
    """A processor with a memory: it lowers the score of an id that depends on the number of its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.tolist())
        scores = scores.clone()
        scores[:, len(self.calls) % VOCAB] -= 5.0
        return scores


@given(
    kind=st.sampled_from(TINY),
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    new=st.integers(1, 25),
    end=st.none() | st.integers(1, VOCAB - 1),
    stops=st.lists(st.integers(1, VOCAB - 1), max_size=3),
    at_once=st.none() | st.integers(1, 20),
    streams=st.booleans(),
    processes=st.booleans(),
    samples=st.booleans(),
    scores=st.booleans(),
    penalty=st.sampled_from([None, 1.3]),
    block=st.sampled_from([2, 5, 16]),
)
@example(  # the second row has a token after the one that its criterion stops at
    kind="qwen3",
    seed=1,
    batch=2,
    new=6,
    end=1,
    stops=[8],
    at_once=None,
    streams=False,
    processes=False,
    samples=True,
    scores=True,
    penalty=None,
    block=2,
)
def test_call_sequences_are_those_of_sample(
    kind, seed, batch, new, end, stops, at_once, streams, processes, penalty, samples, scores, block
):
    model = tiny_model(kind)
    ids = torch.randint(1, VOCAB, (batch, 5), generator=torch.Generator().manual_seed(seed))
    runs = []
    for knobs in ({}, {"decoding": "jacobi_multiblock", "jacobi_block_size": block}):
        streamer, criterion, processor = Recorder() if streams else None, Stateful(stops, at_once), Counting()
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            max_new_tokens=new,
            do_sample=samples,
            top_k=0,
            pad_token_id=0,
            eos_token_id=end,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([criterion]),
            output_scores=scores,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([processor] if processes else []),
            repetition_penalty=penalty,
            **knobs,
        )
        runs.append(
            (
                output,
                criterion.calls,
                processor.calls,
                streamer and streamer.calls,
                torch.get_rng_state(),
                criterion.scores,
            )
        )
    (a, *first), (b, *second) = runs
    assert a.sequences.tolist() == b.sequences.tolist()
    assert first[:3] == second[:3]
    assert torch.equal(first[3], second[3])
    assert all(torch.allclose(x, y, atol=2e-4) for x, y in zip(first[4], second[4], strict=True))
    if scores:
        assert len(a.scores) == len(b.scores)
        assert all(torch.allclose(x, y, atol=2e-4) for x, y in zip(a.scores, b.scores, strict=True))
    for x, y in zip(a[CACHE].layers, b[CACHE].layers, strict=True):
        assert torch.allclose(x.keys, y.keys, atol=2e-4)


class Noisy(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + torch.randn_like(scores)


@pytest.mark.parametrize("samples", [False, True])
def test_a_processor_that_draws_from_the_same_generator(any_model, prompt, samples):
    runs = []
    for knobs in ({}, {"decoding": "jacobi_multiblock", "jacobi_block_size": 4}):
        torch.manual_seed(1)
        arguments = {
            **prompt,
            "do_sample": samples,
            "max_new_tokens": 15,
            "logits_processor": LogitsProcessorList([Noisy()]),
        }
        runs.append((any_model.generate(**arguments, **knobs), torch.get_rng_state()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("end", [None, 13, 20])
def test_statistics_do_not_depend_on_who_watches(model, end):
    ids = torch.tensor([[20, 13, 20, 13, 20, 13, 20, 13], [0, 0, 0, 9, 3, 4, 16, 2]])
    arguments = {
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": 60,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": end,
    }
    arguments |= {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant", "jacobi_block_size": 4}
    arguments["return_dict_in_generate"] = True
    plain = model.generate(ids, **arguments).jacobi_stats
    watched = model.generate(ids, **arguments, streamer=None, max_time=1000.0).jacobi_stats
    assert len(set(plain.row_forwards)) == 2  # one row ends before the other, and stands still
    for name in ("forwards", "new_tokens", "row_forwards", "accepted_lengths", "accepted_from", "drafted"):
        assert getattr(plain, name) == getattr(watched, name)


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    new=st.integers(1, 25),
    end=st.none() | st.integers(1, VOCAB - 1),
    stops=st.lists(st.integers(1, VOCAB - 1), max_size=3),
    processes=st.booleans(),
)
@example(
    seed=491, batch=3, new=5, end=None, stops=[20], processes=False
)  # a row stops within what an earlier step accepted
@at_most(60)
def test_statistics_add_up(seed, batch, new, end, stops, processes):
    ids = torch.randint(1, VOCAB, (batch, 5), generator=torch.Generator().manual_seed(seed))
    stats = (
        tiny_model("qwen3")
        .generate(
            ids,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=end,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([Stateful(stops)] if stops else []),
            logits_processor=LogitsProcessorList([Counting()] if processes else []),
            decoding="jacobi_multiblock",
            jacobi_block_size=4,
        )
        .jacobi_stats
    )
    assert sum(length * count for length, count in stats.accepted_lengths.items()) + batch == sum(stats.new_tokens)
    assert stats.accepted_lengths.total() + batch == sum(stats.row_forwards)
    assert max(stats.row_forwards) <= stats.forwards


@pytest.mark.parametrize("breaks_at", [1, 2, 7])
@pytest.mark.parametrize("where", ["streamer", "criterion", "processor"])
def test_an_exception_of_the_callers_leaves_nothing_behind(where, breaks_at):
    model, ids = tiny_model("qwen3"), torch.tensor([[5, 6, 7]])
    before = model.generation_config.to_dict()

    class Broken(RuntimeError):
        pass

    def counting():
        calls = [0]

        def tick(*_, **__):
            calls[0] += 1
            if calls[0] == breaks_at:
                raise Broken

        return tick

    tick = counting()

    class Streamer(Recorder):
        def put(self, value):
            tick()

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            tick()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    class Processor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            tick()
            return scores

    arguments = {
        "streamer": {"streamer": Streamer()},
        "criterion": {"stopping_criteria": StoppingCriteriaList([Criterion()])},
        "processor": {"logits_processor": LogitsProcessorList([Processor()])},
    }[where]
    common = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "decoding": "jacobi_multiblock"}
    with pytest.raises(Broken):
        model.generate(ids, **common, **arguments)
    assert model.generation_config.to_dict() == before
    assert torch.equal(model.generate(ids, **common), model.generate(ids, **{**common, "decoding": None}))


def test_max_time_stops(model):
    output = model.generate(
        torch.tensor([[5, 6]]),
        max_new_tokens=200,
        max_time=0.0,
        do_sample=False,
        pad_token_id=0,
        decoding="jacobi_multiblock",
    )
    assert output.shape[1] == 3


@pytest.fixture(scope="module")
def tokenizer():
    from tests.helpers.tiny import CHECKPOINT

    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_stop_strings(tokenizer):
    model = tiny_model("qwen3")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    plain = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)
    stop = tokenizer.decode(plain[0, 9:11])
    arguments = {
        "max_new_tokens": 30,
        "do_sample": False,
        "pad_token_id": 0,
        "stop_strings": [stop],
        "tokenizer": tokenizer,
    }
    assert torch.equal(
        model.generate(ids, **arguments), model.generate(ids, **arguments, decoding="jacobi_multiblock")
    )


def test_text_iterator_streamer(tokenizer):
    from threading import Thread

    model, texts = tiny_model("qwen3"), []
    for knobs in ({}, {"decoding": "jacobi_multiblock"}):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        arguments = {
            "inputs": torch.tensor([[5, 6, 7]]),
            "max_new_tokens": 20,
            "do_sample": False,
            "pad_token_id": 0,
            "streamer": streamer,
            **knobs,
        }
        thread = Thread(target=model.generate, kwargs=arguments)
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1]
    assert texts[0]
