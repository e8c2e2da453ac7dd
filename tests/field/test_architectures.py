"""Field reports, architectures: every causal class of transformers decodes with the same text, or says that it cannot.

`architectures.json` holds what the sweep found with each release; `python -m tests.field.test_architectures` writes
it. The models are tiny and random, and their texts are longer than every window that their configs name.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from rich.console import Console
from rich.progress import track

import jacobi_hf
from jacobi_hf.integration.defaults import ALWAYS, SERVED
from tests.helpers.architectures import Finding, build_that_generates, causal_classes, judge
from tests.helpers.models import fresh_model

RECORDED = Path(__file__).with_name("architectures.json")
DOCS = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN = "<!-- written by python -m tests.field.test_architectures -->"
END = "<!-- end -->"
OUTCOMES = {
    "equal": "equal text",
    "falls back": "decoded the ordinary way, with a warning",
    "refused": "refused by `register`, with a reason",
    "not built": "not tried: no tiny model of it could be built, or it does not generate by itself",
}
# The quick tests decode with these; the slow ones with all.
FAMILIES = ("llama", "gemma2", "gpt_oss", "jetmoe", "moshi", "doge", "llama4_text", "bloom", "mamba")


def recorded() -> dict[str, list[str]]:
    """Return the recorded outcome and detail of each class, for the installed release; empty if there is none."""
    found: dict[str, list[str]] = json.loads(RECORDED.read_text())["releases"].get(transformers.__version__, {})
    return found


@pytest.mark.parametrize("model_type", [one for one in FAMILIES if one in causal_classes()])
def test_families(model_type):
    """Classes that failed: keys repeated before attention, a window that no code reads, a mask that is changed."""
    check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [one for one in causal_classes() if one not in FAMILIES])
def test_every_class(model_type):
    """Any class that a user may load with `AutoModelForCausalLM`."""
    check(model_type)


@pytest.mark.parametrize("part", ["forward", "model", "layers"])
def test_a_model_that_the_caller_has_compiled(part):
    """`model.compile()`, `model.forward = torch.compile(model.forward)`, and layers compiled one by one."""
    model = fresh_model("qwen2", layers=1)
    arguments = {
        "input_ids": torch.tensor([[3, 4, 5, 6]]),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    reference = model.generate(**arguments)
    if part == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif part == "model":
        model.compile(backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    knobs = {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant"}
    output = model.generate(**arguments, **knobs, return_dict_in_generate=True)
    assert torch.equal(output.sequences, reference)
    assert output.jacobi_stats.forwards < 12
    assert torch.equal(model.generate(**arguments), reference)


def test_a_class_that_is_refused_by_its_first_forward_is_not_asked_again():
    """The prefill of a long prompt costs as much as in ordinary decoding."""
    model = build_that_generates("moshi", "MoshiForCausalLM")
    try:
        jacobi_hf.register(type(model))
    except TypeError:
        pytest.skip("in this release the class does not use transformers' attention interface")
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        for expected in (4, 3):
            forwards.clear()
            with pytest.warns(UserWarning, match="decoding ordinarily"):
                model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, decoding="jacobi_multiblock")
            assert len(forwards) == expected
    finally:
        jacobi_hf.unregister(type(model))


def check(model_type: str) -> None:
    name = causal_classes()[model_type]
    finding = judge(model_type, name)
    assert finding.outcome != "FAILS", f"{name}: {finding.detail}"
    if name in recorded():
        assert finding.outcome == recorded()[name][0], f"{name}: {finding.detail}"


def test_the_classes_with_equal_text_are_registered_on_import():
    _, found = max(json.loads(RECORDED.read_text())["releases"].items(), key=lambda item: Version(item[0]))
    assert {name for name, (outcome, _) in found.items() if outcome == "equal"} == SERVED
    assert ALWAYS <= SERVED


def test_the_docs_name_the_classes():
    newest = max(json.loads(RECORDED.read_text())["releases"].items(), key=lambda item: Version(item[0]))
    assert paragraph(*newest) in DOCS.read_text()


def paragraph(release: str, found: dict[str, list[str]]) -> str:
    """Return what the docs say about the classes of a release."""
    names = {outcome: [name for name, (seen, _) in sorted(found.items()) if seen == outcome] for outcome in OUTCOMES}
    lines = [f"With transformers {release}:", "", "| outcome | classes | which |", "|---|---|---|"]
    for outcome, meaning in OUTCOMES.items():
        lines.append(f"| {meaning} | {len(names[outcome])} | {', '.join(names[outcome])} |")
    return "\n".join(lines)


def write_docs(release: str, found: dict[str, list[str]]) -> None:
    """Write the paragraph of the docs."""
    before, begin, rest = DOCS.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    DOCS.write_text(before + begin + "\n" + paragraph(release, found) + "\n" + end + after)


def record() -> None:
    """Write what every class does with the installed release."""
    console = Console(stderr=True)
    transformers.logging.set_verbosity_error()
    found: dict[str, Finding] = {}
    for model_type, name in track(causal_classes().items(), description=transformers.__version__, console=console):
        found[name] = judge(model_type, name)
        if found[name].outcome == "FAILS":
            console.print(name, found[name].detail)
    document = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"releases": {}}
    document["releases"][transformers.__version__] = {
        name: [finding.outcome, finding.detail] for name, finding in sorted(found.items())
    }
    RECORDED.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    write_docs(transformers.__version__, document["releases"][transformers.__version__])
    console.print(Counter(finding.outcome for finding in found.values()))


if __name__ == "__main__":
    record()
