"""The promise: the same tokens as `generate`, and everything else that a caller can see."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tests.helpers.cases import Case, cases, check_thousands, differences, knobs
from tests.helpers.models import TINY, VOCAB, tiny_model
from tests.helpers.properties import at_most


@hypothesis.given(case=cases())
def test_same_as_generate(case: Case) -> None:
    assert differences(case) == []


@pytest.mark.deep
def test_same_as_generate_in_thousands_of_cases() -> None:
    check_thousands(cases(), lambda case: case)


@hypothesis.given(
    kind=st.sampled_from(TINY),
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]),
    setting=knobs().filter(lambda knobs: knobs.get("jacobi_schedule") != "adaptive"),
    tokens=st.integers(1, 40),
)
@at_most(80)
def test_drafts_of_any_quality(kind: str, seed: int, share: float, setting: dict, tokens: int) -> None:
    """Drafts are replaced by the true continuation, each token spoilt with probability 1 - share, at every step."""
    from jacobi_hf.drafts.window import JacobiWindow

    model = tiny_model(kind)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (2, 5), generator=generator)
    reference = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    truth = torch.cat([reference[:, 5:], reference.new_zeros(2, 400)], 1)
    propose = JacobiWindow.propose

    def replay(self, context):
        token_BSN, length_BS = propose(self, context)
        index = context.outcome.generated_B[:, None] + torch.arange(token_BSN.shape[2])
        spoilt = torch.rand(index.shape, generator=generator) >= share
        token_BN = torch.where(spoilt, (truth.gather(1, index) + 1) % VOCAB, truth.gather(1, index))
        return token_BN[:, None], length_BS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JacobiWindow, "propose", replay)
        output = model.generate(
            ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **setting
        )
    assert torch.equal(output.sequences, reference)
    stats = output.jacobi_stats
    if share == 1.0:
        assert stats.accepted == stats.drafted
    if share == 1.0 and setting.get("jacobi_max_blocks", 1):
        assert stats.forwards <= 1 + -(-(tokens - 1) // setting["jacobi_block_size"]) * 2
    if share == 0.0 and setting.get("jacobi_pool_size", 0) == 0 and setting.get("jacobi_lookup_tokens", 0) == 0:
        assert stats.forwards == tokens


@hypothesis.given(case=cases())
@at_most(60)
def test_a_row_does_not_depend_on_its_batch(case: Case) -> None:
    arguments = {**case.arguments, "do_sample": False}
    for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"):
        arguments.pop(name, None)  # the last two count pads as part of the prompt, in generate as here
    inputs, end = case.inputs(), case.arguments.get("eos_token_id", [])
    model = tiny_model(case.kind)
    together = model.generate(**inputs, **arguments, pad_token_id=0, **case.knobs)
    for row, length in enumerate(case.lengths):
        alone = model.generate(
            inputs["input_ids"][row : row + 1, -length:], **arguments, pad_token_id=0, **case.knobs
        )[0, length:].tolist()
        in_batch = together[row, max(case.lengths) :].tolist()
        if end and any(t in end for t in alone):
            assert in_batch[len(alone) :] == [0] * (len(in_batch) - len(alone))
            in_batch = in_batch[: len(alone)]
        assert in_batch == alone


@hypothesis.given(case=cases())
@at_most(40)
def test_a_step_accepts_at_least_what_its_window_alone_would(case: Case) -> None:
    from jacobi_hf.decoding import step

    accept, steps = step.accept, []

    def watch(state, *rest, **options):
        acceptance = accept(state, *rest, **options)
        width_B = state.limited(acceptance.accepted_BS[:, 0] + 1)
        best_B = acceptance.accepted_BS.max(1).values
        assert torch.equal(acceptance.accepted_BS.gather(1, acceptance.best_B[:, None])[:, 0], best_B)
        going = ~state.halted_B & ~acceptance.halted_B
        assert (acceptance.count_B >= width_B)[going].all()
        steps.append(acceptance)
        return acceptance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "accept", watch)
        output, _ = case.generate(**case.knobs)
    if case.returns_dict and steps:
        assert len(steps) == output.jacobi_stats.forwards
