"""The scripts of examples/ run as their first lines say."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TINY = "examples/tiny_qwen3/checkpoint"


def commands_of(script):
    """The commands in a script's docstring, as lists of words."""
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8")))
    lines = docstring.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    python ")]


@pytest.fixture
def run(tmp_path):
    """Run the command for the tiny model as it stands in the docstring, in a new folder, without a network."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(script):
        (command,) = [words for words in commands_of(script) if TINY in words]
        assert command[:2] == ["python", script]
        words = [sys.executable, *command[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_generate_writes_the_same_text_twice(run):
    ordinary, parallel, comparison, *text = run("examples/generate.py").splitlines()
    assert "tokens per second, 1.00 tokens per forward" in ordinary
    assert float(parallel.split(", ")[1].split()[0]) >= 1  # how much more depends on what a step costs here
    assert comparison == "The texts are equal."
    assert text[0].startswith("def __init__(self, name, size):")


def test_train_saves_a_plain_checkpoint(run, tmp_path):
    run("examples/train.py")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "build/forced")
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    assert model.generation_config.decoding == "jacobi_multiblock"
    before = AutoModelForCausalLM.from_pretrained(ROOT / TINY).state_dict()
    assert any(not value.equal(before[name]) for name, value in model.state_dict().items())
