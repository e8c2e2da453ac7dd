from __future__ import annotations

import copy
import gc
import shutil
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, StoppingCriteria

import jacobi_hf
from jacobi_hf.execution import compiled, cuda_graphs, kept
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.integration.support import cannot_compile
from tests.helpers.calls import BOTH, CALLS, SETTINGS, counts, generate, prompt
from tests.helpers.models import VOCAB, fresh_model, tiny_model
from tests.helpers.tapes import TapeGraphs

# Traces and functionalises as inductor does, without the minutes of a C++ compiler.
TRACED = CompileConfig(backend="aot_eager", mode=None)
# Traces alone.
PLAIN = CompileConfig(backend="eager", mode=None)


@pytest.fixture(autouse=True)
def _forget():
    yield
    for kind in ("qwen3", "qwen2-sliding"):
        jacobi_hf.clear_graphs(tiny_model(kind))


@pytest.mark.parametrize(
    ("kind", "setting", "call"),
    [
        pytest.param("qwen3", "window", "sampled", marks=pytest.mark.slow),
        pytest.param("qwen2-sliding", "both", "greedy", marks=pytest.mark.slow),
        pytest.param("qwen3", "lookup alone", "ends", marks=pytest.mark.slow),
        ("qwen2-sliding", "jacobi", "ends"),
        pytest.param("qwen3", "late blocks", "sampled", marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_give_the_same_tokens_statistics_and_cache(kind, setting, call):
    model, ids, arguments = tiny_model(kind), prompt(2, 7), {**SETTINGS[setting], **CALLS[call]}
    plain, traced = generate(model, ids, **arguments), generate(model, ids, **arguments, compile_config=TRACED)
    assert torch.equal(plain.sequences, traced.sequences)
    assert counts(plain.jacobi_stats) == counts(traced.jacobi_stats)
    assert plain.jacobi_stats.compiled_steps == 0
    assert traced.jacobi_stats.compiled_steps > 0
    for a, b in zip(plain[CACHE].layers, traced[CACHE].layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_tokens():
    model, ids = tiny_model("qwen3"), prompt(1, 7)
    arguments = {"do_sample": False, **SETTINGS["lookup alone"]}
    assert torch.equal(
        generate(model, ids, **arguments).sequences,
        generate(model, ids, **arguments, compile_config=CompileConfig()).sequences,
    )


@pytest.mark.slow
def test_other_lengths_and_prompts_compile_nothing():
    """Over calls of many lengths, with two batch sizes, each shape of a step is compiled once, whatever is in it."""
    model = fresh_model("qwen3", layers=1)
    arguments = {"do_sample": False, "compile_config": PLAIN, **SETTINGS["window"]}
    shapes = set()
    for call in range(40):
        rows = 1 + call % 2
        output = generate(
            model,
            prompt(rows, 1 + 7 * call % 40, seed=call, alphabet=VOCAB),
            **arguments,
            max_new_tokens=1 + 11 * call % 90,
        )
        new = {(rows, width) for width in output.jacobi_stats.slots_by_width} - shapes
        shapes |= new
        assert output.jacobi_stats.compiled_steps == len(new)
        if call == 0:
            counters.clear()
    assert len(shapes) <= 10
    # The first call's shapes were compiled before the counters were cleared.
    assert counters["stats"]["unique_graphs"] <= len(shapes)


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=2)
def test_other_knobs_are_other_steps():
    """More of them than torch.compile would tell apart itself; each is compiled once."""
    model, ids = fresh_model("qwen3", layers=1), prompt(1, 4)
    arguments = {"do_sample": False, "compile_config": PLAIN, "max_new_tokens": 6}
    for length in range(2, 6):
        setting = {"jacobi_max_blocks": 0, "jacobi_pool_size": 0, "jacobi_lookup_tokens": length}
        assert generate(model, ids, **arguments, **setting).jacobi_stats.compiled_steps > 0
        assert generate(model, ids, **arguments, **setting).jacobi_stats.compiled_steps == 0
    with torch.inference_mode():
        assert generate(model, ids, **arguments, **setting).jacobi_stats.compiled_steps > 0


def double(name):
    def change(layer):
        setattr(layer.self_attn, name, 2 * getattr(layer.self_attn, name))

    return change


def patch(layer):
    layer.mlp.forward = lambda hidden: -hidden


def replace_module(layer):
    layer.mlp = torch.nn.Tanh()


def replace_weight(layer):
    layer.mlp.up_proj.weight = torch.nn.Parameter(-2 * layer.mlp.up_proj.weight.detach())


def swap_slots(layer):
    layer.mlp.first, layer.mlp.second = None, layer.mlp.first


class Slots(torch.nn.Module):
    """A module with two optional ones."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_module("first", torch.nn.Tanh())
        self.register_module("second", None)

    def forward(self, hidden):
        hidden = self.inner(hidden)
        if self.first is not None:
            hidden = self.first(hidden)
        return hidden if self.second is None else -3 * self.second(hidden)


CHANGES = {
    "number": double("scaling"),
    "method": patch,
    "module": replace_module,
    "weight": replace_weight,
    "slots": swap_slots,
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(change, id=name, marks=[pytest.mark.slow] * (name != "module")) for name, change in CHANGES.items()],
)
def test_a_model_that_was_changed_between_calls_is_compiled_as_it_is(change):
    """torch.compile checks the model's modules, their attributes and weights before every step."""
    model, ids = fresh_model("qwen3", layers=1), prompt(1, 5)
    arguments = {"do_sample": False, **SETTINGS["lookup alone"], "max_new_tokens": 10}
    if change is swap_slots:
        for layer in model.model.layers:
            layer.mlp = Slots(layer.mlp)
    before = generate(model, ids, **arguments, compile_config=PLAIN)
    for layer in model.model.layers:
        change(layer)
    plain, output = generate(model, ids, **arguments), generate(model, ids, **arguments, compile_config=PLAIN)
    assert torch.equal(plain.sequences, output.sequences)
    assert not torch.equal(before.sequences, output.sequences)


class Wrapped(torch.nn.Module):
    """A module with an attribute by which it decides."""

    def __init__(self, inner, value, decide, counts):
        super().__init__()
        self.inner, self.value, self._decide, self._counts = inner, value, decide, counts
        self.runs = 0

    def forward(self, hidden):
        if self._counts:
            self.runs = (self.runs + 1) % 2
        return self.inner(hidden) * (-3.0 if self._decide(self.value, self.runs) else 1.0)


@pytest.mark.parametrize(
    ("before", "after", "decide"),
    [
        pytest.param(b"a", b"b", lambda v, _: v == b"b", marks=pytest.mark.slow),
        pytest.param(deque([1]), deque([2]), lambda v, _: v[0] == 2, marks=pytest.mark.slow),
        ([[1], {"a": 2}], [[1], {"a": 3}], lambda v, _: v[1]["a"] == 3),
    ],
    ids=["bytes", "deque", "nested"],
)
def test_an_attribute_of_any_type_counts(before, after, decide):
    model, ids = fresh_model("qwen3", layers=1), prompt(1, 5)
    arguments = {"do_sample": False, **SETTINGS["lookup alone"], "max_new_tokens": 10}
    for layer in model.model.layers:
        layer.mlp = Wrapped(layer.mlp, before, decide, counts=False)
    first = generate(model, ids, **arguments, compile_config=PLAIN)
    for layer in model.model.layers:
        layer.mlp.value = after
    plain, output = generate(model, ids, **arguments), generate(model, ids, **arguments, compile_config=PLAIN)
    assert torch.equal(plain.sequences, output.sequences)
    assert not torch.equal(first.sequences, output.sequences)


@pytest.mark.slow
def test_a_model_that_changes_itself_and_one_that_is_changed_on_the_way():
    arguments, ids = {**SETTINGS["lookup alone"], "max_new_tokens": 10}, prompt(1, 5)

    class Turns(StoppingCriteria):
        def __init__(self, model):
            self.model, self.calls = model, 0

        def __call__(self, input_ids, scores, **_):
            self.calls += 1
            if self.calls == 3:
                self.model.model.layers[0].self_attn.scaling *= -4
            return torch.zeros(len(input_ids), dtype=torch.bool)

    outputs = []
    for compile_config in (None, PLAIN):
        model = fresh_model("qwen3", layers=1)
        changed = generate(
            model, ids, do_sample=False, **arguments, compile_config=compile_config, stopping_criteria=[Turns(model)]
        )
        model = fresh_model("qwen3", layers=1)
        model.model.layers[0].mlp = Wrapped(model.model.layers[0].mlp, None, lambda _, runs: runs == 0, counts=True)
        outputs.append((changed, generate(model, ids, do_sample=False, **arguments, compile_config=compile_config)))
    for plain, output in zip(*outputs, strict=True):
        assert torch.equal(plain.sequences, output.sequences)


def test_what_a_model_remembers_of_a_call_compiles_nothing():
    model, columns = fresh_model("qwen3", layers=1), []
    notes = []
    notes.append(notes)
    model.notes = notes
    for length in (5, 6, 7):
        model.last_prompt, model.last_length = torch.ones(1, length), length
        output = generate(model, prompt(1, 5), do_sample=False, **SETTINGS["lookup alone"], compile_config=PLAIN)
        columns.append(output.jacobi_stats.compiled_steps)
    assert columns[0] > 0
    assert columns[1:] == [0, 0]


class ByLength(torch.nn.Module):
    """A module that decides by the length of the prompt, as rotary embeddings do that are scaled for long ones."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.mode = inner, "short"

    def forward(self, hidden):
        if hidden.shape[1] > 8:  # not so in a step
            self.mode = "long" if hidden.shape[1] > 16 else "short"
        return self.inner(hidden) * (1.0 if self.mode == "short" else -2.0)


@pytest.mark.parametrize(
    "tapes", [pytest.param(False, id="compiled", marks=pytest.mark.slow), pytest.param(True, id="graphs")]
)
def test_what_a_prefill_decides_counts(tapes, monkeypatch):
    monkeypatch.setitem(cuda_graphs.GRAPHS, "cpu", TapeGraphs)
    model, arguments = (
        fresh_model("qwen3", layers=1),
        {"do_sample": False, **SETTINGS["lookup alone"], "max_new_tokens": 10},
    )
    model.model.layers[0].mlp = ByLength(model.model.layers[0].mlp)
    how = CompileConfig(backend="cudagraphs") if tapes else PLAIN
    plain = {length: generate(model, prompt(1, length), **arguments).sequences for length in (10, 30)}
    for length in (10, 30, 10, 10, 30, 30, 10):
        assert torch.equal(
            plain[length], generate(model, prompt(1, length), **arguments, compile_config=how).sequences
        )


@pytest.mark.slow
def test_an_interrupted_compilation_leaves_nothing_behind():
    interrupts = [KeyboardInterrupt]

    def backend(graph, _):
        if interrupts:
            raise interrupts.pop()
        return graph.forward

    arguments, ids = {"do_sample": False, **SETTINGS["lookup alone"], "max_new_tokens": 24}, prompt(1, 5)
    model = fresh_model("qwen3", layers=1)
    mlp = model.model.layers[0].mlp = Wrapped(model.model.layers[0].mlp, None, lambda _, runs: runs == 1, counts=True)
    plain = generate(model, ids, **arguments)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, **arguments, compile_config=CompileConfig(backend=backend, mode=None))
    mlp.runs = 0
    output = generate(model, ids, **arguments, compile_config=CompileConfig(backend=backend, mode=None))
    assert torch.equal(plain.sequences, output.sequences)


@pytest.mark.slow
def test_steps_that_are_no_longer_kept_are_freed(monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(weakref.ref(graph))
        return graph.forward

    def alive():
        gc.collect()
        return sum(graph() is not None for graph in graphs)

    monkeypatch.setattr(compiled, "MOST_COMPILED", 1)
    model, arguments = (
        fresh_model("qwen3", layers=1),
        {"do_sample": False, "jacobi_max_blocks": 0, "jacobi_pool_size": 0, "max_new_tokens": 6},
    )
    for length in (2, 3, 4):
        how = CompileConfig(backend=backend, mode=None)
        assert (
            generate(
                model, prompt(1, 4), **arguments, jacobi_lookup_tokens=length, compile_config=how
            ).jacobi_stats.compiled_steps
            > 0
        )
        assert alive() == len(kept.kept_for(model).steps) == 1
    assert len(graphs) > 1
    jacobi_hf.clear_graphs(model)
    assert alive() == 0


class Counting(torch.nn.Module):
    """A module that counts its forwards and reads a setting."""

    def __init__(self, inner, config, counts):
        super().__init__()
        self.inner, self.config, self._counts, self.forwards = inner, config, counts, 0

    def forward(self, hidden):
        self.forwards += self._counts
        return self.inner(hidden) * (self.config.steering - self.forwards % 3)


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=2)
def test_what_would_be_compiled_again_and_again_is_not():
    """A model that is another one in every step runs uncompiled; one that is another one in every call begins anew."""
    arguments, ids = {"do_sample": False, **SETTINGS["lookup alone"], "max_new_tokens": 10}, prompt(1, 5)
    for changes, settings in ((True, (1, 1)), (False, (1, 2, 3, 4))):
        model = fresh_model("qwen3", layers=1)
        mlp = model.model.layers[0].mlp = Counting(model.model.layers[0].mlp, model.config, changes)
        for call, setting in enumerate(settings):
            model.config.steering, mlp.forwards = setting, 0
            plain, mlp.forwards = generate(model, ids, **arguments), 0
            if changes:
                with pytest.warns(
                    UserWarning,
                    match="some steps, because the model's attributes change between steps. They run uncompiled",
                ):
                    output = generate(model, ids, **arguments, compile_config=PLAIN)
                assert call == 0 or output.jacobi_stats.compiled_steps == 0
            else:
                output = generate(model, ids, **arguments, compile_config=PLAIN)
            assert torch.equal(plain.sequences, output.sequences)


def test_a_step_that_is_no_graph_runs_uncompiled():
    model, ids, arguments = (
        fresh_model("qwen3", layers=1),
        prompt(1, 5),
        {"do_sample": False, **SETTINGS["lookup alone"], "max_new_tokens": 10},
    )
    model.model.layers[0].mlp = Wrapped(
        model.model.layers[0].mlp, None, lambda *_: torch._dynamo.graph_break(), counts=False
    )
    plain = generate(model, ids, **arguments)
    for _ in range(2):
        with pytest.warns(UserWarning, match="compile_config is ignored for some steps, because "):
            output = generate(model, ids, **arguments, compile_config=PLAIN)
        assert torch.equal(plain.sequences, output.sequences)
        assert output.jacobi_stats.compiled_steps == 0
    with pytest.raises(torch._dynamo.exc.Unsupported):
        generate(model, ids, **arguments, compile_config=CompileConfig(backend="eager", mode=None, fullgraph=True))


@pytest.mark.slow
def test_a_model_with_fewer_layers_has_other_buffers():
    model, ids, arguments = (
        fresh_model("qwen3"),
        prompt(1, 5),
        {"do_sample": False, **SETTINGS["lookup alone"], "max_new_tokens": 10},
    )
    generate(model, ids, **arguments, compile_config=PLAIN)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    plain, output = generate(model, ids, **arguments), generate(model, ids, **arguments, compile_config=PLAIN)
    assert torch.equal(plain.sequences, output.sequences)


@pytest.mark.slow
def test_what_is_kept_belongs_to_one_model_and_goes_with_it():
    first, second, ids = fresh_model("qwen3", layers=1), fresh_model("qwen3", layers=1), prompt(1, 5)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    arguments = {"do_sample": False, **SETTINGS["window"]}
    for model in (first, second):
        assert generate(model, ids, **arguments, compile_config=PLAIN).jacobi_stats.compiled_steps > 0
        assert generate(model, ids, **arguments, compile_config=PLAIN).jacobi_stats.compiled_steps == 0
        assert torch.equal(
            generate(model, ids, **arguments).sequences,
            generate(model, ids, **arguments, compile_config=PLAIN).sequences,
        )
    jacobi_hf.clear_graphs(first)
    assert generate(first, ids, **arguments, compile_config=PLAIN).jacobi_stats.compiled_steps > 0
    assert generate(second, ids, **arguments, compile_config=PLAIN).jacobi_stats.compiled_steps == 0
    copy.deepcopy(first)
    gone = weakref.ref(second)
    del second, model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("when", ["before", pytest.param("between", marks=pytest.mark.slow)])
def test_a_forward_with_hidden_states_forbids_no_compiling(when):
    """Transformers leaves hooks on the layers that do nothing in other forwards."""
    model, ids = fresh_model("qwen3", layers=1), prompt(1, 6)
    arguments = {
        "do_sample": False,
        "compile_config": CompileConfig(backend="aot_eager", mode=None, fullgraph=True),
        **SETTINGS["window"],
    }
    reference = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    if when == "between":
        assert generate(model, ids, **arguments).jacobi_stats.compiled_steps > 0
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert cannot_compile(model) is None
    output = generate(model, ids, **arguments)
    assert when == "between" or output.jacobi_stats.compiled_steps > 0
    assert torch.equal(output.sequences, reference)
    with torch.no_grad():
        again = model(ids, output_hidden_states=True).hidden_states
    assert len(again) == len(states)
    assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))


def test_hooks_and_disable_compile_leave_steps_as_they_are():
    model, ids, arguments = fresh_model("qwen3", layers=1), prompt(1, 5), {"do_sample": False, **SETTINGS["window"]}
    plain = generate(model, ids, **arguments)
    output = generate(model, ids, **arguments, compile_config=TRACED, disable_compile=True)
    assert output.jacobi_stats.compiled_steps == 0
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="compile_config is ignored: a module of the model has hooks"):
        output = generate(model, ids, **arguments, compile_config=TRACED)
    handle.remove()
    assert output.jacobi_stats.compiled_steps == 0
    assert torch.equal(plain.sequences, output.sequences)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        (
            "hf_device_map",
            {"model.layers.0": "cpu", "model.layers.1": "disk"},
            "the model is spread over several devices",
        ),
        ("hf_quantizer", SimpleNamespace(is_compileable=False), "its quantisation cannot be compiled"),
        ("_tp_size", 2, "the model is split over several processes"),
    ],
)
def test_why_a_model_cannot_be_compiled(attribute, value, reason):
    model = fresh_model("qwen3", layers=1)
    assert cannot_compile(model) is None
    setattr(model, attribute, value)
    assert cannot_compile(model) == reason


def test_hooks_of_all_kinds_forbid_compiling():
    model = fresh_model("qwen3", layers=1)
    handle = model.model.layers[0].register_full_backward_hook(lambda *_: None)
    assert cannot_compile(model) == "a module of the model has hooks"
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert cannot_compile(model) == "there are hooks for all modules"
    handle.remove()
    assert cannot_compile(model) is None


def test_who_wants_more_than_tokens_gets_it_uncompiled():
    model, ids = tiny_model("qwen3"), prompt(2, 5)
    output = generate(model, ids, do_sample=False, **BOTH, compile_config=TRACED, output_scores=True)
    assert output.jacobi_stats.compiled_steps == 0
    assert len(output.scores) == 24
