from __future__ import annotations

import gc
import json
import threading
import weakref

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompileConfig

import jacobi_hf
from jacobi_hf.decoding.cache import BOUND, JacobiStaticCache
from jacobi_hf.decoding.layout import build_layout
from jacobi_hf.decoding.shapes import VerifyWidth
from jacobi_hf.decoding.step import ForwardInputs
from jacobi_hf.drafts.loading import attach, drafter_of, using
from jacobi_hf.drafts.lora import LoraDrafter
from jacobi_hf.drafts.lora_format import CONFIG_FILE, EMBEDDING, WEIGHTS_FILE, DrafterError, linear_layers
from jacobi_hf.drafts.lora_source import LoraDraftSource
from jacobi_hf.drafts.sources import Sources
from jacobi_hf.integration.forward import ModelForward
from tests.helpers.cases import Case, cases, check_thousands, differences
from tests.helpers.drafters import drafting, random_drafter
from tests.helpers.models import OTHERS, TINY, VOCAB, fresh_model, tiny_model
from tests.helpers.schedules import let_the_host_lag

WINDOW = {
    "decoding": "jacobi_multiblock",
    "jacobi_schedule": "constant",
    "jacobi_block_size": 4,
    "jacobi_pool_size": 0,
    "jacobi_lookup_tokens": 0,
}
IDS = torch.tensor([[3, 4, 5, 3, 4]])


def drafted_cases():
    """Return cases with a seed and a scale for the drafter; some have a verify width."""

    def with_width(case: Case, share: float | None) -> Case:
        knobs = case.knobs
        width = knobs["jacobi_block_size"] * knobs.get("jacobi_max_blocks", 1)
        if share is None or knobs["decoding"] == "jacobi" or not width:
            return case
        return Case(**{**vars(case), "knobs": {**knobs, "jacobi_verify_width": max(1, round(share * width))}})

    cases_with_width = st.builds(with_width, cases(), st.sampled_from([None, 0.0, 0.3, 1.0]))
    return st.tuples(cases_with_width, st.integers(0, 10**6), st.sampled_from([0.03, 0.3, 3.0, 1e3, 1e18]))


@hypothesis.given(drawn=drafted_cases())
def test_the_text_is_the_models_own_whatever_the_drafter_holds(drawn) -> None:
    case, seed, scale = drawn
    model = tiny_model(case.kind)
    with drafting(model, random_drafter(model, seed, scale)):
        assert differences(case) == []


@pytest.mark.deep
def test_the_text_is_the_models_own_in_thousands_of_cases() -> None:
    def drafted(drawn):
        model = tiny_model(drawn[0].kind)
        return drafting(model, random_drafter(model, *drawn[1:]))

    check_thousands(drafted_cases(), lambda drawn: drawn[0], drafted, "cases with random drafters")


@pytest.mark.parametrize("kind", OTHERS)
def test_other_registered_classes(kind):
    model = fresh_model(kind)
    jacobi_hf.register(type(model))
    try:
        with drafting(model, random_drafter(model)):
            arguments = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(model.generate(IDS, **arguments), model.generate(IDS, **arguments, **WINDOW))
    finally:
        jacobi_hf.unregister(type(model))


def forward_with(model, cache, drafter):
    sources = Sources([LoraDraftSource(jacobi_hf.JacobiConfig(), drafter)])
    return ModelForward(model, cache, sources, torch.tensor(40))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TINY)
