from __future__ import annotations

import pytest
import torch

from jacobi_hf import JacobiConfig, Tuning, autotune
from jacobi_hf.tuning import ASSISTED, describe, sources_of
from tests.models import VOCAB, fresh_model, tiny_model

ARGUMENTS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "progress": False, "seconds": 0.01}


def prompts(count, columns=6):
    return torch.randint(1, VOCAB, (count, columns), generator=torch.Generator().manual_seed(0)).tolist()


def test_every_setting_is_tried_and_the_fastest_comes_first():
    tuning = autotune(tiny_model("qwen3"), prompts(3), **ARGUMENTS)
    speedups = [setting.speedup for setting in tuning.table]
    assert speedups == sorted(speedups, reverse=True)
    kinds = {sources_of(setting.way) for setting in tuning.table}
    assert kinds == {(), ("window",), ("lookup",), ("window", "lookup"), ("window", "pool"), ("window", "lookup", "pool")}
    ordinary = next(setting for setting in tuning.table if setting.way is None)
    assert (ordinary.speedup, ordinary.tokens_per_forward, ordinary.mean_slots) == (1, 1, 1)
    assert tuning.config in [setting.way for setting in tuning.table]
    assert all(describe(setting.way) in str(tuning) for setting in tuning.table)
    assert set(tuning.milliseconds) == kinds


def test_more_time_tries_the_better_ones_on_more_prompts():
    tuning = autotune(tiny_model("qwen3"), prompts(6), **{**ARGUMENTS, "seconds": 300})
    tried = [setting.prompts for setting in tuning.table]
    assert min(tried) == 2
    assert max(tried) == 6


def test_the_answer_is_what_generate_takes_and_overrides_what_is_saved():
    model = fresh_model("qwen3")
    JacobiConfig(jacobi_block_size=3, jacobi_max_blocks=1, jacobi_pool_size=0, jacobi_lookup_tokens=2).save_defaults(model)
    tuning = autotune(model, prompts(2), **ARGUMENTS)
    assert JacobiConfig.from_generation_config(model.generation_config) in [setting.way for setting in tuning.table]
    ids = torch.tensor(prompts(1))
    output = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **tuning.knobs)
    assert hasattr(output, "jacobi_stats") == (tuning.config is not None)
    for setting in tuning.table:
        knobs = {"decoding": None} if setting.way is None else setting.way.to_knobs()
        assert JacobiConfig.from_knobs(knobs) == setting.way


def test_batches_and_sampling():
    rows = [[3], [4, 5, 6], [7, 8], [9, 3, 5, 6], [5]]
    tuning = autotune(tiny_model("qwen3"), rows, batch_size=2, **{**ARGUMENTS, "seconds": 300, "do_sample": True, "temperature": 0.8})
    assert max(setting.prompts for setting in tuning.table) == 2  # batches of two; the last one would not have been full


def test_a_draft_model_is_tried_and_taken_where_it_is_fastest():
    model, draft = tiny_model("qwen3"), fresh_model("qwen3")
    tuning = autotune(model, prompts(2), assistant_model=draft, **ARGUMENTS)
    assert ASSISTED in [setting.way for setting in tuning.table]
    assert Tuning(ASSISTED, tuning.table, {}, draft).knobs == {"decoding": None, "assistant_model": draft}
    assert Tuning(ASSISTED, tuning.table, {}, draft).config is None
    ids = torch.tensor(prompts(1))
    arguments = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, **arguments, **Tuning(ASSISTED, [], {}, draft).knobs))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "needs a list of prompts"), ("one text", {}, "got a string"), (["text"], {}, "give their tokenizer"),
        ([[3], []], {}, "prompt 1 is empty"), ([[3]], {"jacobi_block_size": 4}, "jacobi_block_size given to autotune"),
        ([[3]], {"seconds": 0}, "leave nothing to measure"), ([[3]], {"batch_size": 0}, "batch_size=0"),
        ([[3]], {"assistant_model": 1, "batch_size": 2}, "one row at a time"), ([[3]], {"use_cache": False}, "does not serve this call"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:decoding=")
def test_what_cannot_be_tuned_is_refused(given, options, message):
    with pytest.raises(ValueError, match=message):
        autotune(tiny_model("qwen3"), given, **{**ARGUMENTS, **options})
