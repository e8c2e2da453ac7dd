"""The verb `push`: what reaches `push_to_hub`, and how its errors end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import jacobi_hf.hub_cards.push as publishing
from jacobi_hf.cli import app
from jacobi_hf.hub_cards.folder import stage
from jacobi_hf.hub_cards.push import Pushed, PushError
from tests.hub_cards.folders import CARD, make
from tests.hub_cards.hub import TOKEN, LoopbackHub

run = CliRunner().invoke
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "model")


@pytest.fixture
def asked(monkeypatch):
    """What the verb asks of `push_to_hub`."""
    calls = []

    def push_to_hub(folder, repo_id, **options):
        calls.append((folder, repo_id, options))
        return Pushed(repo_id, stage(folder), "https://hub/user/name/commit/1")

    monkeypatch.setattr(publishing, "push_to_hub", push_to_hub)
    return calls


@pytest.mark.slow
def test_a_folder_becomes_a_repository(folder, tmp_path):
    with LoopbackHub() as hub:
        command = [sys.executable, "-m", "jacobi_hf.cli", "push", str(folder), "user/name", "--private", "--json"]
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        told = json.loads(done.stdout)
        there = hub.files("user/name", "main")
    assert set(told["files"]) == set(there) - {".gitattributes"}
    assert {"README.md", "config.json", "model.safetensors", "custom_generate/generate.py"} <= set(told["files"])
    assert "user/name/commit/" in told["url"]
    assert TOKEN not in done.stdout + done.stderr


def test_a_dry_run_writes_what_would_be_sent(folder, tmp_path):
    (folder / "optimizer.log").write_text("x", encoding="utf-8")
    result = run(app, ["push", str(folder), "user/name", "--dry-run", str(tmp_path / "there")])
    assert result.exit_code == 0, result.output
    assert "nothing was sent" in result.stdout
    assert "left out  optimizer.log (not part of a model)" in result.stdout
    written = {str(path.relative_to(tmp_path / "there")) for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert written == set(stage(folder).files)
    assert all(name in result.stdout for name in written)


def test_options_reach_push_to_hub(asked, folder, tmp_path):
    card = tmp_path / "card.md"
    card.write_text(CARD, encoding="utf-8")
    options = [
        "--results",
        "a.json",
        "--results",
        "b.json",
        "--plots",
        "c.png",
        "--base-model",
        "u/base",
        "--no-private",
        "--revision",
        "v2",
    ]
    more = [
        "--license",
        "mit",
        "--language",
        "en",
        "--datasets",
        "u/a",
        "--datasets",
        "u/b",
        "--create-pr",
        "--commit-message",
        "better",
        "--card",
        str(card),
    ]
    result = run(app, ["push", str(folder), "user/name", *options, *more])
    assert result.exit_code == 0, result.output
    assert asked == [
        (
            folder,
            "user/name",
            {
                "card": CARD,
                "results": [Path("a.json"), Path("b.json")],
                "plots": [Path("c.png")],
                "base_model": "u/base",
                "license": "mit",
                "language": "en",
                "datasets": ["u/a", "u/b"],
                "private": False,
                "revision": "v2",
                "create_pr": True,
                "commit_message": "better",
                "dry_run": None,
            },
        )
    ]
    assert result.stdout.splitlines()[-1] == "https://hub/user/name/commit/1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "user/name"], "nowhere is not a folder"),
        (["FOLDER", "name"], "'user/name'"),
        (["FOLDER", "a/b/c"], "is not the name of a Hub repository"),
        (["FOLDER", "user/name", "--card", "nowhere.md"], "nowhere.md"),
        (["FOLDER", "user/name", "--results", "nowhere.json"], "nowhere.json"),
        (["FOLDER", "user/name", "--dry-run", "FOLDER"], "already exists"),
    ],
)
def test_errors_are_one_line(folder, arguments, message):
    result = run(app, ["push", *(str(folder) if one == "FOLDER" else one for one in arguments)])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("jacobi-hf push: ")
    assert message in line


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(PushError("no\nroom"), 2, "no room"), (KeyboardInterrupt(), 130, "has not changed")],
)
def test_a_refusal_and_an_interrupt_are_one_line(monkeypatch, folder, error, code, message):
    def push_to_hub(*_, **__):
        raise error

    monkeypatch.setattr(publishing, "push_to_hub", push_to_hub)
    result = run(app, ["push", str(folder), "user/name"])
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1)
    assert message in result.stderr