def test_no_drafter_changes_a_verified_slot(kind, attention):
    """Verified slots are bit-equal under a zero drafter, a random one, and drafters that make Inf or NaN."""
    model = fresh_model(kind)
    model.set_attn_implementation(attention)
    layout = build_layout((3, 2), torch.device("cpu"), 4)
    token_BQ = torch.randint(1, VOCAB, (2, layout.slots), generator=torch.Generator().manual_seed(0))
    endless = random_drafter(model, 1, 1e30)
    broken = random_drafter(model, 1)
    with torch.no_grad():
        broken.embedding.fill_(float("nan"))
    verified = []
    drafted = []
    for drafter in (
        LoraDrafter.new(model, r=4).requires_grad_(requires_grad=False),
        random_drafter(model, 1),
        endless,
        broken,
    ):
        cache = JacobiStaticCache(model.config, 2, 40, torch.device("cpu"))
        forward = forward_with(model, cache, drafter)
        with torch.no_grad(), drafter.attached(model):
            prompt = build_layout((7,), torch.device("cpu"))
            forward(ForwardInputs(prompt, cache.columns(8, 0), torch.arange(16).view(2, 8) % VOCAB))
            cache.commit(torch.tensor([8, 5]))
            logits_BQV = forward(ForwardInputs(layout, cache.columns(layout.slots, 8), token_BQ)).logits_BQV
        verified.append(logits_BQV[:, : -layout.draft_slots])
        drafted.append(logits_BQV[:, -layout.draft_slots :])
    assert all(torch.equal(verified[0], other) for other in verified[1:])
    assert bool(verified[0].isfinite().all())
    assert not torch.equal(drafted[0], drafted[1])
    assert bool((drafted[3] == 0).all())  # NaN is made finite, so that no processor fails on it


