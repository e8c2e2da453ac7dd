"""examples/publish.py runs as its first lines say, against the loopback Hub."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from tests.examples.test_scripts import commands_of
from tests.helpers.tiny import EXAMPLE
from tests.hub_cards.folders import make
from tests.hub_cards.hub import TOKEN

ROOT = EXAMPLE.parents[1]
SCRIPT = "examples/publish.py"


@pytest.fixture
def run(hub, tmp_path):
    """Run words that begin with `python examples/publish.py`, in a new folder."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}

    def run(words):
        assert words[:2] == ["python", SCRIPT]
        command = [sys.executable, *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


def test_without_push_the_repository_is_a_folder(hub, run, tmp_path):
    _, words = commands_of(SCRIPT)
    done = run(words)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "build" / "tiny"
    for name in ("model.safetensors", "tokenizer.json", "README.md", "custom_generate/generate.py"):
        assert (folder / name).is_file()
        assert name in done.stdout
    assert "Nothing was sent. The repository is in build/tiny" in done.stdout
    assert not hub.repos
    again = run(words)
    assert again.returncode == 1
    assert again.stderr.startswith("Nothing was published.")
    assert "already exists" in again.stderr


def test_push_sends_one_commit(hub, run, tmp_path):
    """The first command of the script, with a small model where it names one of the reader's own."""
    words, _ = commands_of(SCRIPT)
    folder = make(tmp_path / "build" / "forced")
    (folder / "README.md").unlink()
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert f"Published: {hub.url}/user/my-model/commit/" in done.stdout
    assert 'model.generate(**inputs, custom_generate="user/my-model", trust_remote_code=True)' in done.stdout
    sent = hub.repos["user/my-model"]["main"]
    assert sent["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "custom_generate/generate.py" in sent
    data = ModelCard(sent["README.md"].decode()).data
    assert (data.license, data.base_model) == ("apache-2.0", "Qwen/Qwen3-1.7B")


@pytest.mark.slow
def test_a_drafter_of_another_base_and_a_refused_folder(hub, run, tmp_path):
    make(tmp_path / "drafter", "drafter")
    done = run(["python", SCRIPT, "drafter", "user/d", "--base_model", "user/other", "--push", "--private"])
    assert done.returncode == 0, done.stderr
    assert 'base_model.generate(**inputs, custom_generate="user/d"' in done.stdout
    assert json.loads(hub.repos["user/d"]["main"]["drafter_config.json"])["base_model"] == "user/other"
    assert hub.private == {"user/d"}
    (tmp_path / "drafter" / ".env").write_text("A=b")
    refused = run(["python", SCRIPT, "drafter", "user/e", "--push"])
    assert refused.returncode == 1
    assert refused.stderr.startswith("Nothing was published. .env looks like a secret.")
    assert "user/e" not in hub.repos
