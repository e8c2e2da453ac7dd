"""The verb `autotune`: strategies that it measures, its results and where it saves them."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from transformers import GenerationConfig
from typer.testing import CliRunner

import jacobi_hf.tuning.autotune
from jacobi_hf.cli import app
from jacobi_hf.config import JacobiConfig
from jacobi_hf.tuning.autotune import Tuning
from jacobi_hf.tuning.strategies import ASSISTED, describe
from jacobi_hf.tuning.timing import Timing
from tests.helpers.tiny import EXAMPLE

run = CliRunner().invoke
FORCED, CHECKPOINT, DRAFTER, DRAFT = (str(EXAMPLE / name) for name in ("forced", "checkpoint", "drafter", "draft"))
FOUND = JacobiConfig(jacobi_block_size=8, jacobi_max_blocks=1, jacobi_pool_size=0)


def tuned(fastest, *others):
    timings = [Timing(strategy, 2, 2.0, 9.0, 1.5, 1.25, 1.1, 1.4) for strategy in (fastest, *others)]
    return Tuning(fastest, timings, {}, untried=(JacobiConfig.paper(),))


@pytest.fixture
def asked(monkeypatch):
    """The calls of `autotune` that the verb makes; each call finds `FOUND`."""
    calls = []

    def autotune(model, prompts, **options):
        calls.append((model, prompts, options))
        return tuned(FOUND, None)

    monkeypatch.setattr(jacobi_hf.tuning.autotune, "autotune", autotune)
    return calls


@pytest.fixture
def folder(tmp_path):
    """A copy of the forced model that may be written to."""
    return shutil.copytree(EXAMPLE / "forced", tmp_path / "model")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("def main(\n\nimport os\n", encoding="utf-8")
    return str(file)


def test_strategies_are_measured_and_the_fastest_is_reported(prompts):
    options = ["--model", FORCED, "--prompts", prompts, "--max-new-tokens", "4", "--seconds", "2"]
    result = run(app, ["autotune", *options, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["prompts"] == 2
    assert report["fastest"] == report["table"][0]
    assert report["recommended"] in report["table"]
    assert "ordinary decoding" in [one["strategy"] for one in report["table"]]
    assert report["saved"] is None
    assert "autotune" not in result.stderr  # no bar beside JSON


def test_options_reach_autotune(asked, prompts):
    options = [
        "--batch-size",
        "2",
        "--seconds",
        "7",
        "--max-new-tokens",
        "9",
        "--temperature",
        "0.5",
        "--compile",
        "--dtype",
        "float32",
    ]
    result = run(app, ["autotune", "--model", CHECKPOINT, "--drafter", DRAFTER, "--prompts", prompts, *options])
    assert result.exit_code == 0, result.output
    ((model, ids, given),) = asked
    assert len(ids) == 2
    assert jacobi_hf.drafts.loading.drafter_of(model) is not None
    assert given.pop("compile_config") is not None
    wanted = {
        "batch_size": 2,
        "seconds": 7.0,
        "max_new_tokens": 9,
        "do_sample": True,
        "temperature": 0.5,
        "assistant_model": None,
    }
    assert given == {**wanted, "progress": True}
    assert f"recommended: {describe(FOUND)}, 1.25 times" in " ".join(result.stdout.split())
    assert "jacobi_block_size=8" in result.stdout
    assert "no time for: n=64" in result.stdout


def test_a_draft_model_is_tried(monkeypatch, prompts):
    monkeypatch.setattr(
        jacobi_hf.tuning.autotune,
        "autotune",
        lambda *_, **given: tuned(ASSISTED) if given["assistant_model"] else None,
    )
    result = run(app, ["autotune", "--model", FORCED, "--assistant-model", DRAFT, "--prompts", prompts, "--json"])
    assert json.loads(result.stdout)["fastest"]["strategy"] == ASSISTED


def test_the_fastest_setting_is_saved_with_the_model(asked, prompts, folder):
    result = run(app, ["autotune", "--model", str(folder), "--prompts", prompts, "--save"])
    assert result.exit_code == 0, result.output
    saved = GenerationConfig.from_pretrained(folder)
    assert JacobiConfig.from_generation_config(saved) == FOUND
    assert saved.eos_token_id == 0
    assert f"saved in {folder}" in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (EXAMPLE / "forced").iterdir()
    )


def test_ordinary_decoding_is_saved_as_no_decoding(monkeypatch, prompts, folder):
    monkeypatch.setattr(jacobi_hf.tuning.autotune, "autotune", lambda *_, **__: tuned(None))
    assert run(app, ["autotune", "--model", str(folder), "--prompts", prompts, "--save"]).exit_code == 0
    saved = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert not [name for name in saved if name.startswith(("jacobi", "decoding")) and saved[name] is not None]


def test_what_is_not_surely_faster_is_not_saved(monkeypatch, prompts, folder):
    before = (folder / "generation_config.json").read_bytes()
    unsure = [Timing(FOUND, 2, 2.0, 9.0, 1.5, 1.25, 0.9, 1.4), Timing(None, 2, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0)]
    monkeypatch.setattr(jacobi_hf.tuning.autotune, "autotune", lambda *_, **__: Tuning(FOUND, unsure, {}))
    result = run(app, ["autotune", "--model", str(folder), "--prompts", prompts, "--save"])
    assert result.exit_code == 0, result.output
    assert "nothing saved: no setting is surely faster" in result.stdout
    assert (folder / "generation_config.json").read_bytes() == before


def test_ctrl_c_saves_nothing(monkeypatch, prompts, folder):
    before = (folder / "generation_config.json").read_bytes()
    monkeypatch.setattr(jacobi_hf.tuning.autotune, "autotune", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    result = run(app, ["autotune", "--model", str(folder), "--prompts", prompts, "--save"])
    assert (result.exit_code, "interrupted; nothing is kept" in result.stderr) == (130, True)
    assert (folder / "generation_config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--model", "nowhere/at/all"], "nowhere/at/all is no model"),
        (["--model", "some/name", "--save"], "writes into the model's folder"),
        (["--seconds", "0"], "seconds=0"),
        (["--save", "--assistant-model", DRAFT], "Drop one of the two"),
        (["--assistant-model", "nowhere/at/all"], "is no model"),
        (["--temperature", "0"], "temperature=0"),
        (["--max-new-tokens", "1"], "max_new_tokens=1"),
    ],
)
def test_errors_are_one_line(prompts, arguments, message):
    result = run(app, ["autotune", "--model", FORCED, "--prompts", prompts, *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("jacobi-hf")]
    assert line.startswith("jacobi-hf autotune: ")
    assert message in line


def test_a_folder_that_cannot_be_written_to_is_reported_before_anything_is_measured(
    asked, prompts, folder, monkeypatch
):
    monkeypatch.setattr("os.access", lambda _, mode, **__: mode != os.W_OK)
    result = run(app, ["autotune", "--model", str(folder), "--prompts", prompts, "--save"])
    assert (result.exit_code, "is not writable" in result.stderr, asked) == (2, True, [])