def test_the_gate_leaves_other_rows_bit_identical():
    model, ids = fresh_model("qwen3"), torch.randint(1, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    drafter, layers, seen = random_drafter(model), linear_layers(model), {}
    probe = layers["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        base = model.model.embed_tokens(ids), probe(model.model.embed_tokens(ids))
        with drafter.attached(model):
            assert torch.equal(base[0], model.model.embed_tokens(ids))
            with drafter.drafting(4, 7, 2):
                embedded = model.model.embed_tokens(ids)
                seen["embedded"], seen["projected"] = embedded, probe(base[0])
        assert torch.equal(base[0], model.model.embed_tokens(ids))
    key = drafter.layers["model.layers.0.self_attn.q_proj"]
    delta = (base[0] @ drafter.lora_A[key].T @ drafter.lora_B[key].T) * drafter.scale
    for name, plain, change in (
        ("embedded", base[0], drafter.embedding.expand_as(base[0])),
        ("projected", base[1], delta),
    ):
        assert torch.equal(seen[name][:, :4], plain[:, :4])
        torch.testing.assert_close(seen[name][:, 4:], (plain + change)[:, 4:], atol=1e-5, rtol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_base_weights_and_ordinary_calls_are_untouched():
    model = fresh_model("qwen3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference = model.generate(IDS, max_new_tokens=10, do_sample=False, pad_token_id=0)
    with drafting(model, random_drafter(model)):
        model.generate(IDS, max_new_tokens=10, do_sample=False, pad_token_id=0, **WINDOW)
        assert torch.equal(reference, model.generate(IDS, max_new_tokens=10, do_sample=False, pad_token_id=0))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_calls_in_other_threads_are_not_drafted():
    model = fresh_model("qwen3")
    ids = torch.randint(1, VOCAB, (4, 6), generator=torch.Generator().manual_seed(1))
    alone = [model.generate(row[None], max_new_tokens=30, do_sample=False, pad_token_id=0) for row in ids]
    outputs = [None] * 4

    def decode(number):
        knobs = WINDOW if number % 2 else {}
        outputs[number] = model.generate(
            ids[number][None], max_new_tokens=30, do_sample=False, pad_token_id=0, **knobs
        )

    with drafting(model, random_drafter(model)):
        threads = [threading.Thread(target=decode, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, outputs, strict=True))


@pytest.mark.slow
def test_compiled_steps():
    model, ids = fresh_model("qwen3"), torch.randint(1, 6, (2, 7), generator=torch.Generator().manual_seed(0))
    arguments = {
        "max_new_tokens": 24,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "jacobi_verify_width": 4,
        "attention_mask": torch.ones_like(ids),
        **WINDOW,
    }
    with drafting(model, random_drafter(model, scale=0.3)):
        plain = model.generate(ids, **arguments)
        compiled = model.generate(ids, **arguments, compile_config=CompileConfig(backend="aot_eager", mode=None))
    assert compiled.jacobi_stats.compiled_steps > 0
    assert torch.equal(plain.sequences, compiled.sequences)
    first, second = plain.jacobi_stats, compiled.jacobi_stats
    assert (first.forwards, first.accepted_lengths, first.accepted) == (
        second.forwards,
        second.accepted_lengths,
        second.accepted,
    )


def test_verify_width_and_statistics():
    model = fresh_model("qwen3")
    arguments = {
        "max_new_tokens": 30,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        **WINDOW,
    }
    with drafting(model, random_drafter(model)):
        narrow = model.generate(IDS, **arguments, jacobi_verify_width=2).jacobi_stats
        whole = model.generate(IDS, **arguments, jacobi_verify_width=8).jacobi_stats
    assert max(narrow.accepted_lengths) <= 3
    assert narrow.verified < narrow.drafted
    assert whole.verified == whole.drafted
    assert max(narrow.slots_by_width) <= 1 + 2 + 8
    assert whole.window_acceptance == whole.accepted / whole.verified


def test_save_load_and_unload(tmp_path):
    model = fresh_model("qwen3")
    drafter = random_drafter(model)
    drafter.save_pretrained(tmp_path / "drafter", torch.float32)
    assert sorted(p.name for p in (tmp_path / "drafter").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    jacobi_hf.load_drafter(model, tmp_path / "drafter", "first")
    loaded = drafter_of(model)
    assert drafter.weights().keys() == loaded.weights().keys()
    assert all(torch.equal(value, loaded.weights()[name]) for name, value in drafter.weights().items())
    jacobi_hf.load_drafter(model, tmp_path / "drafter", "second")
    assert drafter_of(model) is not loaded
    jacobi_hf.set_drafter(model, "first")
    assert drafter_of(model) is loaded
    jacobi_hf.set_drafter(model, None)
    assert drafter_of(model) is None
    jacobi_hf.unload_drafter(model, "first")
    with pytest.raises(DrafterError, match="no drafter named 'first' is loaded; there is 'second'"):
        jacobi_hf.set_drafter(model, "first")
    jacobi_hf.unload_drafter(model)
    drafter.save_pretrained(tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / WEIGHTS_FILE).values()} == {torch.bfloat16}


def test_a_folder_with_model_and_drafter_loads_as_the_plain_model(tmp_path):
    model = fresh_model("qwen3")
    model.save_pretrained(tmp_path)
    random_drafter(model, scale=10).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_under_an_adapter_of_pefts():
    """A LoRA adapter of the model is part of the model that verifies."""
    model = get_peft_model(
        fresh_model("qwen3"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    with drafting(model, random_drafter(model.get_base_model())):
        arguments = {"input_ids": IDS, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        output = model.generate(**arguments, **WINDOW, return_dict_in_generate=True)
        assert output.jacobi_stats.drafted > 0
        assert torch.equal(model.generate(**arguments), output.sequences)


class TestBadInput:
    def test_no_drafter_or_an_ordinary_lora(self, tmp_path):
        model = fresh_model("qwen3")
        with pytest.raises(DrafterError, match="is no folder"):
            jacobi_hf.load_drafter(model, tmp_path / "missing")
        with pytest.raises(DrafterError, match=f"has no {CONFIG_FILE}"):
            jacobi_hf.load_drafter(model, tmp_path)
        get_peft_model(fresh_model("qwen3"), LoraConfig(r=2)).save_pretrained(tmp_path)
        with pytest.raises(DrafterError, match="holds an ordinary adapter, which would act on every position"):
            jacobi_hf.load_drafter(model, tmp_path)
        assert drafter_of(model) is None

    def test_another_model(self, tmp_path):
        random_drafter(fresh_model("qwen3")).save_pretrained(tmp_path)
        with pytest.raises(DrafterError, match="whose model_type is 'qwen3'; this model's is 'qwen2'"):
            jacobi_hf.load_drafter(fresh_model("qwen2"), tmp_path)
        config = json.loads((tmp_path / CONFIG_FILE).read_text())
        for name, value in (("hidden_size", 64), ("vocab_size", 99), ("num_hidden_layers", 2)):
            (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, name: value}))
            with pytest.raises(DrafterError, match=f"{name} is {value}|has shape"):
                jacobi_hf.load_drafter(fresh_model("qwen3"), tmp_path)
        (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "base_revision": "abc"}))
        model = fresh_model("qwen3")
        model.config._commit_hash = "def"
        with pytest.raises(DrafterError, match="at revision abc; this model is at def"):
            jacobi_hf.load_drafter(model, tmp_path)

    def test_other_layers(self, tmp_path):
        model = fresh_model("qwen3")
        random_drafter(model).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS_FILE)
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        save_file({**tensors, key.format("A"): torch.zeros(4, 33)}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(
            DrafterError,
            match=r"a layer model.layers.0.self_attn.q_proj of \(33, 32\) features; this model has \(32, 32\)",
        ):
            jacobi_hf.load_drafter(model, tmp_path)
        save_file({k: v for k, v in tensors.items() if k != key.format("B")}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(DrafterError, match="has no counterpart"):
            jacobi_hf.load_drafter(model, tmp_path)

    def test_damaged_pickled_or_not_finite(self, tmp_path):
        model = fresh_model("qwen3")
        random_drafter(model).save_pretrained(tmp_path)
        whole = (tmp_path / WEIGHTS_FILE).read_bytes()
        for damaged in (whole[:-10], b"", b"\x80\x04pickle" * 30):
            (tmp_path / WEIGHTS_FILE).write_bytes(damaged)
            with pytest.raises(DrafterError, match=f"{WEIGHTS_FILE} is damaged"):
                jacobi_hf.load_drafter(model, tmp_path)
        for value in ("nan", "inf"):
            (tmp_path / WEIGHTS_FILE).write_bytes(whole)
            tensors = load_file(tmp_path / WEIGHTS_FILE)
            tensors[EMBEDDING][3] = float(value)
            save_file(tensors, tmp_path / WEIGHTS_FILE)
            with pytest.raises(DrafterError, match=f"{EMBEDDING} holds NaN or Inf"):
                jacobi_hf.load_drafter(model, tmp_path)
        (tmp_path / WEIGHTS_FILE).unlink()
        torch.save({}, tmp_path / "drafter_model.bin")
        with pytest.raises(DrafterError, match=r"drafter_model.bin is pickled, which is never read"):
            jacobi_hf.load_drafter(model, tmp_path)
        (tmp_path / CONFIG_FILE).write_text("{")
        with pytest.raises(DrafterError, match=f"{CONFIG_FILE} is damaged"):
            jacobi_hf.load_drafter(model, tmp_path)
        assert drafter_of(model) is None

    def test_twice_and_while_it_drafts(self, tmp_path):
        model = fresh_model("qwen3")
        random_drafter(model).save_pretrained(tmp_path)
        jacobi_hf.load_drafter(model, tmp_path)
        with pytest.raises(DrafterError, match="a drafter named 'default' is loaded already"):
            jacobi_hf.load_drafter(model, tmp_path)
        errors = []

        def unload(*_):
            with pytest.raises(DrafterError, match="a call of generate is drafting with 'default'") as error:
                jacobi_hf.unload_drafter(model)
            errors.append(error)

        handle = model.model.layers[0].register_forward_pre_hook(unload)
        model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, **WINDOW)
        handle.remove()
        assert errors
        jacobi_hf.unload_drafter(model)

    def test_merging_is_refused(self):
        with pytest.raises(DrafterError, match="cannot be merged"):
            LoraDrafter.new(fresh_model("qwen3")).merge_and_unload()

    def test_knobs(self):
        model = fresh_model("qwen3")
        with pytest.raises(ValueError, match="jacobi_verify_width is for drafters, and none is in use"):
            model.generate(IDS, max_new_tokens=5, **WINDOW, jacobi_verify_width=2)
        with (
            drafting(model, random_drafter(model)),
            pytest.raises(ValueError, match="jacobi_verify_width=9 is more than the window's 8"),
        ):
            model.generate(IDS, max_new_tokens=5, **WINDOW, jacobi_verify_width=9)

    def test_target_modules(self):
        with pytest.raises(DrafterError, match="target_modules lm_head are no linear layers"):
            LoraDrafter.new(fresh_model("qwen3"), target_modules=["q_proj", "lm_head"])


def test_states_are_held_to_a_bound_in_the_cache():
    """Keys and values of draft slots are finite, whatever the drafter computed."""
    model = fresh_model("qwen3")
    drafter = random_drafter(model, scale=1e30)
    cache = JacobiStaticCache(model.config, 1, 20, torch.device("cpu"))
    layout = build_layout((2,), torch.device("cpu"), 2)
    with torch.no_grad(), drafter.attached(model):
        forward = forward_with(model, cache, drafter)
        forward(ForwardInputs(layout, cache.columns(5, 0), torch.arange(5)[None]))
    for layer in cache.layers:
        assert layer.keys.abs().max() <= BOUND
        assert layer.values.abs().max() <= BOUND


def test_what_is_kept_goes_with_the_model():
    model = fresh_model("qwen3")
    attach(model, random_drafter(model))
    model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, **WINDOW)
    drafter = weakref.ref(drafter_of(model))
    del model
    gc.collect()
    assert drafter() is None


def test_a_drafter_for_a_while():
    model = fresh_model("qwen3")
    attach(model, random_drafter(model), "own")
    own = drafter_of(model)
    with using(model, random_drafter(model, 1)):
        assert drafter_of(model) is not own
    assert drafter_of(model) is own
    jacobi_hf.unload_drafter(model)
    jacobi_hf.unload_drafter(model)  # nothing is left, and that is no error


def test_a_host_that_lags(monkeypatch):
    """The next step is launched before the host knows the report of the last one, as on CUDA."""
    model, ids = fresh_model("qwen3"), torch.randint(1, VOCAB, (2, 6), generator=torch.Generator().manual_seed(2))
    arguments = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 25,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": [4],
    }
    expected = model.generate(ids, **arguments)
    let_the_host_lag(monkeypatch)
    with drafting(model, random_drafter(model)):
        for knobs in (
            WINDOW,
            {**WINDOW, "jacobi_topk_branches": 8},
            {"decoding": "jacobi_multiblock"},
            {"decoding": "jacobi"},
        ):
            assert torch.equal(model.generate(ids, **arguments, **knobs), expected)


def test_the_verify_width_follows_what_is_accepted():
    verify = VerifyWidth(jacobi_hf.JacobiConfig(jacobi_block_size=8, jacobi_max_blocks=2))
    assert verify.width == 8
    for _ in range(60):
        verify.note(0)
    assert verify.width == 3
    for _ in range(60):
        verify.note(7)
    assert verify.width == 16
    assert VerifyWidth(jacobi_hf.JacobiConfig(jacobi_verify_width=5)).width == 5


def test_layers_that_are_gone():
    model = fresh_model("qwen3")
    attach(model, random_drafter(model))
    layers, model.model.layers = model.model.layers, model.model.layers[:2]
    with pytest.raises(DrafterError, match=r"the model has no layer model\.layers\.2"):
        model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, **WINDOW)
    model.model.layers = layers
    assert not any(module._forward_hooks for module in model.modules())
    jacobi_hf.unload_drafter(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0),
        ("r", "4"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "x"),
        ("target_modules", None),
        ("constant_draft", 10**9),
        ("constant_draft", -1),
        ("format_version", 2),
    ],
)
def test_a_config_that_cannot_be(tmp_path, name, value):
    random_drafter(fresh_model("qwen3")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, name: value}))
    with pytest.raises(DrafterError, match=f"{CONFIG_FILE}: .*{name}"):
        jacobi_hf.load_drafter(fresh_model("qwen3"), tmp_path)


def test_numbers_that_the_models_dtype_does_not_hold(tmp_path):
    drafter = random_drafter(fresh_model("qwen3"))
    drafter.embedding[0] = 1e30
    drafter.save_pretrained(tmp_path)
    with pytest.raises(DrafterError, match=r"not finite in the model's torch\.float16"):
        jacobi_hf.load_drafter(fresh_model("qwen3").to(torch.float16), tmp_path)


def test_a_layer_that_does_not_see_every_slot_is_refused():
    model, drafter = fresh_model("qwen3"), random_drafter(fresh_model("qwen3"))
    layer = linear_layers(model)["model.layers.0.self_attn.q_proj"]
    with (
        drafter.attached(model),
        drafter.drafting(2, 4, 3),
        pytest.raises(DrafterError, match="does not see every slot once"),
    ):
        layer(torch.randn(2, 4, 32))
