"""Quantised activations: whether guesses change the logits of the tokens beside them, and what a user hears of it.

Tried: torch's dynamic quantisation of layers; layers with one scale for a tensor, with a scale for each token, and
with unquantised outliers, each in float64, so that no difference comes from rounding; saved and loaded configs of
every method that transformers knows; models quantised after loading, which leave no trace in a config.
"""

from __future__ import annotations

import importlib
import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, FineGrainedFP8Config
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from typer.testing import CliRunner

from jacobi_hf.cli import app
from jacobi_hf.integration.quantisation import _BY_METHOD, shared_scales
from jacobi_hf.results.schema import Results
from tests.docs.pages import ROOT
from tests.helpers.models import VOCAB, fresh_model

KNOBS = {"jacobi_schedule": "constant", "jacobi_block_size": 4}
JACOBI = {"decoding": "jacobi_multiblock", **KNOBS, "max_new_tokens": 40, "do_sample": False}
ORDINARY = {"max_new_tokens": 40, "do_sample": False}
# Methods with which a token's logits do not depend on others: weights alone, or activations by token or by group of
# features, or with a scale that is fixed before the model runs. Read in the code of each.
INDEPENDENT = {
    *("aqlm", "auto-round", "awq", "bitnet", "bitsandbytes_4bit", "eetq", "fbgemm_fp8", "fp8", "fp_quant", "gemma"),
    *("gguf", "gptq", "higgs", "hqq", "metal", "mxfp4", "mxfp8", "quanto", "sinq", "spqr", "vptq"),
}


