"""The verb `info`: the environment, and how a model would decode."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from transformers import GenerationConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen3Config, T5Config
from typer.testing import CliRunner

import jacobi_hf
from jacobi_hf.cli import app
from tests.helpers.models import tiny_model
from tests.helpers.tiny import EXAMPLE

run = CliRunner().invoke
FORCED, CHECKPOINT, DRAFTER = (str(EXAMPLE / name) for name in ("forced", "checkpoint", "drafter"))
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def document(*arguments):
    result = run(app, ["info", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_what_is_installed():
    told = document()
    assert told["versions"]["jacobi_hf"] == jacobi_hf.__version__
    assert {"Qwen2ForCausalLM", "Qwen3ForCausalLM"} <= set(told["registered"])
    assert (told["device"], told["model"]) == ("cpu", None)
    assert told["kernels"] == {"flex_attention": False, "flash-attn": False}
    text = run(app, ["info"]).stdout
    assert all(version in text for version in told["versions"].values())


def test_a_model_that_runs_is_described_without_its_weights(tmp_path):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).symlink_to(EXAMPLE / "forced" / name)
    told = document(str(tmp_path))["model"]
    assert (told["decoding"], told["reason"], told["model_class"], told["is_registered"]) == (
        "runs",
        None,
        "Qwen3ForCausalLM",
        True,
    )
    assert told["saved_knobs"]["decoding"] == "jacobi_multiblock"
    assert told["parameters"] == 5_771_264
    assert "decoding      runs" in run(app, ["info", str(tmp_path)]).stdout


def test_a_drafter_is_described_if_it_fits_the_model(tmp_path):
    told = document(CHECKPOINT, "--drafter", DRAFTER)["model"]
    assert told["drafter"]["rank"] >= 1
    Qwen3Config(**SIZES, vocab_size=8, head_dim=8).save_pretrained(tmp_path)
    result = run(app, ["info", str(tmp_path), "--drafter", DRAFTER])
    assert (result.exit_code, "the drafter was made for" in result.stderr) == (2, True)


REASONS = [
    ({}, {"prefill_chunk_size": 8}, "falls back", "prefill_chunk_size"),
    ({}, {"use_cache": False}, "falls back", "use_cache=False"),
    ({}, {"num_beams": 3}, "refused", "beam search"),
    ({}, {"num_beams": 3, "decoding": "jacobi_multiblock"}, "falls back", "beam search"),
    ({}, {"decoding": "jacobi", "jacobi_block_size": 1}, "refused", "from 2 to 1024"),
    ({}, {"decoding": "jacobi", "jacobi_blok_size": 4}, "refused", "did you mean 'jacobi_block_size'"),
    (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {},
        "falls back",
        "frequencies depend on the length",
    ),
]


@pytest.mark.parametrize(("config", "generation", "decoding", "reason"), REASONS)
def test_why_a_model_does_not_run(tmp_path, config, generation, decoding, reason):
    Qwen3Config(**SIZES, vocab_size=8, head_dim=8, **config).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    told = document(str(tmp_path))["model"]
    assert (told["decoding"], reason in str(told["reason"])) == (decoding, True), told["reason"]
    assert f"{decoding}: " in run(app, ["info", str(tmp_path)]).stdout


@pytest.mark.parametrize(
    ("name", "value"), [("prefill_chunk_size", 2), ("use_cache", False), ("guidance_scale", 1.5), (None, None)]
)
def test_info_and_generate_fall_back_for_the_same_reasons(tmp_path, recwarn, name, value):
    model = tiny_model("qwen3")
    model.config.save_pretrained(tmp_path)
    options = {"decoding": "jacobi", **({name: value} if name else {})}
    (tmp_path / "generation_config.json").write_text(json.dumps(options), encoding="utf-8")
    told = document(str(tmp_path))["model"]["decoding"]
    recwarn.clear()
    prompt = model.dummy_inputs["input_ids"][:1, :5] % 20 + 1
    model.generate(prompt, generation_config=GenerationConfig(**options, max_new_tokens=3, pad_token_id=0))
    fell_back = any("decoding ordinarily" in str(warning.message) for warning in recwarn)
    assert told == ("falls back" if fell_back else "runs")
    assert fell_back == (name is not None)


def test_classes_that_are_not_registered_or_cannot_be(tmp_path):
    LlamaConfig(**SIZES, vocab_size=8).save_pretrained(tmp_path / "llama")
    jacobi_hf.unregister(LlamaForCausalLM)
    told = document(str(tmp_path / "llama"))["model"]
    assert (told["decoding"], told["is_registered"]) == ("runs", False)
    assert "jacobi_hf.register(LlamaForCausalLM)" in run(app, ["info", str(tmp_path / "llama")]).stdout
    jacobi_hf.register_defaults()
    assert document(str(tmp_path / "llama"))["model"]["is_registered"]
    GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8).save_pretrained(tmp_path / "gpt2")
    assert document(str(tmp_path / "gpt2"))["model"]["model_class"] == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(EXAMPLE)], "without config.json"),
        (["nowhere/at/all"], "nowhere/at/all is no model: there is no such folder"),
        ([FORCED, "--drafter", "nowhere/at/all"], "nowhere/at/all"),
        (["--drafter", DRAFTER], "none is named"),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = run(app, ["info", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("jacobi-hf info: ")
    assert message in line


def test_other_models_than_causal_language_models_are_refused(tmp_path):
    T5Config().save_pretrained(tmp_path)
    result = run(app, ["info", str(tmp_path)])
    assert (result.exit_code, "its model_type is 't5'" in result.stderr) == (2, True)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert run(app, ["info", str(tmp_path)]).exit_code == 2


def test_packages_that_an_extra_lacks_are_named(monkeypatch):
    def version(name):
        if name in ("fastapi", "gradio"):
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    installed = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    lacking = document()["extras"]
    assert "fastapi" in lacking["serve"]
    assert "fastapi" not in lacking["eval"]
    assert f"pip install 'jacobi-hf[serve]' adds {', '.join(lacking['serve'])}" in run(app, ["info"]).stdout
