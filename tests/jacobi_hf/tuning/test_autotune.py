from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import CompileConfig

from jacobi_hf import JacobiConfig, Tuning, autotune
from jacobi_hf.tuning.inputs import prompt_rows
from jacobi_hf.tuning.strategies import ASSISTED, describe, sources_of
from jacobi_hf.tuning.timing import Timing
from tests.helpers.drafters import drafting, random_drafter
from tests.helpers.models import VOCAB, fresh_model, tiny_model

ARGUMENTS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "progress": False, "seconds": 300}
ONE = {**ARGUMENTS, "max_new_tokens": 4}


def prompts(count, columns=6):
    return torch.randint(1, VOCAB, (count, columns), generator=torch.Generator().manual_seed(0)).tolist()


def test_every_strategy_is_tried_and_the_fastest_comes_first():
    model = tiny_model("qwen3")
    tuning = autotune(model, prompts(3), **ARGUMENTS)
    rounds = [timing.prompts for timing in tuning.table]
    assert rounds == sorted(rounds, reverse=True)
    for tried in set(rounds):
        speedups = [timing.speedup for timing in tuning.table if timing.prompts == tried]
        assert speedups == sorted(speedups, reverse=True)
    kinds = {sources_of(timing.strategy, model) for timing in tuning.table}
    assert kinds == {
        (),
        ("window",),
        ("lookup",),
        ("window", "lookup"),
        ("window", "pool"),
        ("window", "lookup", "pool"),
    }
    ordinary = next(timing for timing in tuning.table if timing.strategy is None)
    assert (ordinary.speedup, ordinary.tokens_per_forward, ordinary.mean_slots) == (1, 1, 1)
    assert tuning.recommended in tuning.table
    assert tuning.strategy in (tuning.table[0].strategy, JacobiConfig(), None)
    assert all(timing.low <= timing.high for timing in tuning.table)
    assert (ordinary.low, ordinary.high) == (1, 1)
    assert all(describe(timing.strategy) in str(tuning) for timing in tuning.table)
    assert set(tuning.milliseconds) == kinds
    assert not tuning.untried
    assert tuning.adaptive in tuning.table
    assert tuning.adaptive.prompts == ordinary.prompts == tuning.table[0].prompts
    assert tuning.adaptive.strategy == JacobiConfig()
    assert tuning.comparison in str(tuning)


def timing(strategy, seconds, prompts=4):
    return Timing(strategy, prompts, 2.0, 9.0, seconds, 1.0)


def test_the_answer_is_compared_with_the_adaptive_schedule():
    window = JacobiConfig(jacobi_schedule="constant")
    adaptive = timing(JacobiConfig(), 2.0)
    lost = Tuning(window, [timing(window, 1.5), adaptive, timing(None, 3.0)], {})
    assert lost.adaptive == adaptive
    assert str(lost).endswith("needs no tuning, has 0.75 of the speed of the fastest strategy.")
    assert str(Tuning(JacobiConfig(), [adaptive, timing(None, 3.0)], {})).endswith(
        "is surely faster than the adaptive schedule, so no knob is needed."
    )
    assert Tuning(None, [timing(None, 3.0)], {}).adaptive is None
    assert Tuning(None, [timing(None, 3.0), timing(JacobiConfig(), 1.0, prompts=1)], {}).comparison == ""


def test_the_adaptive_schedule_stays_within_a_saved_setting():
    model = fresh_model("qwen3")
    narrow = JacobiConfig(jacobi_block_size=4, jacobi_pool_size=0)
    narrow.save_defaults(model)
    assert autotune(model, prompts(1), **ONE).adaptive.strategy == narrow
    constant = replace(narrow, jacobi_schedule="constant")
    constant.save_defaults(model)
    tuning = autotune(model, prompts(1), **ONE)
    assert tuning.adaptive.strategy == JacobiConfig()
    assert constant in [timing.strategy for timing in tuning.table]


