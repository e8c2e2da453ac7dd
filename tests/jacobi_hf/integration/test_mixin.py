"""Registration, knobs, and what is refused or served the ordinary way."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import sys
import warnings

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconForCausalLM,
    GenerationConfig,
    GenerationMixin,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import jacobi_hf
from jacobi_hf import JacobiConfig, JacobiGenerationMixin, register, unregister
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.integration.registry import register_defaults
from tests.helpers.models import OTHERS, fresh_model, tiny_model


def test_the_private_hooks_have_the_signatures_that_were_tested():
    """A release of transformers that changes these breaks this test, not a user."""
    hooks = {
        "_extract_generation_mode_kwargs": [
            "self",
            "custom_generate",
            "kwargs",
            "synced_gpus",
            "assistant_model",
            "streamer",
        ],
        "_prepare_generation_config": ["self", "generation_config", "kwargs"],
        "_validate_generation_mode": ["self", "generation_mode", "generation_config", "generation_mode_kwargs"],
        "_sample": [
            "self",
            "input_ids",
            "logits_processor",
            "stopping_criteria",
            "generation_config",
            "synced_gpus",
            "streamer",
            "model_kwargs",
        ],
        "_has_unfinished_sequences": ["self", "this_peer_finished", "synced_gpus", "device"],
    }
    for name, parameters in hooks.items():
        found = list(inspect.signature(getattr(GenerationMixin, name)).parameters)
        assert found == parameters, (
            f"GenerationMixin.{name} takes {found} in this transformers; "
            f"jacobi_hf.integration.mixin was written for {parameters}"
        )


def test_registration_is_idempotent_and_reversible(prompt):
    bases = Qwen3ForCausalLM.__bases__
    register_defaults()
    assert Qwen3ForCausalLM.__bases__ == bases
    model = fresh_model("qwen3")
    try:
        unregister()
        assert JacobiGenerationMixin not in Qwen3ForCausalLM.__mro__
        unregister(Qwen3ForCausalLM)
        with pytest.raises(ValueError, match="decoding"):
            model.generate(**prompt, max_new_tokens=3, decoding="jacobi")
    finally:
        register_defaults()
    assert Qwen3ForCausalLM.__bases__ == bases
    model.generate(**prompt, max_new_tokens=3, decoding="jacobi")  # an instance from before


def test_a_class_that_is_not_registered_says_what_to_do(prompt):
    class Mine(LlamaForCausalLM):
        pass

    model = Mine(fresh_model("llama").config).eval()
    plain = model.generate(**prompt, max_new_tokens=3)
    unregister(LlamaForCausalLM)
    try:
        message = "decoding='jacobi' does not work here: Mine is not registered. Call jacobi_hf.register(type(model))"
        with pytest.raises(ValueError, match=re.escape(message)):
            model.generate(**prompt, max_new_tokens=3, decoding="jacobi")
        with pytest.raises(ValueError, match="jacobi_block_size=4 does not work here: Mine is not registered"):
            model.generate(**prompt, max_new_tokens=3, jacobi_block_size=4)
        assert torch.equal(plain, model.generate(**prompt, max_new_tokens=3, decoding=None))
        JacobiConfig().save_defaults(model)
        with pytest.warns(UserWarning, match=r"has decoding='jacobi_multiblock', but .*: Mine is not registered"):
            assert torch.equal(plain, model.generate(**prompt, max_new_tokens=3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(**prompt, max_new_tokens=3)
            model.generate(**prompt, max_new_tokens=3, decoding=None)
        with pytest.raises(ValueError, match="decoding='jacobi' does not work here"):  # although one is saved
            model.generate(**prompt, max_new_tokens=3, decoding="jacobi")
        named = GenerationConfig(decoding="jacobi", max_new_tokens=3, do_sample=False)
        with pytest.raises(ValueError, match="decoding='jacobi' does not work here"):
            model.generate(**prompt, generation_config=named)
    finally:
        register_defaults()
    assert model.generate(**prompt, max_new_tokens=3, return_dict_in_generate=True).jacobi_stats.forwards


def test_a_class_with_an_argument_of_this_name_keeps_it():
    seen = []

    class Own(BloomForCausalLM):
        def forward(self, *args, decoding=None, **kwargs):
            seen.append(decoding)
            return super().forward(*args, **kwargs)

        def prepare_inputs_for_generation(self, *args, decoding=None, **kwargs):
            return super().prepare_inputs_for_generation(*args, **kwargs) | {"decoding": decoding}

    config = BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2, pad_token_id=0, eos_token_id=None)
    Own(config).generate(torch.tensor([[5, 6]]), max_new_tokens=1, decoding="mine")
    assert seen == ["mine"]


def test_a_class_that_cannot_be_registered_says_why(prompt):
    config = BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2, pad_token_id=0, eos_token_id=None)
    with pytest.raises(ValueError, match=r"does not work here: BloomForCausalLM.forward does not take"):
        BloomForCausalLM(config).generate(**prompt, max_new_tokens=3, decoding="jacobi")


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_architectures(kind, attention, prompt):
    model = fresh_model(kind)
    model.set_attn_implementation(attention)
    register(type(model))
    try:
        reference = model.generate(**prompt, max_new_tokens=30)
        for decoding in ("jacobi", "jacobi_multiblock"):
            output = model.generate(
                **prompt, max_new_tokens=30, decoding=decoding, jacobi_block_size=4, return_dict_in_generate=True
            )
            assert torch.equal(output.sequences, reference)
            assert output.jacobi_stats.forwards > 1
    finally:
        unregister(type(model))


@pytest.mark.parametrize("wrong", [torch.nn.Linear, jacobi_hf.JacobiConfig])
def test_only_models_that_generate_can_be_registered(wrong):
    with pytest.raises(TypeError, match=wrong.__name__):
        register(wrong)


def test_a_class_without_registration_refuses_the_argument():
    assert JacobiGenerationMixin not in LlamaForCausalLM.__mro__
    with pytest.raises(ValueError, match="decoding"):
        fresh_model("llama").generate(torch.tensor([[5, 6]]), max_new_tokens=3, decoding="jacobi")


def test_pickle_and_deepcopy(prompt):
    model = fresh_model("qwen3")
    reference = model.generate(**prompt, max_new_tokens=9)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.generate(**prompt, max_new_tokens=9, decoding="jacobi_multiblock"), reference)


def forwards(model, prompt, **arguments):
    """How many forwards a call takes, and its stats if it was a Jacobi one."""
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        output = model.generate(**prompt, max_new_tokens=12, return_dict_in_generate=True, **arguments)
    finally:
        hook.remove()
    return len(calls), getattr(output, "jacobi_stats", None)


@pytest.mark.parametrize("schedule", ["adaptive", "constant"])
def test_statistics_count_what_happened(any_model, prompt, schedule):
    knobs = {"decoding": "jacobi_multiblock", "jacobi_schedule": schedule, "jacobi_block_size": 4}
    calls, stats = forwards(any_model, prompt, **knobs)
    assert stats.forwards == calls
    assert stats.new_tokens == [12, 12]
    assert all(1 <= n <= calls for n in stats.row_forwards)
    assert stats.accepted_from.total() == sum(stats.new_tokens) - 2 - (sum(stats.row_forwards) - 2)
    assert sum(length * count for length, count in stats.accepted_lengths.items()) == sum(stats.new_tokens) - 2
    assert stats.slots_by_width.total() == stats.steps_by_shape.total() == calls - 1
    assert stats.seconds_by_shape.keys() == stats.steps_by_shape.keys()
    assert sum(stats.seconds_by_shape.values()) == pytest.approx(sum(map(sum, stats.seconds_by_width.values())))
    accepted = sum(length * count for length, count in stats.accepted_guesses.items())
    assert accepted == stats.accepted_from.total() <= stats.guesses
    assert stats.accepted_guesses.total() <= stats.accepted_lengths.total()
    assert stats.tokens_per_forward == [12 / n for n in stats.row_forwards]
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0


def test_every_way_to_give_knobs(prompt):
    model = fresh_model("qwen3")
    knobs = {"jacobi_schedule": "constant", "jacobi_block_size": 4, "jacobi_pool_size": 0}
    _, called = forwards(model, prompt, decoding="jacobi_multiblock", **knobs)
    config = GenerationConfig(decoding="jacobi_multiblock", **knobs)
    _, configured = forwards(model, prompt, generation_config=config)
    JacobiConfig(**knobs).save_defaults(model)
    _, persisted = forwards(model, prompt)
    assert called.slots_by_width == configured.slots_by_width == persisted.slots_by_width
    assert max(called.slots_by_width) <= 1 + 8 + 16
    _, overridden = forwards(model, prompt, jacobi_block_size=2, jacobi_lookup_tokens=0)
    assert max(overridden.slots_by_width) <= 1 + 4
    assert forwards(model, prompt, decoding=None)[1] is None
    _, single = forwards(model, prompt, decoding="jacobi")  # the persisted knobs of the other decoding are passed over
    assert max(single.slots_by_width) <= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoding": "jacobbi"}, "did you mean 'jacobi'"),
        ({"decoding": "jacobi", "jacobi_block_sise": 4}, "did you mean 'jacobi_block_size'"),
        ({"decoding": "jacobi_multiblock", "jacobi_block_size": 0}, "jacobi_block_size=0"),
        ({"decoding": "jacobi", "jacobi_pool_size": 2}, "jacobi_pool_size has no meaning with decoding='jacobi'"),
        ({"jacobi_block_size": 8}, "given without decoding"),
        ({"generation_config": GenerationConfig(jacobi_block_size=8)}, "given without decoding"),
        (
            {"generation_config": GenerationConfig(decoding="jacobi", jacobi_pool_size=4)},
            "jacobi_pool_size has no meaning",
        ),
        ({"generation_config": GenerationConfig(decoding="jacobi", jacobi_n=3)}, "'jacobi_n' is not a knob"),
        ({"decoding": "jacobi", "num_beams": 2}, "does not work with beam search"),
        ({"decoding": "jacobi", "prompt_lookup_num_tokens": 3}, "does not work with assisted generation"),
        ({"decoding": "jacobi", "cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"decoding": "jacobi", "output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        (
            {"decoding": "jacobi", "output_hidden_states": True, "return_dict_in_generate": True},
            "output_hidden_states",
        ),
        ({"decoding": "jacobi", "max_new_tokens": 0}, "max_length|max_new_tokens"),
    ],
)
def test_bad_calls_raise_before_any_forward(arguments, message, prompt):
    model = fresh_model("qwen3")
    before = model.generation_config.to_dict()
    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match=message):
        model.generate(**{**prompt, "max_new_tokens": 5, **arguments})
    hook.remove()
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "empty|0 rows"),
        ({"input_ids": torch.tensor([[5, 23]])}, "input_ids holds 23, which is outside the model's vocabulary of 23"),
        ({"input_ids": torch.tensor([[5, -1]])}, "input_ids holds -1"),
        (
            {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 2)},
            "attention_mask covers 2 tokens, the prompt has 3",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_inputs_raise_before_any_forward(inputs, message, model):
    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    try:
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, decoding="jacobi_multiblock")
    finally:
        hook.remove()


def test_caches_that_do_not_fit_are_refused_and_left_alone(model):
    small, ids = StaticCache(config=model.config, max_cache_len=3), torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(ValueError, match=f"{CACHE} holds 3 tokens, the prompt has 4"):
        model.generate(ids, **{CACHE: small}, max_new_tokens=20, do_sample=False, pad_token_id=0, decoding="jacobi")
    assert int(small.get_seq_length()) == 0
    other = DynamicCache(config=model.config)
    model(torch.tensor([[5, 6], [7, 8]]), **{CACHE: other}, use_cache=True)
    with pytest.raises(ValueError, match="holds a batch of 2 rows, the prompt has 1"):
        model.generate(ids, **{CACHE: other}, max_new_tokens=4, do_sample=False, pad_token_id=0, decoding="jacobi")
    assert other.get_seq_length() == 2


def test_a_static_cache_made_for_another_batch_is_refused_and_left_alone(model, prompt):
    cache = StaticCache(config=model.config, max_cache_len=64)
    cache.early_initialization(3, 2, 8, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="holds a batch of 3 rows, the prompt has 2"):
        model.generate(**prompt, max_new_tokens=4, **{CACHE: cache}, decoding="jacobi")
    assert int(cache.get_seq_length()) == 0


def test_positions_are_counted_without_pads(prompt):
    model = fresh_model("qwen3")
    model.config.max_position_embeddings = 6
    same_ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt["input_ids"]], 1)
    padded = {**prompt, "input_ids": same_ids, "attention_mask": (same_ids != 0).long()}
    assert torch.equal(
        model.generate(**padded, max_new_tokens=5, decoding="jacobi"), model.generate(**padded, max_new_tokens=5)
    )


class MyCache(DynamicCache):
    """Not a cache that is known to work."""


def test_what_a_persisted_decoding_cannot_serve_is_decoded_ordinarily(prompt):
    model = fresh_model("qwen3")
    reference = model.generate(**prompt, max_new_tokens=6)
    JacobiConfig().save_defaults(model)
    with pytest.warns(UserWarning, match="MyCache"):
        assert torch.equal(
            model.generate(**prompt, max_new_tokens=6, **{CACHE: MyCache(config=model.config)}), reference
        )


def test_a_base_class_may_be_registered_after_its_subclass():
    class Mine(LlamaForCausalLM):
        pass

    register(Mine)
    try:
        register(LlamaForCausalLM)
        assert Mine.__mro__.count(JacobiGenerationMixin) == 1
    finally:
        unregister(LlamaForCausalLM)
    assert JacobiGenerationMixin not in Mine.__mro__


@pytest.mark.parametrize("wrong", [GPTNeoForCausalLM, FalconForCausalLM])
def test_classes_with_a_bias_of_their_own_are_refused(wrong):
    with pytest.raises(TypeError, match=wrong.__name__):
        register(wrong)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3]])}, "position_ids"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
    ],
)
def test_what_is_not_served_is_decoded_ordinarily_with_one_warning(arguments, reason, model):
    call = {
        "input_ids": torch.tensor([[5, 6, 7, 8]]),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        **arguments,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model.generate(**call, decoding="jacobi_multiblock")
    assert [reason in str(w.message) for w in caught if "decoding ordinarily" in str(w.message)] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(output, model.generate(**call))


@pytest.mark.parametrize("arguments", [{"num_beams": 2}, {"output_hidden_states": True}, {"output_attentions": True}])
def test_persisted_decoding_gives_way(arguments, prompt):
    model = fresh_model("qwen3")
    model.set_attn_implementation("eager")
    reference = model.generate(**prompt, max_new_tokens=6, **arguments)
    JacobiConfig().save_defaults(model)
    with pytest.warns(UserWarning, match="decoding ordinarily"):
        output = model.generate(**prompt, max_new_tokens=6, **arguments)
    assert torch.equal(output, reference)


@pytest.mark.parametrize(
    ("attention", "problem"),
    [("flash_attention_2", "flash-attn is not installed"), ("flash_attention_3", "takes no mask of our own")],
)
def test_attention_that_takes_no_mask_of_ours_falls_back_with_advice(attention, problem, prompt, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    model = fresh_model("qwen3")
    model.config._attn_implementation = attention
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, attention, sdpa_attention_forward)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, attention, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    reference = model.generate(**prompt, max_new_tokens=3)
    with pytest.warns(UserWarning, match=f"{attention}.*{problem}.*set_attn_implementation\\('sdpa'\\)"):
        output = model.generate(**prompt, max_new_tokens=3, decoding="jacobi")
    assert torch.equal(output, reference)


def test_ordinary_decoding_is_untouched(prompt):
    model = tiny_model("qwen3")
    output = model.generate(**prompt, max_new_tokens=4, return_dict_in_generate=True)
    assert not hasattr(output, "jacobi_stats")
