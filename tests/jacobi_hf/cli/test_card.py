"""The verb `card`: the README.md that it writes, and what it refuses."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from jacobi_hf.cli import app
from jacobi_hf.hub_cards.card import generate_model_card
from jacobi_hf.hub_cards.folder import stage
from tests.helpers.tiny import EXAMPLE
from tests.hub_cards.folders import make

run = CliRunner().invoke
RESULTS = EXAMPLE.parent / "benchmarks" / "results"
FORCED = [RESULTS / "peers.json", RESULTS / "forcing" / "forced-seed42.json"]


@pytest.fixture
def folder(tmp_path):
    made = make(tmp_path / "model")
    (made / "README.md").unlink()
    return made


def test_the_card_is_that_of_the_python_function_and_can_be_pushed(folder):
    options = ["--license", "apache-2.0", "--language", "en", "--base-model", "user/base", "--measured-as", "forced"]
    files = [word for path in FORCED for word in ("--results", str(path))]
    result = run(app, ["card", str(folder), "user/name", *options, *files, "--measured-as", "forced-seed42"])
    assert (result.exit_code, result.stdout) == (0, f"{folder / 'README.md'}\n"), result.output
    wanted = generate_model_card(
        FORCED,
        repo_id="user/name",
        license="apache-2.0",
        language="en",
        base_model="user/base",
        measured_as=["forced", "forced-seed42"],
    )
    written = (folder / "README.md").read_text(encoding="utf-8")
    assert written == str(wanted)
    assert ModelCard(written).data.license == "apache-2.0"
    assert "README.md" in stage(folder).files
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("kind", ["adapter", "drafter"])
def test_cards_of_adapters_and_drafters_name_their_base(tmp_path, kind):
    made = make(tmp_path / kind, kind)
    result = run(
        app, ["card", str(made), "user/name", "--license", "mit", "--output", str(tmp_path / "new" / "card.md")]
    )
    assert result.exit_code == 0, result.output
    assert ModelCard.load(tmp_path / "new" / "card.md").data.base_model == "user/base"


def test_a_recipe_holds_the_inputs(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"card: {{license: mit, language: [en, de], results: [{FORCED[1]}]}}", encoding="utf-8")
    result = run(app, ["card", str(folder), "user/name", "--config", str(recipe)])
    assert result.exit_code == 0, result.output
    assert ModelCard.load(folder / "README.md").data.language == ["en", "de"]


def test_an_existing_card_is_replaced_only_with_overwrite(folder):
    (folder / "README.md").write_text("mine", encoding="utf-8")
    refused = run(app, ["card", str(folder), "user/name", "--license", "mit"])
    assert (refused.exit_code, "--overwrite replaces it" in refused.stderr) == (2, True)
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
    assert run(app, ["card", str(folder), "user/name", "--license", "mit", "--overwrite"]).exit_code == 0
    assert "mine" not in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "user/name"], "nowhere"),
        (["FOLDER", "user/na me"], "is not the name of a Hub repository"),
        (["FOLDER", "user/name"], "license"),
        (["FOLDER", "user/name", "--license", "mit", "--results", "nowhere.json"], "nowhere.json"),
        (["FOLDER", "user/name", "--license", "mit", "--results", "FOLDER/config.json"], "config.json"),
        (["FOLDER", "user/name", "--license", "mit", "--description", "x"], "for data sets"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(folder, arguments, message):
    result = run(app, ["card", *(one.replace("FOLDER", str(folder)) for one in arguments)])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("jacobi-hf card: ")
    assert message in line
    assert not (folder / "README.md").exists()


def test_options_of_models_are_refused_for_data_sets(tmp_path):
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    for options, message in (
        (["--base-model", "x"], "they are for models"),
        ([], "--license is missing"),
        (["--license", "mit"], "manifest"),
    ):
        result = run(app, ["card", str(tmp_path), "user/name", *options])
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