def test_more_time_tries_the_better_ones_on_more_prompts():
    tuning = autotune(tiny_model("qwen3"), prompts(6), **ONE)
    tried = [timing.prompts for timing in tuning.table]
    assert min(tried) == 2
    assert max(tried) == 6


def test_the_knobs_are_arguments_of_generate_and_override_saved_ones():
    model = fresh_model("qwen3")
    JacobiConfig(jacobi_block_size=3, jacobi_max_blocks=1, jacobi_pool_size=0, jacobi_lookup_tokens=2).save_defaults(
        model
    )
    tuning = autotune(model, prompts(2), **ARGUMENTS)
    assert JacobiConfig.from_generation_config(model.generation_config) in [timing.strategy for timing in tuning.table]
    ids = torch.tensor(prompts(1))
    output = model.generate(
        ids, max_new_tokens=9, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **tuning.knobs
    )
    assert hasattr(output, "jacobi_stats") == (tuning.config is not None)
    for timing in tuning.table:
        knobs = {"decoding": None} if timing.strategy is None else timing.strategy.to_knobs()
        assert JacobiConfig.from_knobs(knobs) == timing.strategy


def test_batches_and_sampling():
    rows = [[3], [4, 5, 6], [7, 8], [9, 3, 5, 6], [5]]
    tuning = autotune(tiny_model("qwen3"), rows, batch_size=2, **{**ONE, "do_sample": True, "temperature": 0.8})
    assert max(timing.prompts for timing in tuning.table) == 2  # batches of two; the last one would not have been full


def test_a_draft_model_is_tried_and_chosen_if_it_is_fastest():
    model = tiny_model("qwen3")
    draft = fresh_model("qwen3")
    tuning = autotune(model, prompts(2), assistant_model=draft, **ONE)
    assert ASSISTED in [timing.strategy for timing in tuning.table]
    assert Tuning(ASSISTED, tuning.table, {}, draft).knobs == {"decoding": None, "assistant_model": draft}
    assert Tuning(ASSISTED, tuning.table, {}, draft).config is None
    ids = torch.tensor(prompts(1))
    arguments = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(ids, **arguments), model.generate(ids, **arguments, **Tuning(ASSISTED, [], {}, draft).knobs)
    )


def test_a_drafter_has_a_source_of_its_own_and_is_tried_at_several_verify_widths():
    model = fresh_model("qwen3")
    JacobiConfig(jacobi_block_size=4, jacobi_max_blocks=1, jacobi_verify_width=3).save_defaults(model)
    with drafting(model, random_drafter(model, scale=0.3)):
        tuning = autotune(model, prompts(1), **ARGUMENTS)
    assert tuning.drafted
    assert {name for sources in tuning.milliseconds for name in sources} == {"drafter", "lookup", "pool"}
    verified = [
        s.strategy
        for s in tuning.table
        if s.strategy is not None and s.strategy.jacobi_verify_width and not s.strategy.jacobi_lookup_tokens
    ]
    assert {strategy.jacobi_verify_width for strategy in verified} == {
        strategy.window_width // parts for strategy in verified for parts in (1, 2, 4)
    }
    assert all(describe(timing.strategy, drafted=True) in str(tuning) for timing in tuning.table)
    assert JacobiConfig.from_generation_config(model.generation_config) in [timing.strategy for timing in tuning.table]
    assert not any(getattr(s.strategy, "jacobi_verify_width", 0) for s in autotune(model, prompts(1), **ONE).table)


def test_no_strategy_starts_after_the_time_is_up():
    tuning = autotune(tiny_model("qwen3"), prompts(2), **{**ARGUMENTS, "seconds": 1e-6})
    assert [timing.strategy for timing in tuning.table] == [None]
    assert tuning.strategy is None
    assert len(tuning.untried) == 13
    assert "no time for: adaptive: n=16 K=2, lookup 16, pool 2x8; lookup 8; n=16 K=1" in str(tuning)


