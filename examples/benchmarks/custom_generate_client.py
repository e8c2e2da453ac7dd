"""Decode with the tiny repositories of a Hub; custom_generate.py runs this script in a new environment.

    python custom_generate_client.py USER PROMPTS FORCED_COUNT DRAFTER_COUNT MAX_NEW_TOKENS

HF_ENDPOINT names the Hub. The script needs transformers and torch, and refuses to run beside jacobi_hf. The last line
on stdout is one JSON document.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TRUST = {"trust_remote_code": True}


def load(name: str, **kwargs: Any) -> Any:
    """Return a model in float32."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **kwargs).eval()


def compare(
    plain: Any, usages: dict[str, Any], tokenizer: Any, prompts: dict[str, list[str]], max_new_tokens: int
) -> list[dict[str, Any]]:
    """Run each usage on each prompt, and compare its tokens with those of the plain model's `generate`."""
    found = {
        (usage, domain): {"tokens": [], "forwards": [], "different": []} for usage in usages for domain in prompts
    }
    for domain, texts in prompts.items():
        for number, text in enumerate(texts):
            inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            asked = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
            expected = plain.generate(**inputs, **asked).sequences
            asked["jacobi_schedule"] = "constant"  # forwards are counted
            for usage, call in usages.items():
                output = call(inputs, asked)
                here = found[usage, domain]
                here["tokens"] += output.jacobi_stats.new_tokens
                here["forwards"].append(output.jacobi_stats.forwards)
                if not torch.equal(output.sequences, expected):
                    here["different"].append(number)
    return [{"usage": usage, "domain": domain, **values} for (usage, domain), values in found.items()]


def main() -> None:
    assert importlib.util.find_spec("jacobi_hf") is None, "jacobi_hf can be imported here"
    torch.set_num_threads(1)
    user, prompts_file, *counts = sys.argv[1:]
    base_name, forced_name, drafter_name = (f"{user}/tiny-qwen3{kind}" for kind in ("", "-forced", "-drafter"))
    forced_count, drafter_count, max_new_tokens = map(int, counts)
    prompts: dict[str, list[str]] = json.loads(Path(prompts_file).read_text(encoding="utf-8"))["prompts"]

    plain = load(forced_name)
    trusting = load(forced_name, **TRUST)
    tokenizer = AutoTokenizer.from_pretrained(forced_name)
    usages = {
        "by name": lambda inputs, asked: plain.generate(**inputs, **asked, custom_generate=forced_name, **TRUST),
        "from_pretrained": lambda inputs, asked: trusting.generate(inputs["input_ids"], **asked),
    }
    chosen = {domain: texts[:forced_count] for domain, texts in prompts.items()}
    runs = compare(plain, usages, tokenizer, chosen, max_new_tokens)
    base = load(base_name)
    with_drafter = {
        "drafter": lambda inputs, asked: base.generate(**inputs, **asked, custom_generate=drafter_name, **TRUST)
    }
    chosen = {domain: texts[:drafter_count] for domain, texts in prompts.items()}
    runs += compare(base, with_drafter, tokenizer, chosen, max_new_tokens)
    versions = {one.metadata["Name"]: one.version for one in distributions()}
    print(json.dumps({"runs": runs, "python": platform.python_version(), "versions": versions}))


if __name__ == "__main__":
    main()
