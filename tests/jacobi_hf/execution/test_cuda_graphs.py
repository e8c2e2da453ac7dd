"""Steps as CUDA graphs. A tape does on the CPU what a CUDA graph does on a GPU (see `tapes.py`)."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList

import jacobi_hf
from jacobi_hf import JacobiConfig
from jacobi_hf.drafts.sources import sources_of
from jacobi_hf.execution import cuda_graphs
from jacobi_hf.execution.base import WholeSteps
from jacobi_hf.execution.buffers import CallBuffers
from jacobi_hf.execution.choose import execution_for
from jacobi_hf.execution.compiled import Compiled
from jacobi_hf.execution.cuda_graphs import CudaGraphSteps
from jacobi_hf.execution.kept import kept_for
from jacobi_hf.integration.compat import CACHE
from tests.helpers.calls import BOTH, CALLS, SETTINGS, counts, generate, prompt
from tests.helpers.models import VOCAB, fresh_model, tiny_model
from tests.helpers.schedules import let_the_host_lag
from tests.helpers.tapes import TapeGraphs

GRAPHS = CompileConfig(backend="cudagraphs")


@pytest.fixture(autouse=True)
def _tapes(monkeypatch):
    monkeypatch.setitem(cuda_graphs.GRAPHS, "cpu", TapeGraphs)
    yield
    for kind in ("qwen2", "qwen3", "qwen2-sliding"):
        jacobi_hf.clear_graphs(tiny_model(kind))


def assert_same(plain, other, *, lag=0):
    assert torch.equal(plain.sequences, other.sequences)
    (forwards, *rest), (other_forwards, *other_rest) = counts(plain.jacobi_stats), counts(other.jacobi_stats)
    assert rest == other_rest
    # Wider steps have a row's pads sooner.
    assert other_forwards == forwards + lag or (other_forwards < forwards + lag and len(set(rest[0])) > 1)
    for a, b in zip(plain[CACHE].layers, other[CACHE].layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "setting", "call", "lag"),
    [
        ("qwen3", "window", "greedy", 0),
        ("qwen2-sliding", "both", "sampled", 0),
        ("qwen2-sliding", "both", "ends", 0),
        ("qwen3", "late blocks", "sampled", 1),
        ("qwen2-sliding", "both", "greedy", 1),
        ("qwen2", "jacobi", "ends", 1),
        ("qwen3", "lookup alone", "ends", 1),
    ],
)
def test_recorded_steps_give_the_same_tokens_statistics_and_cache(kind, setting, call, lag, monkeypatch):
    """Call after call over the same buffers and graphs; texts, lengths, values and noise change."""
    model, recorded = tiny_model(kind), []
    for number in (0, 3, 1, 2, 2, 2, 2):
        ids = prompt(2, 3 + 5 * number % 7, seed=number)
        arguments = {**SETTINGS[setting], **CALLS[call], "max_new_tokens": (24, 24, 40, 9)[number]}
        if call == "sampled":
            arguments |= {"temperature": 0.5 + number / 5, "repetition_penalty": 1.1 + number / 10}
        elif call == "ends":
            arguments["eos_token_id"] = [e + number for e in arguments["eos_token_id"]]
        plain = generate(model, ids, **arguments)
        with monkeypatch.context() as patched:
            let_the_host_lag(patched, lags=lag)
            recorded_call = generate(model, ids, **arguments, compile_config=GRAPHS)
        assert_same(plain, recorded_call, lag=lag if plain.jacobi_stats.forwards > 1 else 0)
        recorded.append(recorded_call.jacobi_stats.cuda_graphs)
        assert recorded_call.jacobi_stats.compiled_steps == 0
    assert sum(recorded) > 0
    assert recorded[-1] == 0  # all that this call needs has run before, and then been recorded


def test_other_lengths_and_values_record_nothing():
    model, total, kinds = tiny_model("qwen3"), 0, set()
    before = TapeGraphs.replayed
    for number in range(12):
        ids = prompt(1, 1 + 7 * number % 40, seed=number)
        values = {
            "temperature": 0.51 + number / 20,
            "top_p": 0.95 - number / 100,
            "min_p": 0.01 + number / 500,
            "typical_p": 0.9 - number / 90,
        }
        arguments = {
            **SETTINGS["window"],
            "do_sample": True,
            "top_k": 5,
            **values,
            "max_new_tokens": 1 + 11 * number % 90,
        }
        recorded_call = generate(model, ids, **arguments, compile_config=GRAPHS)
        assert torch.equal(recorded_call.sequences, generate(model, ids, **arguments).sequences)
        kinds |= set(recorded_call.jacobi_stats.slots_by_width)
        total += recorded_call.jacobi_stats.cuda_graphs
        assert len(kept_for(model).buffers) == 1
    assert total <= len(kinds)
    assert TapeGraphs.replayed - before > 5 * total


def test_a_recording_is_never_replayed_for_another_model():
    first, second, ids = fresh_model("qwen3"), fresh_model("qwen3", seed=1), prompt(1, 5)
    arguments = {"do_sample": False, **BOTH}
    for model in (first, second, first, second):
        assert_same(generate(model, ids, **arguments), generate(model, ids, **arguments, compile_config=GRAPHS))


@pytest.mark.parametrize("change", ["weights moved", "adapter", "attention", "window"])
def test_a_recording_is_not_replayed_when_the_model_has_become_another(change):
    kind = "qwen3-sliding" if change == "window" else "qwen3"
    model, ids, arguments = fresh_model(kind), prompt(1, 12), {"do_sample": False, **SETTINGS["window"]}
    for _ in range(3):
        before = generate(model, ids, **arguments, compile_config=GRAPHS)
    assert before.jacobi_stats.cuda_graphs == 0
    if change == "weights moved":
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.3
    elif change == "window":
        model.config.sliding_window = 2
    elif change == "attention":
        model.set_attn_implementation("eager")
    else:
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        assert_same(generate(adapted, ids, **arguments), generate(adapted, ids, **arguments, compile_config=GRAPHS))
        with adapted.disable_adapter():
            assert_same(before, generate(adapted, ids, **arguments, compile_config=GRAPHS))
    for _ in range(2):
        assert_same(generate(model, ids, **arguments), generate(model, ids, **arguments, compile_config=GRAPHS))


class Within(StoppingCriteria):
    """Never stops; in its third call something else is done."""

    def __init__(self, work):
        self.calls, self.work = 0, work

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        if self.calls == 3:
            self.work()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_calls_that_overlap_share_no_buffers():
    model, ids, others = tiny_model("qwen3"), prompt(2, 5), prompt(2, 9, seed=1)
    arguments = {"do_sample": False, **BOTH}
    plain, plain_inner, inner = generate(model, ids, **arguments), generate(model, others, **arguments), []
    for _ in range(3):
        criterion = Within(lambda: inner.append(generate(model, others, **arguments, compile_config=GRAPHS)))
        output = generate(
            model, ids, **arguments, compile_config=GRAPHS, stopping_criteria=StoppingCriteriaList([criterion])
        )
        assert_same(plain, output)
        assert_same(plain_inner, inner[-1])
    assert len(kept_for(model).buffers) == 2


def test_what_is_handed_out_is_the_callers():
    model, ids, arguments = tiny_model("qwen3"), prompt(2, 5), {"do_sample": False, **BOTH}
    output = generate(model, ids, **arguments, compile_config=GRAPHS)
    sequences, keys = output.sequences.clone(), [layer.keys.clone() for layer in output[CACHE].layers]
    generate(model, prompt(2, 5, seed=3), **arguments, compile_config=GRAPHS)
    jacobi_hf.clear_graphs(model)
    assert torch.equal(output.sequences, sequences)
    assert all(torch.equal(layer.keys, before) for layer, before in zip(output[CACHE].layers, keys, strict=True))


def test_a_conversation_goes_on_in_recorded_steps():
    model, caches = tiny_model("qwen3"), [None, None]
    texts = [prompt(1, 4, alphabet=VOCAB)] * 2
    for turn in range(4):
        for number, options in enumerate(({}, {"compile_config": GRAPHS})):
            cache = {} if caches[number] is None else {CACHE: caches[number]}
            output = generate(model, texts[number], do_sample=False, **BOTH, **options, **cache, max_new_tokens=11)
            caches[number] = output[CACHE]
            texts[number] = torch.cat([output.sequences, prompt(1, 3, seed=turn, alphabet=VOCAB)], 1)
        assert torch.equal(*texts)


def test_buffers_of_a_call_that_failed_are_not_used_again():
    model, ids, arguments = tiny_model("qwen3"), prompt(1, 5), {"do_sample": False, **BOTH, "compile_config": GRAPHS}

    def fail():
        raise KeyError("within")

    generate(model, ids, **arguments)
    assert len(kept_for(model).buffers) == 1
    with pytest.raises(KeyError, match="within"):
        generate(model, ids, **arguments, stopping_criteria=StoppingCriteriaList([Within(fail)]))
    assert not kept_for(model).buffers


def test_a_nan_of_an_earlier_call_is_not_met_again():
    model, ids, arguments = fresh_model("qwen3"), prompt(1, 30), {"do_sample": False, **SETTINGS["window"]}
    plain, weight = generate(model, ids[:, :3], **arguments), model.model.layers[0].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
        generate(model, ids, **arguments, compile_config=GRAPHS)
        weight.copy_(kept)
    assert_same(plain, generate(model, ids[:, :3], **arguments, compile_config=GRAPHS))


def test_inference_mode_has_buffers_of_its_own():
    model, ids, arguments = tiny_model("qwen3"), prompt(1, 5), {"do_sample": False, **BOTH}
    plain = generate(model, ids, **arguments)
    with torch.inference_mode():
        generate(model, ids, **arguments, compile_config=GRAPHS)
    assert_same(plain, generate(model, ids, **arguments, compile_config=GRAPHS))


def test_recordings_go_with_the_model():
    model, ids = fresh_model("qwen3"), prompt(1, 5)
    assert generate(model, ids, do_sample=False, **BOTH, compile_config=GRAPHS).jacobi_stats.cuda_graphs > 0
    kept = weakref.ref(kept_for(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert kept() is None


@pytest.mark.parametrize(
    ("backend", "mode", "steps", "inner_mode", "records"),
    [
        ("inductor", "reduce-overhead", Compiled, None, True),
        ("inductor", "max-autotune", Compiled, "max-autotune-no-cudagraphs", True),
        ("cudagraphs", "reduce-overhead", WholeSteps, None, True),
        ("inductor", "default", Compiled, "default", False),
    ],
)
def test_what_a_compile_config_asks_for(backend, mode, steps, inner_mode, records, monkeypatch):
    model, config, wanted = tiny_model("qwen3"), JacobiConfig(), CompileConfig(backend=backend, mode=mode)
    buffers = CallBuffers(model, sources_of(config, model), 1, 64, torch.device("cpu"))
    execution = execution_for(model, config, wanted, buffers)
    inner = execution._steps if records else execution
    assert isinstance(execution, CudaGraphSteps) == records
    assert type(inner) is steps
    if steps is Compiled:
        assert (inner._how["backend"], inner._how["mode"]) == (backend, inner_mode)
    monkeypatch.delitem(cuda_graphs.GRAPHS, "cpu")  # a device that records nothing
    execution = execution_for(model, config, wanted, buffers)
    assert type(execution) is Compiled
    assert (execution._how["backend"], execution._how["mode"]) == (backend, mode)


@pytest.mark.slow
def test_steps_are_compiled_and_then_recorded(monkeypatch):
    """A graph of a compiled step is emulated by calling it with what it was called with."""

    class Called(TapeGraphs):
        def record(self, work):
            return work

    monkeypatch.setitem(cuda_graphs.GRAPHS, "cpu", Called)
    model, totals = tiny_model("qwen3"), []
    for number in range(3):
        values = {"temperature": 0.6 + number / 10, "repetition_penalty": 1.1 + number / 5}
        ids, arguments = prompt(1, 7, seed=number), {**SETTINGS["lookup alone"], **CALLS["sampled"], **values}
        options = CompileConfig(backend="aot_eager", mode="reduce-overhead")
        output = generate(model, ids, **arguments, compile_config=options)
        assert_same(generate(model, ids, **arguments), output)
        totals.append((output.jacobi_stats.compiled_steps, output.jacobi_stats.cuda_graphs))
        if number == 0:
            counters.clear()
    assert totals == [(2, 2), (0, 0), (0, 0)]  # with and without a match
    assert counters["stats"]["unique_graphs"] == 0  # other values compile nothing, whether or not we count it


def test_hooks_switch_graphs_off():
    model, ids = fresh_model("qwen3"), prompt(1, 5)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="compile_config is ignored: a module of the model has hooks"):
        output = generate(model, ids, do_sample=False, **BOTH, compile_config=GRAPHS)
    assert output.jacobi_stats.cuda_graphs == 0