def test_compiling_uses_up_time_and_the_knobs_have_the_compile_config():
    model = fresh_model("qwen3")
    config = CompileConfig(backend="eager", mode=None)
    tuning = autotune(model, prompts(1), **{**ONE, "seconds": 1e-6}, compile_config=config)
    assert [timing.strategy for timing in tuning.table] == [None]
    assert tuning.knobs == {"decoding": None, "cache_implementation": "static", "compile_config": config}
    assert len(tuning.untried) == 6
    assert replace(tuning, strategy=tuning.untried[0]).knobs == {
        **tuning.untried[0].to_knobs(),
        "compile_config": config,
    }
    assert replace(tuning, strategy=ASSISTED).knobs == {"decoding": None, "assistant_model": None}
    assert (
        autotune(
            model, prompts(1), **{**ONE, "seconds": 1e-6}, compile_config=config, disable_compile=True
        ).compile_config
        is None
    )
    ids = torch.tensor(prompts(1))
    arguments = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, **arguments, **tuning.knobs))


def test_a_model_that_cannot_be_compiled_is_tuned_uncompiled():
    model = fresh_model("qwen3")
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="compile_config is ignored: a module of the model has hooks"):
        tuning = autotune(model, prompts(1), **{**ONE, "seconds": 1e-6}, compile_config=CompileConfig())
    assert tuning.knobs == {"decoding": None}
    assert len(tuning.untried) == 13


@pytest.mark.parametrize("kind", ["tensor", "list of tensors", "arrays", "tuples"])
def test_prompts_in_other_forms(kind):
    ids = torch.tensor(prompts(2))
    forms = {
        "tensor": ids,
        "list of tensors": list(ids),
        "arrays": list(ids.numpy()),
        "tuples": [tuple(row) for row in ids.tolist()],
    }
    assert prompt_rows(forms[kind], None) == ids.tolist()


def test_results_may_be_dictionaries_and_the_random_generator_keeps_its_state():
    before = torch.get_rng_state()
    tuning = autotune(
        tiny_model("qwen3"), prompts(1), **{**ONE, "do_sample": True}, return_dict_in_generate=True, output_scores=True
    )
    assert len(tuning.table) > 12
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "needs a list of prompts"),
        ("one text", {}, "got a string"),
        (["text"], {}, "give their tokenizer"),
        ([[3], []], {}, "prompt 1 is empty"),
        ([[{"role": "user", "content": "hello"}]], {}, "the prompts are messages: give their tokenizer"),
        ([[3]], {"jacobi_block_size": 4}, "takes none; drop jacobi_block_size"),
        ([[3]], {"seconds": 0}, "leave nothing to measure"),
        ([[3]], {"batch_size": 0}, "batch_size=0"),
        ([[3]], {"assistant_model": 1, "batch_size": 2}, "one row at a time"),
        ([[3]], {"use_cache": False}, "does not support this call"),
        ([[3]], {"streamer": None, "attention_mask": None}, "drop attention_mask, streamer"),
        ([[3]], {"input_ids": None}, "drop input_ids"),
        ([[3]], {"eos_token_id": list(range(VOCAB))}, "ends at its first new token"),
        (torch.tensor([3, 4]), {}, "got a tensor of 1 dimensions"),
        ([torch.tensor([[3, 4]])], {}, "prompt 0 is neither"),
        ([3, 4], {}, "prompt 0 is neither"),
        ([[3], ["4"]], {}, "prompt 1 is neither"),
        ({"input_ids": [[3]]}, {}, "got a mapping"),
        ([torch.tensor([0.5])], {}, "prompt 0 is neither"),
    ],
)
@pytest.mark.filterwarnings("ignore:decoding=")
def test_arguments_that_cannot_be_used_are_refused(given, options, message):
    with pytest.raises(ValueError, match=message):
        autotune(tiny_model("qwen3"), given, **{**ARGUMENTS, **options})
