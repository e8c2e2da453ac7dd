"""Every argument of `generate`: served, refused, or decoded ordinarily with one sentence; never ignored in silence.

The tables go through the fields of `GenerationConfig`, the parameters of `generate` and those of the model's forward.
A field that a new release of transformers brings fails here until a line says what happens with it.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    Qwen3ForCausalLM,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from jacobi_hf import JacobiConfig
from jacobi_hf.integration.compat import CACHE_NAMES
from jacobi_hf.integration.mixin import _HANDLED
from tests.helpers.models import fresh_model
from tests.helpers.tiny import CHECKPOINT

KNOBS = {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant", "jacobi_block_size": 4}
TOKENIZER = AutoTokenizer.from_pretrained(CHECKPOINT)
SAMPLED = {"do_sample": True}


@dataclass(frozen=True)
class Served:
    """Jacobi decoding gives what ordinary decoding gives, with this value and these other arguments."""

    value: Any
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FallsBack(Served):
    """Decoded ordinarily, with one sentence that holds `says`."""

    says: str = ""


@dataclass(frozen=True)
class Refused(Served):
    """An error that holds `says`: the caller can drop one of the two. A saved decoding gives way."""

    says: str = ""


@dataclass(frozen=True)
class Fails(Served):
    """Ordinary decoding fails, and so does this, with the same error."""


BEAMS = "does not work with beam search"
ASSISTED = "does not work with assisted generation"
CACHES = "only 'static', 'dynamic' or none"
HUB = {"trust_remote_code": True}

FIELDS: dict[str, Served | tuple[Served, ...]] = {
    # length
    "max_length": Served(20, {"max_new_tokens": None}),
    "max_new_tokens": Served(9),
    "min_length": Served(12, {"eos_token_id": list(range(2000))}),
    "min_new_tokens": Served(7, {"eos_token_id": list(range(2000))}),
    "early_stopping": Served(value=True),
    "max_time": (Served(0.0), Served(1e6)),
    "stop_strings": Served(["e"], {"tokenizer": TOKENIZER}),
    # strategy
    "do_sample": Served(value=True),
    "num_beams": Refused(2, says=BEAMS),
    "use_mtp": Refused(value=True, says=ASSISTED),
    # cache
    "use_cache": (Served(value=True), FallsBack(value=False, says="use_cache=False")),
    "cache_implementation": (
        Served("static"),
        Served("dynamic"),
        Served("sliding_window"),
        Served("hybrid"),
        Served("hybrid_chunked"),
        Refused("offloaded", says=CACHES),
        Refused("offloaded_static", says=CACHES),
        Refused("offloaded_hybrid", says=CACHES),
        Refused("quantized", says=CACHES),
        Refused("paged", says="does not work with continuous batching"),
    ),
    "cache_config": Served({"backend": "quanto"}),
    "max_cache_len": Served(64, {"cache_implementation": "static"}),
    # logits
    "temperature": Served(0.7, SAMPLED),
    "top_k": Served(5, SAMPLED),
    "top_p": Served(0.7, SAMPLED),
    "min_p": Served(0.1, SAMPLED),
    "top_h": Served(0.4, SAMPLED),
    "typical_p": Served(0.7, SAMPLED),
    "epsilon_cutoff": Served(0.02, SAMPLED),
    "eta_cutoff": Served(0.02, SAMPLED),
    "repetition_penalty": Served(1.3),
    "encoder_repetition_penalty": Served(1.5),
    "length_penalty": Served(2.0),
    "no_repeat_ngram_size": Served(2),
    "bad_words_ids": Served([[3], [4, 5]]),
    "renormalize_logits": Served(value=True, others=SAMPLED),
    "forced_bos_token_id": Served(5),
    "forced_eos_token_id": Served(5),
    "remove_invalid_values": Served(value=True),
    "exponential_decay_length_penalty": Served((2, 1.5), {"eos_token_id": 5}),
    "suppress_tokens": Served([6, 7]),
    "begin_suppress_tokens": Served([6]),
    "sequence_bias": Served({(3,): 5.0}),
    "token_healing": Fails(value=True, others={"tokenizer": TOKENIZER}),
    "guidance_scale": (Served(1), FallsBack(1.5, says="guidance_scale")),
    "watermarking_config": Served(WatermarkingConfig()),
    # outputs
    "num_return_sequences": (Served(2, SAMPLED), Fails(2)),
    "output_attentions": Refused(value=True, says="output_attentions"),
    "output_hidden_states": Refused(value=True, says="output_hidden_states"),
    "output_scores": Served(value=True),
    "output_logits": Served(value=True),
    "return_dict_in_generate": Served(value=False),
    # special tokens
    "pad_token_id": Served(1),
    "bos_token_id": Served(1),
    "eos_token_id": Served([5, *range(1000)]),
    # encoder-decoder models
    "encoder_no_repeat_ngram_size": Served(2),
    "decoder_start_token_id": Served(3),
    # assisted generation; without an assistant most fields have no effect
    "is_assistant": Fails(value=True),
    "num_assistant_tokens": Served(3),
    "num_assistant_tokens_schedule": Served("heuristic"),
    "assistant_confidence_threshold": Served(0.1),
    "prompt_lookup_num_tokens": Refused(3, says=ASSISTED),
    "max_matching_ngram_size": Served(2),
    "assistant_early_exit": Refused(1, says=ASSISTED),
    "assistant_lookbehind": Served(2),
    "target_lookbehind": Served(2),
    "assistant_ensemble_weight": Served(0.5),
    "speculation_type": Served("dflash"),
    # how it runs
    "compile_config": Served(CompileConfig(backend="eager"), {"disable_compile": True}),
    "disable_compile": Served(value=True),
    "continuous_batching_config": Served({}),
    "prefill_chunk_size": FallsBack(2, says="prefill_chunk_size"),
    # moved to the Hub, or without effect
    "low_memory": Served(value=True),
    "penalty_alpha": (Fails(0.5), Refused(0.5, HUB, says="does not work with contrastive search")),
    "dola_layers": (Fails("low"), Refused("low", HUB, says="does not work with dola generation")),
    "diversity_penalty": Served(0.5),
    "num_beam_groups": Served(2),
    "constraints": (Fails([object()]), Refused([object()], HUB, says="constrained beam search")),
    "force_words_ids": (Fails([[5]]), Refused([[5]], HUB, says="constrained beam search")),
    # about the config
    "transformers_version": Served("5"),
    "_from_model_config": Served(value=True),
    "_commit_hash": Served("abc"),
}
# Fields that some of the supported releases do not have.
NOT_IN_EVERY_RELEASE = {
    "_commit_hash",
    "assistant_ensemble_weight",
    "max_cache_len",
    "speculation_type",
    "use_mtp",
}


class Countdown(TextStreamer):
    """A streamer that keeps quiet."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print nothing."""


