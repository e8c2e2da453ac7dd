"""The ways in which people call a model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, DynamicCache, StaticCache, pipeline

from jacobi_hf.decoding.loop import Decoder
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.integration.forward import ModelForward
from tests.helpers.cases import Case, differences
from tests.helpers.models import TINY, VOCAB, fresh_model, tiny_model
from tests.helpers.tiny import CHECKPOINT

KNOBS = {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant", "jacobi_block_size": 4}


def same(model, inputs, **arguments):
    torch.manual_seed(0)
    reference = model.generate(**inputs, **arguments)
    torch.manual_seed(0)
    output = model.generate(**inputs, **arguments, **KNOBS)
    assert torch.equal(reference, output)
    return output


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32), AutoTokenizer.from_pretrained(
        CHECKPOINT
    )


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(context, model, prompt):
    with context():
        same(model, prompt, max_new_tokens=9)


@pytest.mark.parametrize("cache", [None, "static", "dynamic"])
def test_cache_implementations(cache, any_model, prompt):
    same(any_model, prompt, max_new_tokens=20, cache_implementation=cache)
    output = any_model.generate(
        **prompt, max_new_tokens=20, cache_implementation=cache, return_dict_in_generate=True, **KNOBS
    )
    assert type(output[CACHE]) is (StaticCache if cache == "static" else DynamicCache)
    assert int(output[CACHE].get_seq_length()) == output.sequences.shape[1] - 1


def test_num_return_sequences(any_model, prompt):
    assert same(any_model, {**prompt, "do_sample": True}, num_return_sequences=3, max_new_tokens=12).shape[0] == 6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TINY)
def test_a_long_prompt_goes_in_by_parts(kind, attention, monkeypatch):
    """Rows that end in different parts, or at the end of one: tokens, scores and cache are those of one prefill."""
    monkeypatch.setattr(Decoder, "PREFILL_SLOTS", 4)
    monkeypatch.setattr(ModelForward, "needs_mask", lambda *_, **__: True)
    widths = []
    hook = tiny_model(kind).register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    case = Case(
        kind, attention, (2, 4, 9, 14), 0, VOCAB, KNOBS, {"max_new_tokens": 12, "do_sample": False}, returns_dict=True
    )
    assert differences(case) == []
    hook.remove()
    parts = widths.index(4)  # behind the one-go prefill of the reference and its single tokens
    assert widths[parts : parts + 4] == [4, 4, 4, 2]
    tiny_model(kind).set_attn_implementation("sdpa")


@pytest.mark.parametrize("with_ids", [False, True])
def test_inputs_embeds(any_model, prompt, with_ids):
    embeds = any_model.get_input_embeddings()(prompt["input_ids"])
    inputs = {**prompt, "inputs_embeds": embeds}
    if not with_ids:
        inputs.pop("input_ids")
    same(any_model, inputs, max_new_tokens=15)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "PREFILL_SLOTS", 4)
        patch.setattr(ModelForward, "needs_mask", lambda *_, **__: True)
        same(any_model, inputs, max_new_tokens=15)


def test_inputs_without_a_mask(any_model):
    same(any_model, {"inputs": torch.tensor([[5, 6, 7]])}, max_new_tokens=15, do_sample=False, pad_token_id=0)


def test_max_length_and_a_single_token(any_model, prompt):
    same(any_model, prompt, max_length=7)
    same(any_model, prompt, max_length=20)


def test_bf16_runs(prompt):
    model = fresh_model("qwen3").to(torch.bfloat16)
    assert model.generate(**prompt, max_new_tokens=20, **KNOBS).shape == (2, 26)


def test_autocast(any_model, prompt):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert any_model.generate(**prompt, max_new_tokens=12, **KNOBS).shape == (2, 18)


def test_int32_ids(model, prompt):
    same(model, {**prompt, "input_ids": prompt["input_ids"].int()}, max_new_tokens=9)


@pytest.mark.parametrize("sample", [False, True])
def test_an_lm_head_narrower_than_the_vocabulary(prompt, sample):
    model = fresh_model("qwen3")
    model.lm_head = torch.nn.Linear(32, 20, bias=False)
    same(model, {**prompt, "do_sample": sample}, max_new_tokens=20, repetition_penalty=1.3)


@pytest.mark.parametrize("arguments", [{}, {"no_repeat_ngram_size": 2}])
def test_sampling_from_nan_is_an_error_as_in_multinomial(prompt, arguments):
    model = fresh_model("qwen3")
    model.lm_head.weight.data.fill_(float("nan"))
    for knobs in ({}, KNOBS):
        with pytest.raises(RuntimeError, match="probability tensor"):
            model.generate(**{**prompt, "do_sample": True}, max_new_tokens=5, **arguments, **knobs)


def test_repetition_penalty_that_ignores_padding_of_embeddings(any_model, prompt):
    inputs = {**prompt, "inputs_embeds": any_model.get_input_embeddings()(prompt["input_ids"]).detach()}
    inputs.pop("input_ids")
    same(any_model, inputs, max_new_tokens=30, repetition_penalty=1.3)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_length_fall_back(rope, prompt):
    extra = (
        {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 12}
        if rope == "longrope"
        else {}
    )
    model = fresh_model("qwen3")
    config = type(model.config)(**{**model.config.to_dict(), "max_position_embeddings": 12})
    config.rope_parameters = {"rope_type": rope, "factor": 4.0, "rope_theta": 1e4, **extra}
    model = type(model)(config).eval()
    other = copy.deepcopy(model)  # the oldest releases keep the frequencies of a longer text
    with pytest.warns(UserWarning, match="frequencies depend on the length"):
        output = model.generate(**prompt, max_new_tokens=20, **KNOBS)
    assert torch.equal(output, other.generate(**prompt, max_new_tokens=20))


def test_recurrent_layers_fall_back(prompt, monkeypatch):
    """Some releases have classes whose layers keep the state of a recurrence, and a config that names none of them."""
    model = fresh_model("qwen3")
    expected = model.generate(**prompt, max_new_tokens=4)
    monkeypatch.setattr(type(model), "_is_stateful", True)
    with pytest.warns(UserWarning, match="recurrent layers"):
        output = model.generate(**prompt, max_new_tokens=4, **KNOBS)
    assert torch.equal(output, expected)


def test_training_with_gradient_checkpointing_falls_back(prompt):
    model = fresh_model("qwen3").train()
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="gradient checkpointing"):
        model.generate(**prompt, max_new_tokens=4, **KNOBS)


def test_peft_lora_attached_and_merged(prompt):
    peft = pytest.importorskip("peft")
    model = fresh_model("qwen3")
    plain = model.generate(**prompt, max_new_tokens=20)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    output = same(adapted, prompt, max_new_tokens=20)
    assert not torch.equal(output, plain)
    merged = adapted.merge_and_unload()
    assert torch.equal(same(merged, prompt, max_new_tokens=20), output)


def test_prompt_learning_falls_back(prompt):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(fresh_model("qwen3"), config).eval()
    reference = model.generate(**prompt, max_new_tokens=8)
    with pytest.warns(UserWarning, match="decoding ordinarily"):
        assert torch.equal(model.generate(**prompt, max_new_tokens=8, **KNOBS), reference)


def test_accelerate_hooks(tmp_path, prompt):
    """A device map makes accelerate hook every module, and offload to disk move weights in and out."""
    model = fresh_model("qwen3")
    reference = model.generate(**prompt, max_new_tokens=12)
    model.save_pretrained(tmp_path / "model")
    hooked = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto", dtype=torch.float32)
    assert torch.equal(hooked.generate(**prompt, max_new_tokens=12, **KNOBS), reference)
    on_disk = {"model.layers.1", "model.layers.2"}
    parts = [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(3)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    spread = {part: "disk" if part in on_disk else "cpu" for part in parts}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=spread, offload_folder=str(tmp_path / "off"), dtype=torch.float32
    )
    assert torch.equal(offloaded.generate(**prompt, max_new_tokens=12, **KNOBS), reference)


def test_a_model_in_stages(tmp_path, prompt):
    """Some layers in memory and some on disk, with accelerate's hooks: the same tokens, in uncompiled steps."""
    model = fresh_model("qwen3")
    model.save_pretrained(tmp_path / "model")
    stages = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "disk",
        "lm_head": "disk",
    }
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=stages, offload_folder=str(tmp_path / "off"), dtype=torch.float32
    )
    for arguments in ({}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}):
        inputs = {**prompt, **arguments}
        torch.manual_seed(0)
        reference = model.generate(**inputs, max_new_tokens=12)
        torch.manual_seed(0)
        assert torch.equal(spread.generate(**inputs, max_new_tokens=12, **KNOBS), reference)
    with pytest.warns(UserWarning, match="compile_config is ignored: the model is spread over several devices"):
        output = spread.generate(
            **prompt, max_new_tokens=12, return_dict_in_generate=True, compile_config=CompileConfig(), **KNOBS
        )
    assert output.jacobi_stats.compiled_steps == 0
    assert torch.equal(output.sequences, model.generate(**prompt, max_new_tokens=12))


