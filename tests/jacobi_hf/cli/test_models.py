"""Missing and broken models: each verb refuses them in one line, before work starts."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from jacobi_hf.cli import app
from jacobi_hf.cli._models import check_decoder
from jacobi_hf.loading import load
from tests.helpers.models import tiny_model
from tests.helpers.tiny import EXAMPLE

run = CliRunner().invoke
CHECKPOINT, DRAFTER = (str(EXAMPLE / name) for name in ("checkpoint", "drafter"))


def changed(folder, **fields):
    """A copy of the checkpoint with a changed config."""
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")
    return str(folder)


def without_tokenizer(folder):
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return str(folder)


def verbs(model, tmp_path):
    """The command line of each verb that takes a model."""
    prompts, out = str(EXAMPLE / "newcomer.jsonl"), str(tmp_path / "out")
    return [
        ["info", model],
        ["generate", "--model", model, "hi"],
        ["chat", "--model", model],
        ["serve", model, "--port", "0"],
        ["demo", "--model", model, "--prompt", "hi"],
        ["autotune", "--model", model, "--prompts", prompts],
        ["collect", "--model", model, "--dataset", prompts, "--output_dir", out],
        ["train", "--model", model, "--train_dataset", out, "--output_dir", out],
        ["bench", "--model", model, "--prompts", str(EXAMPLE / "prompts.json"), "--output", out],
    ]


def said_by(arguments):
    result = run(app, arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("jacobi-hf ")]
    return line.removeprefix(f"jacobi-hf {arguments[0]}: ")


def test_every_verb_refuses_a_path_that_holds_no_model(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("nowhere", "there is no such folder"),
        ("file", "is a file"),
        ("empty", "is a folder without config.json"),
    ]:
        model = str(tmp_path / name)
        for arguments in verbs(model, tmp_path):
            said = said_by(arguments)
            assert said.startswith(model), arguments
            assert message in said, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_drafter_is_refused_as_a_model():
    assert said_by(["generate", "--model", DRAFTER, "hi"]) == (
        f"{DRAFTER} is a drafter: name the model that it is for, and this folder with --drafter."
    )


def test_configs_that_are_broken_name_the_model(tmp_path):
    model = changed(tmp_path / "types", hidden_size="abc")
    for arguments in verbs(model, tmp_path):
        said = said_by(arguments)
        assert said.startswith(f"{model} cannot be "), arguments
        assert "'hidden_size' expected int, got str" in said, arguments


@pytest.mark.parametrize("drafter", [False, True])
def test_weights_of_another_shape_name_the_model(tmp_path, drafter):
    model = changed(tmp_path / "shape", intermediate_size=1536)
    said = said_by(["generate", "--model", model, "hi", *(["--drafter", DRAFTER] if drafter else [])])
    assert said.startswith(f"{model} cannot be loaded as a causal language model: ")


def test_a_model_without_a_tokenizer(tmp_path):
    model = without_tokenizer(tmp_path / "model")
    assert (
        said_by(["generate", "--model", model, "hi"])
        == f"the tokenizer of {model} returns no tokens for 'hi'. Check the tokenizer's files."
    )


def test_a_model_of_another_class_is_shown_too(tmp_path):
    tiny_model("mistral").save_pretrained(tmp_path)
    words = {"t": 0, "a": 1, "b": 2}
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t").save_pretrained(tmp_path)
    result = run(app, ["demo", "--model", str(tmp_path), "--prompt", "a b a b", "--max-new-tokens", "4", "--json"])
    assert result.exit_code == 0, result.output
    assert [m["new_tokens"] for m in json.loads(result.stdout)["measurements"]] == [4, 4]


@pytest.mark.parametrize(
    "verb", [["demo", "--prompt", "hi"], ["autotune", "--prompts", str(EXAMPLE / "newcomer.jsonl")]]
)
def test_texts_that_are_longer_than_the_model_are_refused(verb):
    assert "more than the model's 2048 positions: give fewer --max-new-tokens" in said_by(
        [*verb, "--model", CHECKPOINT, "--max-new-tokens", "2048"]
    )


def test_a_decoder_without_jacobi_decoding_is_refused():
    with pytest.raises(ValueError, match="decodes ordinarily"):
        check_decoder("mine", {"decoding": None})


def test_a_saved_knob_that_is_misspelt_is_refused_when_decoding_as_info_says(tmp_path):
    folder = changed(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"jacobi_blok_size": 4}', encoding="utf-8")
    assert "'jacobi_blok_size' is not a knob" in said_by(["generate", "--model", folder, "hi"])
    model, tokenizer = load(folder, "float32")
    ids = tokenizer("hi", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=2, decoding=None).shape[1] == ids.shape[1] + 2
