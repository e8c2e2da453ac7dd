from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jacobi_hf.cli import app
from jacobi_hf.results.schema import Results

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
