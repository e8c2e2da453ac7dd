"""Field reports, architectures: every causal class of transformers decodes with the same text, or says that it cannot.

`architectures.json` holds what the sweep found with each release; `python -m tests.field.test_architectures` writes
it. The models are tiny and random, and their texts are longer than every window that their configs name.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import transformers
from rich.console import Console
from rich.progress import track

from tests.helpers.architectures import Verdict, causal_classes, judge

RECORDED = Path(__file__).with_name("architectures.json")
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


def check(model_type: str) -> None:
    name = causal_classes()[model_type]
    verdict = judge(model_type, name)
    assert verdict.outcome != "FAILS", f"{name}: {verdict.detail}"
    if name in recorded():
        assert verdict.outcome == recorded()[name][0], f"{name}: {verdict.detail}"


def record() -> None:
    """Write what every class does with the installed release."""
    console = Console(stderr=True)
    transformers.logging.set_verbosity_error()
    found: dict[str, Verdict] = {}
    for model_type, name in track(causal_classes().items(), description=transformers.__version__, console=console):
        found[name] = judge(model_type, name)
        if found[name].outcome == "FAILS":
            console.print(name, found[name].detail)
    document = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"releases": {}}
    document["releases"][transformers.__version__] = {
        name: [verdict.outcome, verdict.detail] for name, verdict in sorted(found.items())
    }
    RECORDED.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    console.print(Counter(verdict.outcome for verdict in found.values()))


if __name__ == "__main__":
    record()
