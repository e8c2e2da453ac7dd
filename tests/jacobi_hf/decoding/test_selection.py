from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from jacobi_hf.decoding.choice import best, choose
from jacobi_hf.decoding.layout import build_layout
from jacobi_hf.decoding.noise import SamplingNoise
from jacobi_hf.decoding.selection import Selector, accepted_prefixes

CPU = torch.device("cpu")


@given(
    batch=st.integers(1, 4), vocab=st.sampled_from([2, 17, 1000]), tokens=st.integers(1, 5), seed=st.integers(0, 10**6)
)
def test_fixed_noise_is_multinomial(batch, vocab, tokens, seed):
    """The choice under a token's noise is what multinomial samples, however far ahead the noise was drawn."""
    torch.manual_seed(seed)
    scores = torch.randn(tokens, batch, vocab)
    before = torch.get_rng_state()
    sampled = [torch.multinomial(step.softmax(-1), 1)[:, 0] for step in scores]
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    noise = SamplingNoise(CPU)
    noise.draw(0, tokens + 3, (batch, vocab))
    chosen = choose(scores.transpose(0, 1), torch.arange(tokens).expand(batch, -1), noise)
    assert torch.equal(chosen.token_BQ, torch.stack(sampled, 1))
    noise.rewind(tokens)
    assert torch.equal(torch.get_rng_state(), after)


@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=8),
    seed=st.integers(0, 10**6),
    rewound=st.integers(0, 3),
)
def test_an_index_keeps_its_noise_however_far_rows_are_apart(steps, seed, rewound):
    """The ring holds the same noise as a table of all of it, and `rewind` leaves the generator in the same state."""
    torch.manual_seed(seed)
    states, table = [torch.get_rng_state()], []
    for _ in range(sum(moved for moved, _ in steps) + 12):
        table.append(torch.empty(2, 5).exponential_())
        states.append(torch.get_rng_state())
    torch.manual_seed(seed)
    noise, first = SamplingNoise(CPU), 0
    for moved, beyond in steps:
        first += moved
        noise.draw(first, first + beyond, (2, 5))
        for index in range(first, first + beyond + 1):
            assert torch.equal(noise.at(torch.tensor([index, index]), torch.arange(2)), table[index])
    noise.rewind(first + min(rewound, beyond))
    assert torch.equal(torch.get_rng_state(), states[first + min(rewound, beyond)])


def test_the_ring_is_not_rebuilt_while_it_has_room():
    noise = SamplingNoise(CPU)
    noise.draw(0, 7, (1, 3))
    address = noise.ring_IBV.data_ptr()
    for first in range(1, 40):
        noise.draw(first, first + 7, (1, 3))
    assert noise.ring_IBV.data_ptr() == address
    assert len(noise.ring_IBV) == 8


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    vocab=st.sampled_from([1, 2, 33, 1000, 16384, 16385]),
    kinds=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    odd=st.sampled_from([0.0, float("nan"), float("inf"), float("-inf")]),
)
def test_the_best_of_equals_is_the_first_as_in_ordinary_decoding(dtype, vocab, kinds, seed, odd):
    torch.manual_seed(seed)
    scores = torch.randint(0, kinds, (3, 2, vocab)).to(dtype)
    scores[0, :, vocab // 2 :] = odd
    assert torch.equal(best(scores), scores.argmax(-1))


@given(data=st.data(), penalty=st.sampled_from([0.7, 1.3]), ignore=st.sampled_from([None, 2, "per row"]))
def test_scores_of_every_slot_are_those_of_its_true_prefix(data, penalty, ignore):
    """Vectorised repetition penalty and warpers give what the processors themselves give, slot by slot."""
    lengths = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    batch, vocab, layout = 2, data.draw(st.sampled_from([7, 16])), build_layout(lengths, CPU)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    prompt = torch.randint(0, vocab, (batch, 4), generator=generator)
    tokens = torch.randint(0, vocab, (batch, layout.slots), generator=generator)
    logits = torch.randn(batch, layout.slots, vocab, generator=generator)
    ignored = torch.tensor([1, 3]) if ignore == "per row" else ignore
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty, ignored), TemperatureLogitsWarper(0.6), TopPLogitsWarper(0.8)]
    )
    selector = Selector(processors, None, prompt)
    assert selector.is_vectorised
    selector.choose(logits[:, :1], build_layout((0,), CPU), tokens[:, :1], None)  # the prefill
    selector.commit(tokens[:, :1], torch.ones(batch, dtype=torch.long))  # the pending token
    scores = selector.scores(layout, tokens, logits.flatten(0, 1), slice(None)).view_as(logits)
    for segment, length in enumerate(lengths):
        for depth in range(length + 1):
            path = layout.path_SD[segment, : depth + 1]
            prefix = torch.cat([prompt, tokens[:, path]], 1)
            assert torch.equal(scores[:, path[-1]], processors(prefix, logits[:, path[-1]].clone()))


