"""Limits that ordinary decoding does not have: none of ours stands in the way of what `generate` serves.

Tried: prompts longer than `max_position_embeddings` (with YaRN as model cards switch it on, and without), models with
a table of positions, masks and caches of every kind that `generate` takes, ids outside the vocabulary.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3ForCausalLM,
    StaticCache,
)

from jacobi_hf import register, unregister
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.loading import check_table, positions_of
from tests.helpers.models import VOCAB, fresh_model, tiny_model
from tests.helpers.tiny import CHECKPOINT

KNOBS = {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant", "jacobi_block_size": 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048}


def outcome(model, arguments, **knobs):
    """Return the ids of a call or the error that it ends with, and our warnings."""
    call = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, **arguments}
    call = {name: value() if callable(value) else value for name, value in call.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = model.generate(**call, **knobs).tolist()
        except (ValueError, RuntimeError, IndexError) as error:
            result = error
    return result, [str(one.message) for one in caught if "decoding ordinarily" in str(one.message)]


def stretched_model(**changes):
    config = type(fresh_model("qwen3").config)(**{**fresh_model("qwen3").config.to_dict(), **changes})
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("rope", [YARN, {"rope_type": "default", "rope_theta": 1e4}], ids=["yarn", "none"])
def test_a_prompt_longer_than_max_position_embeddings(rope):
    """YaRN is switched on as the cards of Qwen2.5 and Qwen3 say: a factor, and the number of positions left alone."""
    model = stretched_model(max_position_embeddings=2048, rope_parameters=rope)
    ids = torch.randint(1, VOCAB, (1, 2100), generator=torch.Generator().manual_seed(0))
    reference, _ = outcome(model, {"input_ids": ids})
    output, warned = outcome(model, {"input_ids": ids}, **KNOBS)
    assert output == reference
    assert not warned


@pytest.mark.parametrize("sampled", [False, True])
def test_text_that_grows_past_max_position_embeddings(sampled):
    """The prompt fits, prompt and answer do not; two rows of unequal lengths."""
    model = stretched_model(max_position_embeddings=12)
    ids = torch.tensor([[0, 0, 0, 5, 6, 7], [1, 2, 3, 4, 5, 6]])
    call = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 30, "do_sample": sampled}
    outputs = []
    for knobs in ({}, KNOBS):
        torch.manual_seed(0)
        outputs.append(outcome(model, call, **knobs))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({"max_position_embeddings": 2048, "rope_parameters": YARN}, 8192),
        ({"max_position_embeddings": 8192, "rope_parameters": YARN}, 8192),
        ({"max_position_embeddings": 100, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 200),
        ({"max_position_embeddings": 100, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 100),
    ],
)
def test_commands_and_server_count_the_positions_of_stretched_embeddings(changes, positions):
    """The checks of the server, the chat and the commands refused what YaRN makes room for."""
    serving = pytest.importorskip("jacobi_hf.serving.generation")
    changes = {**changes, "rope_parameters": {"rope_theta": 1e4, **changes["rope_parameters"]}}
    model = stretched_model(**changes)
    assert positions_of(model) == positions
    options = GenerationConfig()
    serving._limit(model, positions - 7, options, None)
    assert options.max_new_tokens == 7


def test_the_harness_does_not_cut_prompts_that_stretched_embeddings_have_room_for():
    """lm-evaluation-harness reads `max_position_embeddings` alone and cuts longer prompts on the left."""
    harness = pytest.importorskip("jacobi_hf.evaluation.harness")
    model = stretched_model(max_position_embeddings=2048, rope_parameters=YARN)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert (
        harness.AlternatingLM(model, tokenizer, {"generate": {}}, lambda _: None, lambda indices: indices).max_length
        == 8192
    )


@pytest.fixture
def table_model():
    """A model that reads its positions from a table of 24."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=24,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    register(GPT2LMHeadModel)
    yield GPT2LMHeadModel(config).eval()
    unregister(GPT2LMHeadModel)


def test_drafts_stay_within_a_table_of_positions(table_model):
    """A slot after the last position would be an index error, though nothing reads it. Pads are no positions."""
    ids = torch.tensor([[0, 0, 0, 5, 6], [0, 0, 1, 2, 3]])
    call = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 22}
    reference, _ = outcome(table_model, call)
    assert len(reference[0]) == 5 + 22
    assert outcome(table_model, call, **KNOBS) == (reference, [])


def test_text_that_may_leave_a_table_of_positions_is_decoded_ordinarily(table_model):
    """Ordinary decoding fails after the last position only, and an end token may come before it."""
    ids = torch.tensor([[1, 2, 3, 4]])
    first = outcome(table_model, {"input_ids": ids, "max_new_tokens": 1})[0][0][-1]
    call = {"input_ids": ids, "max_new_tokens": 100, "eos_token_id": first}
    output, warned = outcome(table_model, call, **KNOBS)
    assert output == outcome(table_model, call)[0] == [[1, 2, 3, 4, first]]
    assert len(warned) == 1
    assert "table of 24 positions" in warned[0]
    error, _ = outcome(table_model, {"input_ids": ids, "max_new_tokens": 100}, **KNOBS)
    assert isinstance(error, IndexError)  # as ordinary decoding does


def test_the_command_refuses_what_may_leave_a_table_of_positions_alone(table_model):
    """`jacobi-hf generate` refused every text beyond `max_position_embeddings`."""
    check_table(table_model, 4, 21)
    with pytest.raises(ValueError, match="may need 25 positions, and the model has a table of 24"):
        check_table(table_model, 4, 22)
    check_table(tiny_model("qwen3"), 4, 3000)


class MyCache(DynamicCache):
    """Of a kind that is not known to work."""


