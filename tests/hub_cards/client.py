"""Decode with models and a drafter from the Hub as users do, with and without jacobi_hf, and print JSON.

    python client.py without FOLDER_OF_A_DRAFTER
    python client.py installed

`HF_ENDPOINT` names the Hub.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from without import Without

if sys.argv[1] == "without":
    sys.meta_path[:] = map(Without, sys.meta_path)
    assert importlib.util.find_spec("jacobi_hf") is None

import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    TextIteratorStreamer,
    pipeline,
)

torch.set_num_threads(1)
FORCED, BASE, DRAFTER = "user/tiny-forced.v1", "user/tiny-checkpoint.v1", "user/tiny-drafter.v1"
TRUST = {"trust_remote_code": True}
ASKED = {"max_new_tokens": 32, "do_sample": False, "return_dict_in_generate": True}
calls: dict[str, dict[str, Any]] = {}
errors: dict[str, str] = {}
seen: dict[str, Any] = {"calls": calls, "errors": errors}


def load(name: str, **kwargs: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **kwargs).eval()
    model.generation_config.jacobi_schedule = "constant"  # forwards are compared
    return model


def note(name: str, output: Any, reference: Any) -> None:
    stats = getattr(output, "jacobi_stats", None)
    rate = None if stats is None else stats.mean_tokens_per_forward
    calls[name] = {"same": torch.equal(output.sequences, reference.sequences), "tokens_per_forward": rate}


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


plain = load(FORCED)
tokenizer = AutoTokenizer.from_pretrained(FORCED)
inputs = tokenizer(["Task: 12 + 30 * 2 =", "def add(a, b):\n"], return_tensors="pt", padding=True, padding_side="left")
reference = plain.generate(**inputs, **ASKED)
random = load("user/llama")
ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
random_reference = random.generate(ids, **ASKED)


def without() -> None:
    note("by name", plain.generate(**inputs, **ASKED, custom_generate=FORCED, **TRUST), reference)
    note("plain afterwards", plain.generate(**inputs, **ASKED), reference)
    note(
        "another model's code",
        plain.generate(**inputs, **ASKED, custom_generate="user/qwen2", **TRUST, jacobi_block_size=4),
        reference,
    )
    seen["class"] = [base.__name__ for base in type(plain).__mro__[:2]]
    errors["no trust"] = error_of(
        lambda: plain.generate(**inputs, **ASKED, custom_generate=FORCED, trust_remote_code=False)
    )
    _from_pretrained()
    _unregistered_class()
    _drafter()
    seen["functions before sdpa"] = 0
    function = AttentionInterface()["sdpa"]
    while hasattr(function, "forms"):
        seen["functions before sdpa"] += 1
        function = function._function
    seen["modules"] = sorted(name for name in sys.modules if name.partition(".")[0] == "jacobi_hf")


def _from_pretrained() -> None:
    """Run calls of `from_pretrained(..., trust_remote_code=True).generate(...)`."""
    model = load(FORCED, **TRUST)
    seen["generate"] = model.generate.func.__name__
    one = tokenizer("Task: 12 + 30 * 2 =", return_tensors="pt")
    single = plain.generate(**one, **ASKED)
    note("keywords", model.generate(**inputs, **ASKED), reference)
    note("positional", model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **ASKED), reference)
    note("other knobs", model.generate(**inputs, **ASKED, jacobi_block_size=3, jacobi_lookup_tokens=0), reference)
    note("decoding=None", model.generate(**inputs, **ASKED, decoding=None), reference)
    note("a row alone", model.generate(one.input_ids, **ASKED), single)
    sampled = {**ASKED, "do_sample": True, "temperature": 0.8}
    torch.manual_seed(0)
    expected = plain.generate(**inputs, **sampled)
    torch.manual_seed(0)
    note("sampled", model.generate(**inputs, **sampled), expected)
    beams = {**ASKED, "num_beams": 2}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        note("beams", model.generate(**inputs, **beams), plain.generate(**inputs, **beams))
    seen["warnings"] = [
        str(one.message).split("does not support ")[1].split()[0]
        for one in told
        if "does not support" in str(one.message)
    ]
    errors["misspelt"] = error_of(lambda: model.generate(**inputs, jacobi_blok_size=3))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    note("streamed", model.generate(**one, **ASKED, streamer=streamer), single)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        "Task: 12 + 30 * 2 =", do_sample=False, max_new_tokens=32
    )
    streamed = "".join(streamer)
    seen["pipeline"] = streamed == tokenizer.decode(single.sequences[0, one.input_ids.shape[1] :]) and text[0][
        "generated_text"
    ].startswith("Task: 12 + 30 * 2 =")
    model.save_pretrained("saved")
    seen["architectures"] = json.loads(Path("saved/config.json").read_text(encoding="utf-8"))["architectures"]


def _unregistered_class() -> None:
    note("no persisted knobs", random.generate(ids, **ASKED, custom_generate="user/llama", **TRUST), random_reference)
    note("no persisted knobs afterwards", random.generate(ids, **ASKED), random_reference)
    note("no persisted knobs, positional", load("user/llama", **TRUST).generate(ids, **ASKED), random_reference)
    falcon = FalconForCausalLM(
        FalconConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, alibi=True)
    )
    errors["refused"] = error_of(lambda: falcon.generate(ids, custom_generate="user/falcon", **TRUST))


def _drafter() -> None:
    """Run calls with a drafter's repository beside its base."""
    base = load(BASE)
    expected = base.generate(**inputs, **ASKED)
    note("drafter", base.generate(**inputs, **ASKED, custom_generate=DRAFTER, **TRUST), expected)
    note("plain after a drafter", base.generate(**inputs, **ASKED), expected)
    note("drafter again", base.generate(**inputs, **ASKED, custom_generate=DRAFTER, **TRUST), expected)
    note(
        "drafter of a revision",
        base.generate(**inputs, **ASKED, custom_generate=DRAFTER, revision="v2", **TRUST),
        expected,
    )
    note("drafter from a folder", base.generate(**inputs, **ASKED, custom_generate=sys.argv[2], **TRUST), expected)
    trusted = load(FORCED, **TRUST)
    trusted.load_state_dict(base.state_dict())  # the base's weights in a model whose `generate` is a repository's
    note(
        "drafter through a forced model's generate",
        trusted.generate(**inputs, **ASKED, custom_generate=DRAFTER, **TRUST),
        expected,
    )
    errors["of another model"] = error_of(lambda: random.generate(ids, custom_generate=DRAFTER, **TRUST))


def installed() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name in ("first", "second"):
            note(name, plain.generate(**inputs, **ASKED, custom_generate="user/qwen2", **TRUST), reference)
        note("same version", plain.generate(**inputs, **ASKED, custom_generate=FORCED, **TRUST), reference)
        base = load(BASE)
        note(
            "drafter",
            base.generate(**inputs, **ASKED, custom_generate=DRAFTER, **TRUST),
            base.generate(**inputs, **ASKED),
        )
        seen["module"] = load(FORCED, **TRUST).generate.func.__module__
    seen["told"] = [str(one.message) for one in told if "jacobi_hf" in str(one.message)]


{"without": without, "installed": installed}[sys.argv[1]]()
sys.stdout.write(json.dumps(seen) + "\n")
