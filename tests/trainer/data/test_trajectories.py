"""Trajectories: the invariants of the method, and both collectors against each other and against ordinary decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.trainer.data import trajectories
from jacobi_hf.trainer.data.answer_options import AnswerConfig
from jacobi_hf.trainer.data.trajectories import collect_trajectories, record_trajectories
from tests.helpers.models import OTHERS, TINY, VOCAB, fresh_model, tiny_model
from tests.helpers.properties import at_most

PROMPTS = [[5, 6, 7], [9, 3, 4, 9, 3, 4, 11], [2], [8, 8, 1, 20, 21, 3, 3, 3, 19, 4, 6]]


def answers_of(model, prompts, answers, seed=None):
    """Return what generate writes, up to its end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    if seed is not None:
        torch.manual_seed(seed)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=answers.generation_config(model))
    end = model.generation_config.eos_token_id
    rows = [row[width:].tolist() for row in output]
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def check_invariants(trajectory, answer, n, pad):
    """Each state has n ids, the first wrong one moves on strictly, and the last states are the answer."""
    assert trajectory.answer_ids == answer
    assert len(trajectory.blocks) == -(-len(answer) // n)
    joined = [token for states in trajectory.blocks for token in states[-1]]
    assert joined == answer + [pad] * (len(joined) - len(answer))
    for states in trajectory.blocks:
        assert 1 <= len(states) <= n
        assert all(len(state) == n for state in states)
        fixed = states[-1]
        assert all(state[0] == fixed[0] for state in states)
        firsts = [next((i for i in range(n) if state[i] != fixed[i]), n) for state in states]
        assert firsts == sorted(set(firsts))
        assert firsts[-1] == n


cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(TINY),
        "prompts": st.lists(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=4),
        "n": st.integers(2, 9),
        "blocks": st.integers(1, 4),
        "end": st.none() | st.integers(1, VOCAB - 1),
        "sampled": st.booleans(),
        "top_k": st.sampled_from([None, 5]),
        "seed": st.integers(0, 99),
    }
)


@pytest.fixture(autouse=True, scope="module")
def _small_groups():
    """Make a batch of these tests several groups."""
    former, trajectories.GROUP = trajectories.GROUP, 2
    yield
    trajectories.GROUP = former


@pytest.mark.slow
@at_most(60)
@given(cases)
def test_collected_equals_recorded_equals_generate(case):
    model, n = tiny_model(case["kind"]), case["n"]
    answers = AnswerConfig(
        n * case["blocks"],
        do_sample=case["sampled"],
        temperature=0.8,
        top_k=case["top_k"] if case["sampled"] else None,
    )
    former = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = case["end"]
    try:
        together = collect_trajectories(model, case["prompts"], n, answers, case["seed"])
        left_at = torch.get_rng_state()
        expected = answers_of(model, case["prompts"], answers, case["seed"])
        assert not case["sampled"] or torch.equal(left_at, torch.get_rng_state())
        assert record_trajectories(model, case["prompts"], n, answers, case["seed"]) == together
    finally:
        model.generation_config.eos_token_id = former
    for prompt, trajectory, answer in zip(case["prompts"], together, expected, strict=True):
        assert trajectory.prompt_ids == prompt
        check_invariants(trajectory, answer, n, 0)