def test_a_device_map_on_one_device_says_why_it_is_not_compiled(tmp_path, prompt):
    fresh_model("qwen3").save_pretrained(tmp_path)
    hooked = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", dtype=torch.float32)
    dispatch_model(hooked, {"": "cpu"}, force_hooks=True)
    with pytest.warns(UserWarning, match="compile_config is ignored: a module of the model has hooks"):
        output = hooked.generate(**prompt, max_new_tokens=12, compile_config=CompileConfig(), **KNOBS)
    assert torch.equal(output, hooked.generate(**prompt, max_new_tokens=12))


def test_compiled_wrapper_delegates(prompt):
    model = tiny_model("qwen3")
    wrapper = torch.compile(model, backend="eager")
    assert torch.equal(
        wrapper.generate(**prompt, max_new_tokens=6, **KNOBS), model.generate(**prompt, max_new_tokens=6)
    )


@pytest.mark.parametrize("sample", [False, True])
def test_pipeline(tiny, sample):
    model, tokenizer = tiny
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["def main(", "Question: Ben has 4 apples and buys 3 more. How many apples does Ben have now?\nAnswer:"]
    texts = []
    for knobs in ({}, {"decoding": "jacobi_multiblock"}):
        torch.manual_seed(0)
        texts.append(pipe(prompts, batch_size=2, max_new_tokens=24, do_sample=sample, **knobs))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("sample", [False, True])