def warned(model: Any, **options: Any) -> list[str]:
    """Return the warnings about quantisation of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model.generate(torch.tensor([[3, 5, 7, 2]]), **(JACOBI | options))
    assert output.shape[1] > 4
    return [str(one.message) for one in caught if "guesses beside it" in str(one.message)]


def torch_dynamic(model: Any, dtype: torch.dtype = torch.qint8) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will move it to torchao
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=dtype)


def test_torchs_dynamic_quantisation_is_reported_once_a_model():
    """Somebody serves a model with `quantize_dynamic`: one sentence with what to do, and the call goes on."""
    model = torch_dynamic(fresh_model("qwen3"))
    (first,) = warned(model)
    assert first.startswith("decoding='jacobi_multiblock' may write other tokens than ordinary decoding")
    assert "torch's dynamic quantisation" in first
    assert first.endswith("with a scale for each token.")
    assert not warned(model)
    assert not warned(model, do_sample=True)
    assert len(warned(torch_dynamic(fresh_model("qwen3")))) == 1


def test_nothing_is_said_where_nothing_differs():
    """Weights in float16, unquantised layers, and a call that decodes the ordinary way."""
    assert not warned(torch_dynamic(fresh_model("qwen3"), torch.float16))
    assert not warned(fresh_model("qwen3"))
    model = torch_dynamic(fresh_model("qwen3"))
    assert not warned(model, decoding=None, jacobi_block_size=None, jacobi_schedule=None)
    assert not warned(model, use_cache=False)
    assert len(warned(model)) == 1


@pytest.mark.parametrize(("shares", "differ"), [("token", False), ("tensor", True), ("outliers", True)])
def test_what_shares_a_scale_decides_whether_texts_can_differ(monkeypatch, shares, differ):
    """Int8 activations in float64: by token, every text is that of ordinary decoding.

    With a scale for a tensor, or with features that are outliers for all tokens at once, texts differ, and so do those
    of ordinary decoding alone and in a batch.
    """
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    quantise = importlib.import_module("quantised").quantise
    of_guesses = []
    of_batches = []
    for seed in range(2):
        model = quantise(fresh_model("qwen3", seed, layers=2).double(), shares)
        torch.manual_seed(seed)
        ids = torch.randint(1, VOCAB, (4, 6))
        batch = model.generate(ids, **ORDINARY)
        for row, together in zip(ids, batch, strict=True):
            alone = model.generate(row[None], **ORDINARY)[0]
            of_guesses.append(not alone.equal(model.generate(row[None], **JACOBI)[0]))
            of_batches.append(not alone.equal(together))
    assert (any(of_guesses), any(of_batches)) == (differ, differ)


def torchao(kind: str, **data: Any) -> dict[str, Any]:
    """Return a saved config of torchao."""
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": data}}}


def compressed(**activations: Any) -> dict[str, Any]:
    """Return a saved config of compressed-tensors."""
    scheme = {"num_bits": 8, "type": "int", **activations}
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": scheme}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


def quark(**scheme: Any) -> dict[str, Any]:
    """Return a saved config of Quark."""
    return {"quant_method": "quark", "global_quant_config": {"weight": {"is_dynamic": False}, "input_tensors": scheme}}


PER_ROW, PER_TENSOR = ({"_type": kind, "_version": 1, "_data": {}} for kind in ("PerRow", "PerTensor"))
INT8, FLOAT8 = "Int8DynamicActivationInt8WeightConfig", "Float8DynamicActivationFloat8WeightConfig"
NVFP4 = "NVFP4DynamicActivationNVFP4WeightConfig"
# A config as config.json has it, and what the warning says; None where nothing differs.
CONFIGS = [
    (torchao(INT8, granularity=PER_ROW, weight_only_decode=False), None),
    (torchao(INT8, granularity=PER_TENSOR), "quantise with granularity=PerRow()"),
    (torchao(INT8, granularity=[PER_TENSOR, PER_ROW]), f"torchao's {INT8}(granularity=PerTensor())"),
    (torchao(INT8, granularity=[PER_ROW, PER_TENSOR]), None),
    (torchao(INT8, weight_only_decode=True), "set weight_only_decode=False"),
    (torchao(INT8, act_mapping_type={"_type": "MappingType", "_data": "SYMMETRIC"}), None),
    (torchao(FLOAT8, granularity=[PER_TENSOR, PER_TENSOR]), f"torchao's {FLOAT8}"),
    (torchao(FLOAT8, granularity=[PER_ROW, PER_ROW]), None),
    (torchao("Int8DynamicActivationInt4WeightConfig", group_size=32), None),
    (torchao("Int8WeightOnlyConfig", granularity=PER_TENSOR), None),
    (torchao("Float8StaticActivationFloat8WeightConfig", granularity=[PER_TENSOR, PER_TENSOR]), None),
    (torchao(NVFP4, use_dynamic_per_tensor_scale=True), "use_dynamic_per_tensor_scale=False"),
    (torchao(NVFP4, use_dynamic_per_tensor_scale=False), None),
    (torchao("FqnToConfig", fqn_to_config={"lm_head": torchao(INT8, granularity=PER_TENSOR)}), "PerTensor()"),
    (compressed(dynamic=True, strategy="token"), None),
    (compressed(dynamic=True, strategy="tensor"), "quantise with strategy 'token'"),
    (compressed(dynamic=True, strategy=None), "strategy 'tensor'"),
    (compressed(dynamic=False, strategy="tensor"), None),
    (compressed(dynamic="local", strategy="tensor_group"), None),
    (compressed() | {"config_groups": {"group_0": {"input_activations": None}}}, None),
    (
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
        "llm_int8_threshold=6 a token",
    ),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}, None),
    ({"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": True, "llm_int8_threshold": 6.0}, None),
    (quark(is_dynamic=True, qscheme="per_tensor"), "Quark's dynamic input_tensors"),
    (quark(is_dynamic=False, qscheme="per_tensor"), None),
    (quark(is_dynamic=True, qscheme="per_channel"), None),
    ({"quant_method": "nvfp4"}, "NVFP4 kernels"),
    ({"quant_method": "fouroversix", "dtype": "nvfp4"}, "quantise activations with dtype='mxfp4'"),
    ({"quant_method": "fouroversix", "dtype": "nvfp4", "activation_dtype": "mxfp4"}, None),
    ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, None),
    ({"quant_method": "gptq", "bits": 4}, None),
    ({"quant_method": "of another day"}, None),
    ({}, None),
    (None, None),
]


@pytest.mark.parametrize(("config", "said"), CONFIGS)
def test_info_says_from_a_saved_config_what_generate_says(tmp_path, config, said):
    """Somebody asks `jacobi-hf info` about a quantised checkpoint before loading it."""
    model = fresh_model("qwen3", layers=1)
    model.config.quantization_config = config
    model.config.save_pretrained(tmp_path)
    (reason,) = {shared_scales(model), inexact(tmp_path)}
    assert (reason is None) == (said is None)
    assert said is None or said in str(reason)
    text = CliRunner().invoke(app, ["info", str(tmp_path)]).stdout
    assert ("exactness" in text) == (said is not None)


def inexact(folder: Any) -> str | None:
    """Return what `jacobi-hf info` says about the exactness of a model."""
    result = CliRunner().invoke(app, ["info", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found: str | None = json.loads(result.stdout)["model"]["inexact"]
    return found


@pytest.mark.parametrize(("config", "said"), [one for one in CONFIGS if one[0]])
def test_the_config_of_a_loaded_model_is_read_too(config, said):
    """In a loaded model the config is an object, whose method is an enumeration in most cases."""
    model = fresh_model("qwen3", layers=1)
    method = SimpleNamespace(value=config.get("quant_method"))
    model.config.quantization_config = SimpleNamespace(quant_method=method, to_dict=lambda: config)
    reason = shared_scales(model)
    assert (reason is None) == (said is None)
    assert said is None or said in str(reason)


def test_configs_of_transformers_itself_are_read():
    """The objects that a call of `from_pretrained` is given."""
    model = fresh_model("qwen3", layers=1)
    for config, said in (
        (BitsAndBytesConfig(load_in_8bit=True), True),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), False),
        (BitsAndBytesConfig(load_in_4bit=True), False),
        (FineGrainedFP8Config(), False),
    ):
        model.config.quantization_config = config
        assert bool(shared_scales(model)) == said, config


def test_compressed_tensors_that_are_loaded_without_their_activations_differ_in_nothing():
    """Loaded with `dequantize=True`, or with transformers' own float8 kernels, which have a scale for each token."""
    config = compressed(dynamic=True, strategy="tensor")
    model = fresh_model("qwen3", layers=1)
    loaded = SimpleNamespace(quant_method="compressed-tensors", to_dict=lambda: config, dequantize=False)
    model.config.quantization_config = loaded
    assert shared_scales(model)
    model.hf_quantizer = SimpleNamespace(use_fp8_kernel=True)
    assert not shared_scales(model)
    model.hf_quantizer = None
    loaded.dequantize = True
    assert not shared_scales(model)


