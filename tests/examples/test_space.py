"""The Space has all files that it needs, and starts in a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from jacobi_hf.cli.serve import listener
from tests.helpers.tiny import CHECKPOINT

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "examples" / "space"


def test_requirements_are_those_of_the_package_and_the_page():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = (SPACE / "requirements.txt").read_text(encoding="utf-8").split()
    assert required == [*project["dependencies"], *project["optional-dependencies"]["demo"]]


def test_the_card_names_existing_files():
    _, front, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert (SPACE / card["app_file"]).is_file()
    assert card["sdk"] == "gradio"
    assert f"gradio=={card['sdk_version']}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert len(card["short_description"]) <= 60  # the Hub refuses more


@pytest.fixture
def space(tmp_path):
    """A folder with the files of a Space, as its README says."""
    for name in ("app.py", "requirements.txt", "README.md"):
        shutil.copy(SPACE / name, tmp_path)
    shutil.copytree(ROOT / "jacobi_hf", tmp_path / "jacobi_hf", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    shutil.copytree(CHECKPOINT.parent / "drafter", tmp_path / "drafter")
    return tmp_path


@pytest.mark.slow
def test_it_starts_and_shows_the_page(space):
    with listener("127.0.0.1", 0) as at:
        port = at.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MODEL", "DRAFTER")}
    environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    log = space / "log.txt"
    with log.open("w") as into:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stdout=into, stderr=into)
    try:
        page = read(f"http://127.0.0.1:{port}/", process, log)
    finally:
        process.terminate()
        process.wait(30)
    for shown in (
        "Several tokens per forward",
        "Jacobi with a drafter (lossless)",
        "StreamReader",
        ".replay .windows",
    ):
        assert shown in page


def read(address, process, log):
    until = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < until, log.read_text(encoding="utf-8")
            time.sleep(0.2)
