from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from jacobi_hf.results.schema import Agreement, Decoder, Measurement, Prompts, Results, Strategy, Training
from tests.helpers.models import tiny_model


def document(model):
    measurement = Measurement(
        decoder=Decoder(name="jacobi", kind="jacobi", block_size=16),
        prompts=Prompts(domain="code", source="made up", count=1, max_new_tokens=8),
        tokens_per_forward=1.5,
        ms_per_forward={17: 2.5},
        agreement=Agreement(baseline="generate", identical=1, total=1),
    )
    return Results.start("a test", model, "tiny").with_measurements([measurement])


def test_what_is_written_is_read(tmp_path, model):
    results = document(model)
    results.write(tmp_path / "sub" / "results.json")
    assert Results.read(tmp_path / "sub" / "results.json") == results
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["results.json"]


def test_the_document_says_where_it_comes_from(model):
    results = document(model)
    assert results.threads == 1
    assert results.dtype == "float32"
    assert results.parameters == model.num_parameters()
    assert {"torch", "transformers", "jacobi-hf"} <= set(results.software.packages)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("dtype"), "dtype"),
        (lambda d: d.update(speed=3), "speed"),
        (lambda d: d.update(schema_version=2), "schema_version"),
        (lambda d: d["measurements"][0]["decoder"].update(kind="beam"), "kind"),
    ],
)
def test_what_does_not_fit_the_schema_is_named(tmp_path, model, change, named):
    content = json.loads(document(model).model_dump_json())
    change(content)
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValidationError, match=named):
        Results.read(tmp_path / "results.json")


@pytest.mark.parametrize(("old", "new"), [("forcing", "finetune"), ("gated", "drafter")])
def test_a_former_method_is_named_by_its_new_name(old, new):
    with pytest.raises(ValidationError, match=f'"{old}" is now "{new}": rename it'):
        Training.model_validate({"method": old})


@pytest.mark.parametrize(
    ("strategy", "named"),
    [
        ({"schedule": "progressive", "block_size": 16, "window": 8}, "window is now noise_levels"),
        ({"schedule": "gated", "block_size": 16, "window": 5, "visits": 3}, 'schedule "gated" is now "drafter"'),
    ],
)
def test_a_former_strategy_is_named_by_its_new_names(strategy, named):
    with pytest.raises(ValidationError, match=named):
        Strategy.model_validate(strategy)


def test_a_documents_command_shows_no_secret(monkeypatch):
    words = [
        "run.py",
        "--hub_token",
        "hf_" + "a" * 30,
        "--api-key=abc",
        "--max_new_tokens",
        "8",
        "x=hf_" + "b" * 30,
        "--password",
        "secret",
    ]
    monkeypatch.setattr("sys.argv", words)
    command = Results.start("a test", tiny_model("qwen3"), "tiny").command
    assert command == "run.py --hub_token ... --api-key=... --max_new_tokens 8 x=... --password ..."
