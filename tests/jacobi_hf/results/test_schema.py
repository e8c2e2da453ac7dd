from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from jacobi_hf.results import environment, schema, training
from jacobi_hf.results.environment import Part
from jacobi_hf.results.schema import Agreement, Decoder, Measurement, Prompts, Quality, Results
from jacobi_hf.results.training import Training, TrainingDrafts


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
        TrainingDrafts.model_validate(strategy)


def test_an_agreement_lists_the_prompts_whose_outputs_differ():
    found = Agreement.between([[1, 2], [3], [4]], [[1, 2], [3, 3], [5]], "ordinary")
    assert found == Agreement(baseline="ordinary", identical=1, total=3, different=[1, 2])


def test_the_interval_is_wilsons():
    quality = Quality.of_share("x", 3, 10)
    for edge in (quality.low, quality.high):  # where the statistic of the score test is 1.96
        assert abs(0.3 - edge) / math.sqrt(edge * (1 - edge) / 10) == pytest.approx(1.96)


PARTS = [
    part
    for module in (environment, schema, training)
    for part in vars(module).values()
    if isinstance(part, type) and issubclass(part, Part) and part.__module__ == module.__name__
]


@pytest.mark.parametrize("part", PARTS)
def test_every_field_says_what_it_is_in_one_sentence(part):
    for name, field in part.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert ". " not in field.description, name