@given(
    temperature=st.floats(0.05, 5),
    top_p=st.floats(0.01, 0.999),
    min_p=st.floats(0.0, 1.0),
    penalty=st.floats(0.3, 3),
    mass=st.floats(0.01, 0.99),
    epsilon=st.floats(1e-6, 0.5),
    seed=st.integers(0, 10**6),
)
def test_held_values_do_to_scores_exactly_what_numbers_do(temperature, top_p, min_p, penalty, mass, epsilon, seed):
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty),
            TemperatureLogitsWarper(temperature),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
            TypicalLogitsWarper(mass),
            EpsilonLogitsWarper(epsilon),
            EtaLogitsWarper(epsilon),
        ]
    )
    held, layout, generator = {}, build_layout((3,), CPU), torch.Generator().manual_seed(seed)

    def hold(name, value):
        return held.setdefault(name, value.clone())

    for _ in range(2):  # one by one, since a later one sees little of the scores that an earlier one leaves
        for some in ([processor] for processor in processors):
            logits, tokens = (
                torch.randn(2, 4, 50, generator=generator) * 4,
                torch.randint(0, 50, (2, 4), generator=generator),
            )
            held.clear()
            numbers, tensors = (Selector(LogitsProcessorList(some), None, tokens, h) for h in (None, hold))
            arguments = layout, tokens, logits.flatten(0, 1), slice(None)
            assert torch.equal(numbers.scores(*arguments), tensors.scores(*arguments))
            assert tensors.key == numbers.key
            assert held


def test_values_are_no_other_kind_of_step_but_what_shapes_depend_on_is():
    def kind(*processors):
        return Selector(LogitsProcessorList(processors), None, torch.zeros(1, 1, dtype=torch.long)).key

    assert kind(TemperatureLogitsWarper(0.5)) == kind(TemperatureLogitsWarper(0.7))
    assert kind(TopKLogitsWarper(5)) != kind(TopKLogitsWarper(6))
    assert kind(TopPLogitsWarper(0.5)) != kind(TopPLogitsWarper(0.5, filter_value=-1e9))
    assert kind(TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.5)) != kind(
        TopPLogitsWarper(0.5), TemperatureLogitsWarper(0.5)
    )
    assert kind(RepetitionPenaltyLogitsProcessor(1.1, torch.tensor([1]))) == kind(
        RepetitionPenaltyLogitsProcessor(1.3, torch.tensor([0]))
    )


def test_an_unknown_processor_is_not_vectorised():
    class Mine(TemperatureLogitsWarper):
        pass

    assert not Selector(LogitsProcessorList([Mine(0.5)]), None, torch.zeros(1, 1, dtype=torch.long)).is_vectorised


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 10**6),
)
def test_confirmed_prefixes_are_as_defined(lengths, seed):
    layout, generator = build_layout(lengths, CPU), torch.Generator().manual_seed(seed)
    tokens, choices = (torch.randint(0, 2, (2, layout.slots), generator=generator) for _ in range(2))
    valid = torch.stack([torch.randint(0, length + 1, (2,), generator=generator) for length in lengths], 1)
    _, accepted = accepted_prefixes(layout, tokens, choices, valid)
    for row in range(2):
        for segment in range(len(lengths)):
            path, run = layout.path_SD[segment].tolist(), 0
            while run < valid[row, segment] and tokens[row, path[run + 1]] == choices[row, path[run]]:
                run += 1
            assert accepted[row, segment] == run


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fixed_noise_is_multinomial_on_cuda():
    device = torch.device("cuda")
    for seed in range(20):
        torch.manual_seed(seed)
        probabilities = torch.randn(3, 1000, device=device).softmax(-1)
        state = torch.cuda.get_rng_state()
        sampled = torch.multinomial(probabilities, 1)[:, 0]
        after = torch.cuda.get_rng_state()
        torch.cuda.set_rng_state(state)
        noise = SamplingNoise(device)
        noise.draw(0, 0, (3, 1000))
        assert torch.equal((probabilities / noise.of(0)).argmax(-1), sampled)
        assert torch.equal(torch.cuda.get_rng_state(), after)
