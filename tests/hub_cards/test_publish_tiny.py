"""The tiny models are published on the loopback Hub and then used as their cards say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from jacobi_hf.hub_cards import push_to_hub
from jacobi_hf.results.schema import Results
from tests.helpers.tiny import CHECKPOINT, EXAMPLE
from tests.hub_cards.hub import TOKEN

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = EXAMPLE / "publish.py"
READER = Path(__file__).with_name("reader.py")


def run(hub, tmp_path, *command, **environment):
    found = subprocess.run(
        [sys.executable, *map(str, command)],
        env=hub.environment(tmp_path / "home") | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert TOKEN not in found.stdout + found.stderr
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


def adapter(folder, base):
    """Return the repository of a LoRA adapter of the tiny base model, as a folder."""
    torch.manual_seed(3)
    lora = LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(CHECKPOINT), lora).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    target = folder.parent / "published"
    # Results in float32, so that the card's examples use it.
    in_float32 = EXAMPLE.parent / "benchmarks" / "results" / "forcing" / "base.json"
    push_to_hub(
        folder,
        f"{base}-lora",
        base_model=base,
        results=[in_float32],
        license="apache-2.0",
        token=False,
        dry_run=target,
    )
    return target


@pytest.mark.slow
def test_published_models_do_what_their_cards_say(hub, tmp_path):
    said = run(hub, tmp_path, SCRIPT, "someone", "--drafter", PYTHONPATH=str(ROOT))
    assert sorted(hub.repos) == [f"someone/tiny-qwen3{kind}" for kind in ("", "-drafter", "-forced")]
    for repo, revisions in hub.repos.items():
        assert f"{repo}: {hub.url}/{repo}/commit/" in said
        assert all(name in said for name in revisions["main"].keys() - {".gitattributes"})
        assert {name for name in revisions["main"] if name.endswith((".bin", ".pt", ".pkl"))} == set()
        assert not any(
            str(ROOT).encode() in content or TOKEN.encode() in content for content in revisions["main"].values()
        )
    forced = hub.repos["someone/tiny-qwen3-forced"]["main"]
    drafter = hub.repos["someone/tiny-qwen3-drafter"]["main"]
    assert {
        "results/peers.json",
        "plots/forcing.png",
        "tokenizer.json",
        "custom_generate/generate.py",
    } <= forced.keys()
    assert json.loads(forced["generation_config.json"])["decoding"] == "jacobi_multiblock"
    assert json.loads(drafter["drafter_config.json"])["base_model"] == "someone/tiny-qwen3"
    assert Results.model_validate_json(forced["results/peers.json"]).measurements

    hub.add("someone/tiny-qwen3-lora", adapter(tmp_path / "lora", "someone/tiny-qwen3"))
    names = [f"someone/tiny-qwen3-{kind}" for kind in ("forced", "drafter", "lora")]
    seen = json.loads(run(hub, tmp_path, READER, ROOT, *names).splitlines()[-1])
    assert list(seen) == names
    written = set()
    for printed in seen.values():
        assert [len(printed[where]) for where in ("without", "with")] == [2, 1]  # AR and custom_generate; jacobi_hf
        outputs = [
            re.fullmatch(r"(.*?)\n(?:([\d.]+) tokens per forward\n)?", one, re.DOTALL)
            for one in printed["without"] + printed["with"]
        ]
        assert len({output[1] for output in outputs}) == 1, outputs
        (text,) = {output[1] for output in outputs}  # all write one text
        assert len(text) > 100
        ordinary, *rates = [output[2] for output in outputs]
        assert ordinary is None
        assert all(float(rate) >= 1 for rate in rates)  # how many depends on what steps cost here
        written.add(text)
    assert len(written) == 3
