"""The benchmarks run, and the pages of results show their documents."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from jacobi_hf.results.schema import Results
from tests.helpers.models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"


def run(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_compare_writes_a_results_document(tmp_path):
    out = tmp_path / "compare.json"
    printed = run(
        BENCHMARKS / "decode.py", "compare", "--prompts", 1, "--max-new-tokens", 8, "--no-compiled", "--output", out
    )
    assert printed.splitlines()[-1] == str(out)
    results = Results.read(out)
    assert {m.prompts.domain for m in results.measurements} == {"code", "arithmetic", "prose"}
    assert all(m.agreement and m.agreement.identical == 1 for m in results.measurements)
    assert all((m.tokens_per_forward or 0) >= 1 for m in results.measurements)


def test_peers_resumes_only_measurements_of_the_same_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    peers = importlib.import_module("peers")
    document = Results.start("a test", tiny_model("qwen3"), "tiny")
    measurements = Results.read(BENCHMARKS / "results" / "peers.json").measurements
    document.with_measurements(measurements).write(tmp_path / "peers.json")
    assert peers.kept(tmp_path / "peers.json", document) == measurements
    other = document.model_copy(update={"software": document.software.model_copy(update={"git_revision": "another"})})
    with pytest.raises(typer.BadParameter, match="measured with another software"):
        peers.kept(tmp_path / "peers.json", other)


def test_cells_of_the_adaptive_benchmark_have_names_that_the_page_can_split(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cells = importlib.import_module("adaptive_cells").cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    page = importlib.import_module("report.adaptive")
    document = Results.start("a test", tiny_model("qwen3"), "tiny")
    for cell in cells:
        key = page.Cell(cell.name, document).key
        assert key[:3] == [cell.model, cell.text, cell.dtype]
        assert (int(key[3]), int(key[4]), key[5] == "compiled") == (cell.rows, cell.temperature, cell.compiled)
        assert key[0] in page.ORDER


@pytest.mark.slow
def test_a_cell_of_the_adaptive_benchmark_is_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    adaptive = importlib.import_module("adaptive")
    cell_type = importlib.import_module("adaptive_cells").Cell
    for name, value in (("prompts", 2), ("tokens", 8), ("rounds", 1)):
        monkeypatch.setattr(cell_type, name, value)
    cell = cell_type("forced", "arithmetic")
    adaptive.run_cell(cell, {}, tmp_path, tmp_path, before=False)
    found = importlib.import_module("report.adaptive").Cell(
        cell.name, Results.read(tmp_path / "forced-arithmetic-fp32-b1-t0-eager.json")
    )
    assert found.later > 0
    assert found.first > 0
    assert found.of_best == found.later / found.best.speedups[0].factor
    assert found.cost_of_8 > 0
    assert found.ours.agreement.identical == found.ours.agreement.total == 2


@pytest.mark.slow
def test_the_gpu_script_runs_its_parts_on_a_cpu_too(tmp_path):
    """Tests, step_cost.py and growth.py run at tiny shapes, and each writes its document."""
    environment = {
        **os.environ,
        "DRY": "1",
        "PARTS": "tests steps growth",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", BENCHMARKS / "gpu.sh", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    log = (tmp_path / "gpu.log").read_text(encoding="utf-8")
    assert done.returncode == 0, log[-3000:]
    statuses = [line.split("\t")[:2] for line in (tmp_path / "parts.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    assert statuses == [["tests", "0"], ["step_cost-tiny", "0"], ["growth", "0"]]
    replayed = [m for m in Results.read(tmp_path / "step_cost-tiny.json").measurements if m.prompts.domain == "replay"]
    assert all(m.extra.get("same_text", True) for m in replayed)
    grown = Results.read(tmp_path / "growth.json").measurements
    assert {m.prompts.domain for m in grown} == {"context", "batch", "new tokens"}
    assert all(m.extra["ms"]["step"] >= m.extra["ms"]["forward"] > 0 for m in grown)


def test_the_gpu_script_keeps_what_finished_when_a_part_fails(tmp_path):
    environment = {**os.environ, "DRY": "1", "PARTS": "tests steps", "PYTHON": str(tmp_path / "python")}
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ncase "$*" in "-m pytest"*) exit 3;; *) exec {sys.executable} --version;; esac\n'
    )
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", BENCHMARKS / "gpu.sh", tmp_path], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert [line.split("\t")[:2] for line in done.stdout.splitlines()] == [["tests", "3"], ["step_cost-tiny", "0"]]


DOCUMENTS = {str(path.relative_to(BENCHMARKS / "results")) for path in (BENCHMARKS / "results").rglob("*.json")}
INPUTS = {"adaptive_traces.json"}  # what a script reads, and no results


@pytest.mark.parametrize("name", sorted(DOCUMENTS - INPUTS))
def test_stored_documents_fit_the_schema(name):
    results = Results.read(BENCHMARKS / "results" / name)
    assert results.measurements or results.costs
    assert results.command


def test_the_pages_of_results_show_the_documents(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pages = importlib.import_module("report").pages()
    written = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "results").iterdir()}
    assert written == pages


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_script_finds_what_it_uses_of_the_package(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert importlib.import_module(name).__doc__


def _readme_script():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import readme
    finally:
        sys.path.remove(str(BENCHMARKS))
    return readme


def test_the_table_of_the_readme_shows_the_documents():
    script = _readme_script()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.table() in text
    assert script.with_table(text) == text
    stale = text.replace(script.table(), script.BEGIN + "| old |\n" + script.END)
    assert script.with_table(stale) == text


def test_the_picture_of_the_readme_shows_the_documents(tmp_path):
    from PIL import Image

    script = _readme_script()
    assert json.loads(Image.open(script.PICTURE).text["Description"]) == script.bars()
    assert str(script.PICTURE.relative_to(ROOT)) in (ROOT / "README.md").read_text(encoding="utf-8")
    script.draw(script.bars(), tmp_path / "drawn.png")
    assert Image.open(tmp_path / "drawn.png").size == Image.open(script.PICTURE).size


@pytest.mark.parametrize("per_forward", [1.74, 2.0, 4.1])
def test_a_replay_has_the_given_tokens_per_forward(per_forward, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    replay = importlib.import_module("replay")
    model = tiny_model("qwen3")
    ids = torch.tensor([[3, 4, 5]])
    tokens = 123
    arguments = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    reference = model.generate(ids, **arguments).sequences
    truth = torch.cat([reference[:, 3:], reference[:, -1:].expand(-1, 160)], 1)
    with replay.replayed(truth, per_forward):
        output = model.generate(
            ids,
            **arguments,
            decoding="jacobi_multiblock",
            jacobi_schedule="constant",
            jacobi_block_size=4,
            jacobi_max_blocks=16,
            jacobi_pool_size=0,
            jacobi_lookup_tokens=0,
        )
    assert torch.equal(output.sequences, reference)
    # The prefill commits one token, and the last forward can end early.
    assert output.jacobi_stats.forwards - 1 == pytest.approx((tokens - 1) / per_forward, abs=1.5)


def test_the_simulation_replays_what_the_lookup_does(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    traces = importlib.import_module("adaptive_traces")
    assert traces.looked_up([1, 2, 3, 9, 2, 3], length=5) == (2, [9, 2, 3, 9, 2])
    assert traces.looked_up([1, 2, 3], length=5) == (0, [])
    assert traces.looked_up([4, 4], length=3) == (1, [4, 4, 4])
    for domains in traces.read().values():
        for text in (text for texts in domains.values() for text in texts):
            assert len(text.order) == len(text.lookup) == len(text.window) == len(text.others)
            assert all(order != "0" or found == "0" for order, found in zip(text.order, text.lookup, strict=True))


def test_a_cell_of_the_simulation_is_never_far_below_ordinary_decoding(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    simulation = importlib.import_module("adaptive_simulation")
    cell = next(cell for cell in simulation.cells(1) if cell.model == simulation.HOPELESS)
    measured = cell.measured(1)
    assert 0.9 < measured.extra["first_call"] <= 1.001
    assert 0.95 < measured.speedups[0].factor <= 1.001