@pytest.mark.parametrize(
    ("options", "static", "said"),
    [
        ({"granularity": "PerTensor"}, {}, True),
        ({"granularity": "PerRow"}, {}, False),
        ({"granularity": "PerTensor"}, {"act_quant_scale": torch.ones(1)}, False),
        ({"use_dynamic_per_tensor_scale": True}, {}, True),
        (None, {}, False),
    ],
)
def test_weights_that_torchao_quantised_after_loading_are_read(options, static, said):
    """`torchao.quantization.quantize_` changes the weights and leaves the config alone."""
    model = fresh_model("qwen3", layers=1)
    weight = model.model.layers[0].mlp.up_proj.weight
    if options is not None:
        granularity = type(options.get("granularity", "PerRow"), (), {})()
        weight.act_quant_kwargs = SimpleNamespace(**(options | {"granularity": granularity}))
    for name, value in static.items():
        setattr(weight, name, value)
    assert bool(shared_scales(model)) == said


def test_every_method_of_the_installed_transformers_is_decided():
    """A new release brings a new method of quantisation: somebody reads its code, and enters it on one side."""
    methods = set(AUTO_QUANTIZATION_CONFIG_MAPPING)
    decided = INDEPENDENT | _BY_METHOD.keys() | {"bitsandbytes_8bit"}
    assert methods - {"bitsandbytes"} <= decided
    assert not INDEPENDENT & _BY_METHOD.keys()


def test_the_measured_rates_tell_a_shared_scale_from_rounding():
    """The stored results: only a shared scale changes texts in float64, for guesses and for batches alike."""
    results = Results.read(ROOT / "examples/benchmarks/results/quantised.json")
    differ: dict[tuple[str, str], int] = {}
    for one in results.measurements:
        assert one.agreement is not None
        key = (one.extra["scheme"], one.decoder.kind)
        differ[key] = differ.get(key, 0) + len(one.agreement.different)
    for decoder in ("jacobi_multiblock", "generate"):
        assert not differ["not quantised", decoder]
        assert not differ["a scale for each token, float64", decoder]
        shared = ("torch dynamic int8", "a scale for each tensor, float64", "LLM.int8, threshold 6, float64")
        assert min(differ[scheme, decoder] for scheme in shared) > differ["a scale for each token, float32", decoder]