def test_the_trained_model(tiny, sample):
    model, tokenizer = tiny
    inputs = tokenizer(
        ["class Queue:\n    def put(", "Return the"], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    same(model, inputs, max_new_tokens=48, do_sample=sample)
    knobs = {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant"}
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False, return_dict_in_generate=True, **knobs)
    assert output.jacobi_stats.mean_tokens_per_forward > 1


def test_synced_gpus_runs_idle_forwards_until_the_peers_are_done(prompt, monkeypatch):
    """With peers that need three more rounds, a rank that is done goes on calling the model and changes nothing."""
    model, calls = fresh_model("qwen3"), []
    reference = model.generate(**prompt, max_new_tokens=6)
    peers = iter([True] * 3 + [False])

    def unfinished(self, done, synced, device=None):
        return next(peers) if done else True

    monkeypatch.setattr(type(model), "_has_unfinished_sequences", unfinished)
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    output = model.generate(**prompt, max_new_tokens=6, synced_gpus=True, return_dict_in_generate=True, **KNOBS)
    hook.remove()
    assert torch.equal(output.sequences, reference)
    assert len(calls) == output.jacobi_stats.forwards + 3


@pytest.mark.slow
@pytest.mark.serial
def test_a_model_split_over_two_processes(tmp_path):
    """Tensor parallelism (gloo): the same tokens, and steps are not compiled."""
    script, out = Path(__file__).parents[1] / "helpers" / "tensor_parallel.py", tmp_path / "report.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, script, str(CHECKPOINT), str(out)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text(encoding="utf-8"))
    assert (report["processes"], report["equal"]) == (2, True)
    assert report["forwards"] < 30
    assert "split over several processes" in report["warned"][0]