@pytest.mark.slow
@at_most(30)
@given(cases, st.data())
def test_blocks_that_begin_within_the_answer(case, data):
    """Their trajectories are those of prompts that end where the blocks begin, with the noise from there on."""
    model, n, sampled = tiny_model(case["kind"]), case["n"], case["sampled"]
    prompts = case["prompts"]
    answers = AnswerConfig(
        n * case["blocks"] + n, do_sample=sampled, temperature=0.8, top_k=case["top_k"] if sampled else None
    )
    starts = (
        [data.draw(st.integers(0, n - 1))] * len(prompts)
        if sampled
        else [data.draw(st.integers(0, n - 1)) for _ in prompts]
    )
    whole = collect_trajectories(model, prompts, n, answers, case["seed"])
    shifted = collect_trajectories(model, prompts, n, answers, case["seed"], starts)
    for trajectory, full, start in zip(shifted, whole, starts, strict=True):
        assert trajectory.prompt_ids == full.prompt_ids + full.answer_ids[:start]
        # The answers have no end id, so they are cut to whole blocks, without pads.
        check_invariants(trajectory, full.answer_ids[start : start + (len(full.answer_ids) - start) // n * n], n, 0)
        assert all(len(state) == n for states in trajectory.blocks for state in states)
        assert len(trajectory.answer_ids) == n * len(trajectory.blocks)
    torch.manual_seed(case["seed"])
    for _ in range(starts[0] if sampled else 0):
        torch.empty(len(prompts), VOCAB).exponential_()
    expected = record_trajectories(model, [t.prompt_ids for t in shifted], n, answers)
    for trajectory, other in zip(shifted, expected, strict=True):
        assert trajectory.blocks == other.blocks[: len(trajectory.blocks)]


@pytest.mark.slow
@at_most(30)
@given(cases, st.data())
def test_answers_with_an_end_keep_it_if_blocks_begin_within_the_answer(case, data):
    model, n = tiny_model(case["kind"]), case["n"]
    former = model.generation_config.eos_token_id
    whole = collect_trajectories(model, case["prompts"], n, AnswerConfig(n * case["blocks"]))
    # An id that occurs in an answer, so that some answers end.
    end = data.draw(st.sampled_from(whole[0].answer_ids))
    model.generation_config.eos_token_id = end
    try:
        answers, starts = AnswerConfig(n * case["blocks"]), [data.draw(st.integers(0, n - 1)) for _ in case["prompts"]]
        whole = collect_trajectories(model, case["prompts"], n, answers)
        shifted = collect_trajectories(model, case["prompts"], n, answers, starts=starts)
    finally:
        model.generation_config.eos_token_id = former
    for trajectory, full, start in zip(shifted, whole, starts, strict=True):
        begun = len(trajectory.prompt_ids) - len(full.prompt_ids)
        assert (
            trajectory.prompt_ids + trajectory.answer_ids
            == (full.prompt_ids + full.answer_ids)[: len(trajectory.prompt_ids + trajectory.answer_ids)]
        )
        if full.answer_ids[-1] == end:
            assert begun == max(0, min(start, len(full.answer_ids) - 2))
            assert trajectory.answer_ids == full.answer_ids[begun:]
        else:
            assert begun == min(start, len(full.answer_ids) - n)
            assert len(trajectory.answer_ids) == n * len(trajectory.blocks)
        check_invariants(trajectory, trajectory.answer_ids, n, 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_trajectories_do_not_depend_on_the_batch(attention):
    model = fresh_model("qwen3-sliding")
    model.set_attn_implementation(attention)
    answers = AnswerConfig(24)
    together = collect_trajectories(model, PROMPTS, 6, answers)
    assert [collect_trajectories(model, [prompt], 6, answers)[0] for prompt in PROMPTS] == together


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_once_registered(kind):
    import jacobi_hf

    model = fresh_model(kind)
    jacobi_hf.register(type(model))
    try:
        recorded = record_trajectories(model, PROMPTS, 4, AnswerConfig(12))
    finally:
        jacobi_hf.unregister(type(model))
    assert collect_trajectories(model, PROMPTS, 4, AnswerConfig(12)) == recorded


def test_options_of_the_models_generation_config_are_not_applied():
    """Neither function applies processors that the model's own generation config asks for."""
    model = fresh_model("qwen3")
    plain = collect_trajectories(model, PROMPTS, 4, AnswerConfig(12))
    model.generation_config.no_repeat_ngram_size, model.generation_config.repetition_penalty = 1, 1.7
    own = model.generation_config
    assert collect_trajectories(model, PROMPTS, 4, AnswerConfig(12)) == plain
    assert record_trajectories(model, PROMPTS, 4, AnswerConfig(12)) == plain
    assert model.generation_config is own


def test_forwards_are_those_of_the_decoder():
    model = tiny_model("qwen3")
    for prompt in PROMPTS:
        (trajectory,) = collect_trajectories(model, [prompt], 6, AnswerConfig(24))
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=25,
            do_sample=False,
            decoding="jacobi",
            jacobi_block_size=6,
            return_dict_in_generate=True,
        )
        # The decoder's 25th token comes with the last block or with one forward more.
        assert output.jacobi_stats.forwards == trajectory.forwards


@pytest.mark.parametrize(
    ("prompts", "n", "answers", "message"),
    [
        ([[1, 2]], 1, AnswerConfig(8), "block_size=1 must be at least 2"),
        ([[1, 2]], 5, AnswerConfig(8), "max_new_tokens=8 must be a multiple of block_size=5, for example 10"),
        ([[1, 2], []], 4, AnswerConfig(8), "prompt 1 is empty"),
        ([], 4, AnswerConfig(8), "prompts is empty"),
    ],
)
def test_bad_input_is_named(model, prompts, n, answers, message):
    with pytest.raises(ValueError, match=message):
        collect_trajectories(model, prompts, n, answers)


def test_starts_of_another_number_are_named(model):
    with pytest.raises(ValueError, match="starts has 1 entries for 2 prompts"):
        collect_trajectories(model, [[1, 2], [3]], 4, AnswerConfig(8), starts=[0])


@pytest.mark.parametrize("collecting", [collect_trajectories, record_trajectories])
def test_models_whose_blocks_would_be_wrong_are_refused(collecting):
    model = fresh_model("qwen3")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' takes no mask of our own"):
        collecting(model, [[1, 2]], 4, AnswerConfig(8))
    model = fresh_model("qwen3")
    model.config.layer_types = ["linear_attention"] * model.config.num_hidden_layers
    with pytest.raises(ValueError, match="layers of type linear_attention"):
        collecting(model, [[1, 2]], 4, AnswerConfig(8))


def test_a_lora_is_collected_from_as_it_decodes():
    """Both functions give the same, and the generation config of the model inside is unchanged after them."""
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    model = fresh_model("qwen3")
    base_alone = collect_trajectories(model, PROMPTS, 4, AnswerConfig(12))
    model.generation_config.top_k = 7
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    together = collect_trajectories(adapted, PROMPTS, 4, AnswerConfig(12))
    assert together != base_alone
    assert record_trajectories(adapted, PROMPTS, 4, AnswerConfig(12)) == together
    assert any(len(states) > 1 for trajectory in together for states in trajectory.blocks)
    assert [t.answer_ids for t in together] == answers_of(adapted, PROMPTS, AnswerConfig(12))
    assert model.generation_config.top_k == 7
    prefixed = get_peft_model(fresh_model("qwen3"), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="prompt-learning adapter"):
        collect_trajectories(prefixed, PROMPTS, 4, AnswerConfig(12))


def test_bad_answer_configs_are_named():
    with pytest.raises(ValueError, match="temperature=0"):
        AnswerConfig(do_sample=True, temperature=0)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        AnswerConfig(max_new_tokens=0)
