"""How verbs end, and their checks of folders and packages."""

from __future__ import annotations

import os

import pytest
import typer
from safetensors import SafetensorError
from typer.testing import CliRunner

from jacobi_hf.cli import app
from jacobi_hf.cli._errors import check_folder, errors_in_one_line, need
from jacobi_hf.config import KNOBS

run = CliRunner().invoke


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("wrong\n  in two lines"), SafetensorError("cut short")],
)
def test_bad_input_is_one_line_and_exit_code_2(error, capsys):
    with pytest.raises(typer.Exit) as ended, errors_in_one_line("verb"):
        raise error
    assert ended.value.exit_code == 2
    assert capsys.readouterr() == ("", f"jacobi-hf verb: {' '.join(str(error).split())}\n")


def test_other_errors_are_one_line_and_exit_code_1(capsys):
    with pytest.raises(typer.Exit) as ended, errors_in_one_line("verb"):
        raise RuntimeError("out of memory\nof the device")
    assert ended.value.exit_code == 1
    said = "jacobi-hf verb: RuntimeError: out of memory of the device (jacobi-hf --traceback verb .. shows where)\n"
    assert capsys.readouterr() == ("", said)
    for passed in (typer.Exit(3), typer.BadParameter("of a single option"), SystemExit(4)):
        with pytest.raises(type(passed)) as raised, errors_in_one_line("verb"):
            raise passed
        assert raised.value is passed
    assert capsys.readouterr() == ("", "")


RECIPES = [
    ("generate", "max_new_tokns: 3", "'max_new_tokns' is no option of generate; did you mean 'max_new_tokens'?"),
    ("generate", "1: 3", "1 is no option of generate."),
    ("generate", "model: {a: 3}", "model takes one value; it is {'a': 3}."),
    ("generate", "decoding:", "decoding is empty. Ordinary decoding is written none"),
    ("eval", "decoders: [a]", "decoders takes one value; it is ['a']."),
    ("serve", "compiled: true", "'compiled' is no option of serve; did you mean 'compile'?"),
]


@pytest.mark.parametrize(("verb", "option", "message"), RECIPES)
def test_faults_of_a_recipe_are_one_line(verb, option, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{verb}:\n  {option}\n", encoding="utf-8")
    result = run(app, [verb, "--config", str(tmp_path / "recipe.yaml")])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"jacobi-hf {verb}: {tmp_path}")
    assert message in line


@pytest.mark.parametrize(
    ("option", "message"), [("max_new_tokens: true", "--max-new-tokens"), ("max_new_tokens: 2.5", "--max-new-tokens")]
)
def test_a_recipes_values_are_read_as_those_of_the_command_line(option, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"generate:\n  {option}\n", encoding="utf-8")
    result = run(app, ["generate", "--config", str(tmp_path / "recipe.yaml"), "--model", str(tmp_path), "prompt"])
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]


def test_a_recipe_names_options_as_the_command_line_does(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"serve:\n  model: {tmp_path}\n  compile: true\n  port: 0\n", encoding="utf-8"
    )
    result = run(app, ["serve", "--config", str(tmp_path / "recipe.yaml")])
    assert result.stderr == f"jacobi-hf serve: {tmp_path} is a folder without config.json: it holds no model.\n"


@pytest.mark.parametrize("verb", ["generate", "chat", "eval", "serve"])
def test_help_has_whole_names_in_narrow_terminals(verb):
    said = run(app, [verb, "--help"], env={"COLUMNS": "80"}).stdout
    assert all(f"--{knob.replace('_', '-')} " in said for knob in KNOBS)
    assert "\u2026" not in said
    assert "..." not in run(app, ["--help"], env={"COLUMNS": "80"}).stdout.split("Commands:")[1]


def test_an_interruption_says_what_is_kept_at_that_moment(capsys):
    rows = []

    def verb():
        with errors_in_one_line("verb") as ending:
            ending.kept = lambda: f"{len(rows)} rows are kept"
            rows.append(1)
            raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        verb()
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "jacobi-hf verb: interrupted; 1 rows are kept.\n"
    with pytest.raises(typer.Exit), errors_in_one_line("verb"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "jacobi-hf verb: interrupted; nothing is kept.\n"


def test_folders_are_checked_and_not_created(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_folder(tmp_path / "new" / "deep")
    for path in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(ValueError, match=r"cannot be a folder: .*file is a file"):
            check_folder(path)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(ValueError, match=r"new cannot be written: .* is not writable; choose another folder"):
        check_folder(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_missing_packages_are_named_with_their_extra():
    need("train", "json", "typer")
    with pytest.raises(ValueError, match=r"needs no_such_package: pip install 'jacobi-hf\[train\]'"):
        need("train", "json", "no_such_package")