def through_sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """Decode with the model's own loop, as many callables for `custom_generate` do after a change of their own."""
    return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)


def own_loop(model, input_ids, generation_config, **model_kwargs):
    """Append one token."""
    return torch.cat([input_ids, input_ids[:, :1]], 1)


def with_vocabulary_of_a_tokenizer():
    config = fresh_model("qwen3", layers=1).config
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(type(config)(**{**config.to_dict(), "vocab_size": len(TOKENIZER)})).eval()
    model.generation_config.pad_token_id = 1
    return model


ONE_ROW = TOKENIZER("def main(", return_tensors="pt", return_token_type_ids=False)
PARAMETERS: dict[str, Served | tuple[Served, ...]] = {
    "inputs": Served(ONE_ROW["input_ids"], {"input_ids": None}),
    "generation_config": Served(GenerationConfig(repetition_penalty=1.3)),
    "logits_processor": Served(LogitsProcessorList([TemperatureLogitsWarper(0.5)]), SAMPLED),
    "stopping_criteria": Served(StoppingCriteriaList([MaxLengthCriteria(8)])),
    "prefix_allowed_tokens_fn": Served(lambda batch, ids: [5, 6, 7, 8]),
    "synced_gpus": (Served(value=False), Fails(value=True)),
    "assistant_model": Refused(with_vocabulary_of_a_tokenizer(), says=ASSISTED),
    "streamer": Served(Countdown()),
    "negative_prompt_ids": (
        Served(ONE_ROW["input_ids"]),
        FallsBack(ONE_ROW["input_ids"], {"guidance_scale": 2.0}, says="guidance_scale"),
    ),
    "negative_prompt_attention_mask": Served(ONE_ROW["attention_mask"]),
    "custom_generate": (
        FallsBack(through_sample, says="custom_generate=through_sample decodes this call"),
        FallsBack(own_loop, says="has no effect unless own_loop calls the model's _sample"),
    ),
    # taken from `kwargs`
    "tokenizer": Served(TOKENIZER),
    "assistant_tokenizer": Served(TOKENIZER),
    "trust_remote_code": Served(value=True),
    "use_model_defaults": Fails(value=True),
    "return_legacy_cache": Fails(value=True),
}
FORWARD: dict[str, Served] = {
    "input_ids": Served(ONE_ROW["input_ids"]),
    "attention_mask": Served(ONE_ROW["attention_mask"]),
    "position_ids": FallsBack(torch.arange(3)[None], says="position_ids"),
    "inputs_embeds": Served(torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))),
    "use_cache": Served(value=True),
    "logits_to_keep": Served(3),
    "labels": FallsBack(ONE_ROW["input_ids"], says="labels"),
    **{name: Served(None) for name in CACHE_NAMES},  # tests/field/test_limits.py and test_turns.py have caches
    # what every model takes by name alone
    "is_causal": FallsBack(value=True, says="is_causal"),
    "num_items_in_batch": FallsBack(1, says="num_items_in_batch"),
}


