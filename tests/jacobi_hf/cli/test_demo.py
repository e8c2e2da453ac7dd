"""The verb `demo`, in a terminal and on a page."""

from __future__ import annotations

import json
import sys

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from jacobi_hf.cli import app
from jacobi_hf.demo import page
from jacobi_hf.results.schema import Results
from tests.helpers.tiny import CHECKPOINT

run = CliRunner().invoke


def test_json_is_a_results_document():
    result = run(app, ["demo", "--json", "--max-new-tokens", "12"])
    assert result.exit_code == 0, result.output
    results = Results.model_validate(json.loads(result.stdout))
    for domain in ("code", "arithmetic", "prose"):
        ordinary, *jacobi = [m for m in results.measurements if m.prompts.domain == domain]
        assert (ordinary.decoder.name, ordinary.forwards) == ("generate", ordinary.new_tokens)
        assert [(m.model, m.decoder.drafter) for m in jacobi] == [
            ("examples/tiny_qwen3/checkpoint", None),
            ("examples/tiny_qwen3/forced", None),
            ("examples/tiny_qwen3/checkpoint", "examples/tiny_qwen3/drafter"),
        ]
        for m in jacobi:
            assert m.agreement.identical == 1
            assert m.forwards <= m.new_tokens


def test_a_prompt_of_ones_own_is_shown_side_by_side():
    result = run(app, ["demo", "--prompt", "def main(", "--max-new-tokens", "12"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert result.stdout.count("def main(") >= 2
    assert "12 tokens, 12 forwards" in result.stdout
    assert "yes" in result.stdout


@pytest.mark.parametrize("arguments", [["--model", "/nowhere/at/all"], ["--prompt", ""]])
def test_errors_are_one_line(arguments):
    result = run(app, ["demo", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("jacobi-hf demo: ")
    assert "Traceback" not in result.stderr


def test_without_gradio_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run(app, ["demo", "--web"])
    assert (result.exit_code, result.stderr) == (2, "jacobi-hf demo: --web needs gradio: pip install '.[demo]'\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json"], "--json and --web are two ways"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all is no model"),
        (["--drafter", "/nowhere/at/all"], "--drafter is for the model that --model names"),
        (["--model", str(CHECKPOINT), "--drafter", "/nowhere/at/all"], "/nowhere/at/all is no folder"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
        (["--max-new-tokens", "5000"], "5000 is more than the 1024"),
    ],
)
def test_bad_options_are_one_line(arguments, message):
    result = run(app, ["demo", "--web", *arguments, *([] if "--host" in arguments else ["--port", "0"])])
    assert result.exit_code == 2
    *progress, said = result.stderr.splitlines()
    assert said.startswith("jacobi-hf demo: ")
    assert message in said
    assert not [line for line in progress if line and "Loading weights" not in line]


def test_the_verb_serves_the_page(monkeypatch):
    served = {}

    def serve(server, sockets):
        served.update(port=sockets[0].getsockname()[1], page=TestClient(server.config.app).get("/").text)

    monkeypatch.setattr(page.Server, "run", serve)
    result = run(app, ["demo", "--web", "--port", "0", "--prompt", "Once upon a time", "--max-new-tokens", "37"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"The page is at http://127.0.0.1:{served['port']}, until Ctrl-C.\n"
    for shown in ("Once upon a time", "Jacobi with a drafter (lossless)", '"value":37', ".replay .windows"):
        assert shown in served["page"]
