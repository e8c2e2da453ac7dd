"""The tiny models published on the loopback Hub, and then used from it as their cards say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from jacobi_hf.results import Results
from tests.hub_cards.hub import TOKEN

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, READER = ROOT / "examples" / "publish_tiny.py", Path(__file__).with_name("reader.py")


def run(hub, tmp_path, *command, **environment):
    found = subprocess.run(
        [sys.executable, *map(str, command)], env=hub.environment(tmp_path / "home") | environment, cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert TOKEN not in found.stdout + found.stderr
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


def test_published_models_do_what_their_cards_say(hub, tmp_path):
    said = run(hub, tmp_path, SCRIPT, "someone", "--drafter", PYTHONPATH=str(ROOT))
    assert sorted(hub.repos) == [f"someone/tiny-qwen3{kind}" for kind in ("", "-drafter", "-forced")]
    for repo, revisions in hub.repos.items():
        assert f"{repo}: {hub.url}/{repo}/commit/" in said
        assert all(name in said for name in revisions["main"].keys() - {".gitattributes"})
        assert {name for name in revisions["main"] if name.endswith((".bin", ".pt", ".pkl"))} == set()
        assert not any(str(ROOT).encode() in content or TOKEN.encode() in content for content in revisions["main"].values())
    forced, drafter = hub.repos["someone/tiny-qwen3-forced"]["main"], hub.repos["someone/tiny-qwen3-drafter"]["main"]
    assert {"results/peers.json", "plots/forcing.png", "tokenizer.json", "custom_generate/generate.py"} <= forced.keys()
    assert json.loads(forced["generation_config.json"])["decoding"] == "jacobi_multiblock"
    assert json.loads(drafter["drafter_config.json"])["base_model"] == "someone/tiny-qwen3"
    assert Results.model_validate_json(forced["results/peers.json"]).measurements

    seen = json.loads(run(hub, tmp_path, READER, "someone", ROOT).splitlines()[-1])
    assert seen.keys() == {"someone/tiny-qwen3-forced", "someone/tiny-qwen3-drafter"}
    for name, printed in seen.items():
        texts, rates = [], []
        for output in (*printed["without"], *printed["with"]):
            body, rate = re.fullmatch(r"(.*?)\n(?:([\d.]+) tokens per forward\n)?", output, re.DOTALL).groups()
            texts.append(body)
            rates.append(None if rate is None else float(rate))
        assert len(texts) >= 2, name
        assert len(set(texts)) == 1, name  # AR, custom_generate and jacobi_hf write one text
        assert len(texts[0]) > 100
        assert [rate for rate in rates if rate is not None and rate < 1.2] == []
        assert len([rate for rate in rates if rate]) >= 2  # with jacobi_hf, and without
    assert None in [re.search("tokens per forward", output) for output in seen["someone/tiny-qwen3-forced"]["without"]]