@pytest.fixture(scope="module")
def model():
    return with_vocabulary_of_a_tokenizer()


def call(model, name, case, **knobs):
    """Return the ids of a call or its error, our sentences, and whether it was decoded with Jacobi."""
    arguments = {**ONE_ROW, "max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    arguments |= {**case.others, name: case.value}
    if arguments.get("generation_config") is not None:
        arguments["generation_config"] = GenerationConfig(**arguments["generation_config"].to_diff_dict())
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            output = model.generate(**arguments, **knobs)
        except (ValueError, TypeError, AttributeError, ImportError, AssertionError) as error:
            output = error
    sentences = [str(one.message) for one in caught if "decoding=" in str(one.message)]
    served = hasattr(output, "jacobi_stats")
    if not isinstance(output, Exception):
        output = (output if isinstance(output, torch.Tensor) else output.sequences).tolist()
    return output, sentences, served


def cases(table):
    return [
        pytest.param(name, case, id=f"{name}={str(case.value)[:20]}")
        for name, entry in table.items()
        for case in (entry if isinstance(entry, tuple) else (entry,))
    ]


def test_the_tables_hold_every_argument():
    """A field or parameter that a release of transformers brings, or drops, needs a decision."""
    fields = set(vars(GenerationConfig()))
    assert fields <= set(FIELDS), f"no decision on {fields - set(FIELDS)}"
    assert set(FIELDS) - fields <= NOT_IN_EVERY_RELEASE
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    assert parameters <= set(PARAMETERS), f"no decision on {parameters - set(PARAMETERS)}"
    forward = set(inspect.signature(inspect.unwrap(Qwen3ForCausalLM.forward)).parameters) - {"self", "kwargs"}
    assert forward <= set(FORWARD), f"no decision on {forward - set(FORWARD)}"
    decided = {name for name, case in FORWARD.items() if type(case) is Served}
    assert decided <= _HANDLED | {"input_ids"}, "arguments of the model that decoding takes, and the mixin does not"


@pytest.mark.parametrize(("name", "case"), cases({**FIELDS, **PARAMETERS, **FORWARD}))
@pytest.mark.filterwarnings("ignore")
def test_an_argument_of_generate(name, case, model):
    """The decision in the table is what happens, whatever ordinary decoding does with the argument."""
    is_field = name in FIELDS and name not in PARAMETERS and name not in FORWARD
    if is_field and not hasattr(GenerationConfig(), name):
        pytest.skip("not in this release")
    output, sentences, served = call(model, name, case, **KNOBS)
    if isinstance(case, Refused):
        assert isinstance(output, ValueError)
        assert case.says in str(output)
        assert "drop one of the two" in str(output)
        return
    expected, _, _ = call(model, name, case)
    if isinstance(case, Fails):
        assert isinstance(expected, Exception)
        assert (type(output), str(output)) == (type(expected), str(expected))
        return
    assert not isinstance(expected, Exception), expected
    assert output == expected
    if isinstance(case, FallsBack):
        assert [case.says in one for one in sentences] == [True]
    else:
        assert sentences == []
        assert served or name == "return_dict_in_generate"


REFUSED = [one for one in cases(FIELDS) if isinstance(one.values[1], Refused) and one.values[0] != "use_mtp"]


@pytest.mark.parametrize(("name", "case"), REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_a_saved_decoding_gives_way_with_a_sentence(name, case):
    """The same call with a decoding in the model's generation config is decoded ordinarily, or fails as that does."""
    model = fresh_model("qwen3", layers=1)
    model.generation_config.pad_token_id = 0
    if case.others or case.value == "paged":
        pytest.skip("needs the Hub, or has a test of its own")
    case = type(case)(case.value, {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)})
    expected, _, _ = call(model, name, case)
    JacobiConfig().save_defaults(model)
    output, sentences, _ = call(model, name, case)
    if isinstance(expected, Exception):  # for want of a GPU or of a package
        assert isinstance(output, Exception)
    else:
        assert output == expected
    assert sentences  # calls inside of assisted generation have one, too
    assert all("decoding ordinarily" in one for one in sentences)


def test_an_assistant_with_a_saved_decoding_drafts_ordinarily(model):
    """Assisted generation calls the assistant's `generate` itself, with a cache and scores that it goes on to use."""
    assistant = with_vocabulary_of_a_tokenizer()
    JacobiConfig().save_defaults(assistant)
    case = Served(assistant, {"return_dict_in_generate": False, "num_assistant_tokens": 3})
    output, sentences, _ = call(model, "assistant_model", case)
    expected, _, _ = call(model, "return_dict_in_generate", Served(value=False))
    assert output == expected
    assert sentences
    assert all("is_assistant=True" in one for one in sentences), sentences


def batched(model, **arguments):
    """Return the tokens of two prompts by continuous batching, and our sentences."""
    prompts = [[5, 6, 7, 8], [9, 3]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1)
        # By default, it fills the memory with its cache.
        small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
        arguments = {"generation_config": config, "continuous_batching_config": small, **arguments}
        results = model.generate_batch(prompts, **arguments)
    sentences = [str(one.message) for one in caught if "decoding=" in str(one.message)]
    return sorted(result.generated_tokens for result in results.values()), sentences


@pytest.mark.parametrize(
    "arguments",
    [
        {"decoding": "jacobi"},
        {"generation_config": GenerationConfig(decoding="jacobi", max_new_tokens=5)},
        {"decoding": "jacobi_multiblock", "jacobi_block_size": 4},
    ],
    ids=["argument", "generation config", "knobs"],
)
def test_continuous_batching_refuses_a_decoding(arguments):
    """`generate_batch` takes any keyword, and ignored `decoding` without a word."""
    with pytest.raises(ValueError, match=r"does not work with continuous batching .* drop one of the two"):
        batched(fresh_model("qwen3", layers=1), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jacobi_block_size": 4}, "given without decoding"),
        ({"decoding": "jacobi", "jacobi_block_sise": 4}, "did you mean 'jacobi_block_size'"),
    ],
)
def test_continuous_batching_checks_the_knobs(arguments, message):
    """A knob that is misspelt or pointless is an error in `generate`, and here too."""
    with pytest.raises(ValueError, match=message):
        batched(fresh_model("qwen3", layers=1), **arguments)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=message):
        fresh_model("qwen3", layers=1).generate(ids, cache_implementation="paged", max_new_tokens=5, **arguments)


@pytest.mark.parametrize("in_config", [False, True])
def test_continuous_batching_leaves_a_saved_decoding_out(in_config):
    """With a decoding in the model's generation config, the tokens are the ordinary ones, and one sentence says so."""
    model = fresh_model("qwen3", layers=1)
    expected, _ = batched(model)
    assert [len(tokens) for tokens in expected] == [5, 5]
    JacobiConfig().save_defaults(model)
    knobs = JacobiConfig().to_knobs() if in_config else {}
    model.generation_config.update(max_new_tokens=5, eos_token_id=-1, pad_token_id=0)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1, **knobs)
    given = config if in_config else None
    output, sentences = batched(model, generation_config=given)
    assert output == expected
    assert ["does not support continuous batching" in one for one in sentences] == [True]
    output, sentences = batched(model, generation_config=given, decoding=None)
    assert output == expected
    assert sentences == []
