"""A step streamer receives, for each forward, what was verified and what was committed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import jacobi_hf
from tests.helpers.drafters import drafting, random_drafter
from tests.helpers.models import VOCAB, tiny_model
from tests.helpers.properties import at_most


class Recorder(jacobi_hf.StepStreamer):
    def __init__(self):
        self.steps, self.ended = [], 0

    def step(self, step):
        self.steps.append(step)

    def end(self):
        self.ended += 1

    @property
    def tokens(self):
        return [token for step in self.steps for token in step.token_ids]


class StopAt(StoppingCriteria):
    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([row[-1] in self.tokens for row in input_ids.tolist()])


class Nudge(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores - torch.nn.functional.one_hot(input_ids[:, -1], scores.shape[-1])


def generated(model, seed, new=25, **arguments):
    ids = torch.randint(1, VOCAB, (1, 6), generator=torch.Generator().manual_seed(seed))
    recorder = Recorder()
    options = {
        "max_new_tokens": new,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "streamer": recorder,
    }
    output = model.generate(ids, **options | arguments)
    return output.sequences[0, 6:].tolist(), output, recorder


@given(
    seed=st.integers(0, 10**6),
    new=st.integers(1, 30),
    end=st.none() | st.integers(1, VOCAB - 1),
    stops=st.lists(st.integers(1, VOCAB - 1), max_size=2),
    processes=st.booleans(),
    scores=st.booleans(),
    knobs=st.fixed_dictionaries(
        {
            "jacobi_schedule": st.sampled_from(["constant", "adaptive"]),
            "jacobi_block_size": st.sampled_from([2, 5, 16]),
            "jacobi_activation_ratio": st.sampled_from([0.0, 0.8]),
            "jacobi_topk_branches": st.integers(0, 3),
            "jacobi_max_blocks": st.integers(0, 2),
        }
    ),
)
@at_most(80)
def test_steps_are_forwards_and_their_tokens_the_output(seed, new, end, stops, processes, scores, knobs):
    if not knobs["jacobi_max_blocks"]:
        knobs["jacobi_topk_branches"] = 0
    tokens, output, seen = generated(
        tiny_model("qwen3"),
        seed,
        new,
        eos_token_id=end,
        output_scores=scores,
        decoding="jacobi_multiblock",
        **knobs,
        stopping_criteria=StoppingCriteriaList([StopAt(stops)] if stops else []),
        logits_processor=LogitsProcessorList([Nudge()] if processes else []),
    )
    assert seen.tokens == tokens
    assert len(seen.steps) == output.jacobi_stats.forwards
    assert seen.ended == 1
    assert not seen.steps[0].candidates
    for step in seen.steps[1:-1]:  # a stop may cut the last one short
        assert len(step.token_ids) == 1 + max([draft.accepted(step.token_ids) for draft in step.candidates], default=0)
    assert sum(len(draft.token_ids) for step in seen.steps for draft in step.candidates if draft.is_backbone) == (
        output.jacobi_stats.drafted
    )


def test_guesses_become_what_the_model_chooses_for_them():
    model = tiny_model("qwen3")
    knobs = {"jacobi_schedule": "constant", "jacobi_pool_size": 0, "jacobi_lookup_tokens": 0, "jacobi_block_size": 4}
    _, output, seen = generated(model, 3, 40, decoding="jacobi_multiblock", **knobs)
    known, checked = 6 + len(seen.steps[0].token_ids), 0
    for step, following in pairwise(seen.steps[1:]):
        (window,) = step.candidates
        ids = torch.cat([output.sequences[0, :known], torch.tensor(window.token_ids)])
        choices = model(ids[None]).logits[0, known - 1 :].argmax(-1).tolist()
        count = len(step.token_ids)
        assert tuple(choices[:count]) == step.token_ids
        if following.candidates:
            guesses = following.candidates[0].token_ids[: len(choices) - count]
            assert tuple(choices[count : count + len(guesses)]) == guesses
            checked += len(guesses)
        known += count
    assert checked > 20


def test_under_a_drafter_more_is_guessed_than_verified():
    model = tiny_model("qwen3")
    with drafting(model, random_drafter(model)):
        knobs = {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant", "jacobi_verify_width": 3}
        tokens, output, seen = generated(model, 5, 30, **knobs)
    assert seen.tokens == tokens
    assert len(seen.steps) == output.jacobi_stats.forwards
    windows = [draft for step in seen.steps for draft in step.candidates if draft.is_backbone]
    assert sum(draft.verified for draft in windows) == output.jacobi_stats.verified
    assert sum(len(draft.token_ids) for draft in windows) == output.jacobi_stats.drafted
    assert max(len(draft.token_ids) for draft in windows) > 3 == max(draft.verified for draft in windows)


def test_ordinary_decoding_has_a_token_a_step():
    tokens, _, seen = generated(tiny_model("qwen3"), 8)
    assert seen.steps == [jacobi_hf.StepEvent((token,)) for token in tokens]


@pytest.mark.parametrize("decoding", [None, "jacobi_multiblock"])
@pytest.mark.parametrize(
    "several", [{"inputs": torch.ones(2, 4, dtype=torch.long)}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_one_sequence_is_followed(several, decoding):
    arguments = {
        "inputs": torch.ones(1, 4, dtype=torch.long),
        "max_new_tokens": 3,
        "pad_token_id": 0,
        "streamer": Recorder(),
        **several,
    }
    with pytest.raises(ValueError, match="Recorder follows one sequence; this call generates 2"):
        tiny_model("qwen3").generate(**arguments, decoding=decoding)