def filled(rows, columns, make):
    def cache():
        model = tiny_model("qwen3")
        held = make(model.config)
        if columns:
            ids = torch.arange(1, 1 + rows * columns).view(rows, columns)
            with torch.no_grad():
                model(ids, **{CACHE: held}, use_cache=True)
        return held

    return cache


def dynamic(config):
    return DynamicCache(config=config)


def static(config):
    return StaticCache(config=config, max_cache_len=8)


PLAIN = torch.tensor([[1, 2, 3]])
# Input that `generate` takes: what is decoded ordinarily, by a part of the sentence that says so; else served.
TAKEN = {
    "a row that ends with a pad": (
        {"input_ids": torch.tensor([[5, 6, 0], [5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])},
        "row 0 of the batch, which ends with a pad",
    ),
    "a row without a token": (
        {"input_ids": torch.tensor([[5, 6], [5, 6]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
        "row 1 of the batch, which has no token",
    ),
    "pads inside a row": ({"input_ids": PLAIN, "attention_mask": torch.tensor([[1, 0, 1]])}, None),
    "a bool mask": ({"input_ids": PLAIN, "attention_mask": torch.tensor([[False, True, True]])}, None),
    "a float mask": ({"input_ids": PLAIN, "attention_mask": torch.tensor([[0.0, 1.0, 1.0]])}, None),
    "a mask of other values": ({"input_ids": PLAIN, "attention_mask": torch.tensor([[1, 3, 1]])}, "other values than"),
    "a mask that is too long": (
        {"input_ids": PLAIN, "attention_mask": torch.ones(1, 5)},
        "attention_mask of 5 tokens",
    ),
    "a cache that holds the whole prompt": (
        {"input_ids": PLAIN, CACHE: filled(1, 3, dynamic)},
        "a cache of 3 tokens before a prompt of 3",
    ),
    "new ids with a mask of their own": (
        {"input_ids": torch.tensor([[4, 5]]), "attention_mask": torch.ones(1, 2), CACHE: filled(1, 3, dynamic)},
        "a cache of 3 tokens before a prompt of 2",
    ),
    "embeddings of the new text alone": (
        {
            "inputs_embeds": torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)),
            "attention_mask": torch.ones(1, 7),
            CACHE: filled(1, 2, dynamic),
        },
        "embeddings of 5 tokens where cache and prompt have 7",
    ),
    "a cache of a subclass": ({"input_ids": PLAIN, CACHE: filled(1, 2, lambda c: MyCache(config=c))}, "MyCache"),
    "an empty cache of a subclass": (
        {"input_ids": PLAIN, CACHE: filled(1, 0, lambda c: MyCache(config=c))},
        "MyCache",
    ),
    "a cache of more layers": (
        {"input_ids": PLAIN, CACHE: lambda: DynamicCache(config=fresh_model("qwen3", layers=5).config)},
        "5 layers for a model of 3",
    ),
    "a StaticCache that may be too small": (
        {"input_ids": PLAIN, "max_new_tokens": 20, "eos_token_id": list(range(1, 23)), CACHE: filled(1, 2, static)},
        "of 8 tokens where prompt and new tokens may need 22",
    ),
    "a StaticCache that is just large enough": (
        {"input_ids": PLAIN, "max_new_tokens": 6, CACHE: filled(1, 2, static)},
        None,
    ),
    "cached ids outside the vocabulary": (
        {"input_ids": torch.tensor([[-100, 99, 3]]), CACHE: filled(1, 2, dynamic)},
        None,
    ),
}


@pytest.mark.parametrize("decoding", ["jacobi", "jacobi_multiblock"])
@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.filterwarnings("ignore")
def test_input_that_generate_takes(name, decoding):
    """Masks, caches and lengths that people pass: the same ids, and one sentence where they are decoded ordinarily."""
    arguments, sentence = TAKEN[name]
    model = tiny_model("qwen3")
    reference, _ = outcome(model, arguments)
    assert not isinstance(reference, Exception)
    output, warned = outcome(model, arguments, decoding=decoding)
    assert output == reference
    assert [sentence in one for one in warned] == ([True] if sentence else [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "the batch is empty: 0 rows of 4 tokens"),
        ({"input_ids": torch.tensor([[5, VOCAB]])}, "input_ids holds 23, .* vocabulary of 23 ids"),
        ({"input_ids": torch.tensor([[5, -1]])}, "input_ids holds -1"),
        ({"input_ids": PLAIN, "attention_mask": torch.tensor([[0, 1]])}, "covers 2 tokens, the prompt has 3"),
        ({"input_ids": PLAIN, CACHE: filled(2, 2, dynamic)}, "holds a batch of 2 rows, the prompt has 1"),
        (
            {"input_ids": torch.ones(1, 9, dtype=torch.long), CACHE: filled(1, 0, static)},
            "holds 8 tokens, the prompt has 9",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_input_that_generate_does_not_take_is_refused_with_a_reason(arguments, message):
    """Ordinary decoding fails somewhere inside the model; the error here says what is wrong."""
    model = tiny_model("qwen3")
    assert isinstance(outcome(model, arguments)[0], Exception)
    error, _ = outcome(model, arguments, **KNOBS)
    with pytest.raises(ValueError, match=message):
        raise error


def test_ids_of_an_image_in_the_cached_part_are_never_guessed():
    """A lookup over the text must not draft an id that the model has no embedding for."""
    model = tiny_model("qwen3")
    ids = torch.tensor([[5, 6, 99, 5, 6]])
    arguments = {"input_ids": ids, CACHE: filled(1, 3, dynamic), "max_new_tokens": 20}
    assert outcome(model, arguments, **KNOBS, jacobi_lookup_tokens=4) == outcome(model, arguments)
