"""What verbs share: how they end, and what they ask of folders and packages."""

from __future__ import annotations

import os

import pytest
import typer
from safetensors import SafetensorError

from jacobi_hf.cli.verbs import check_folder, errors_in_one_line, need


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("wrong\n  in two lines"), SafetensorError("cut short")]
)
def test_bad_input_is_one_line_and_exit_code_2(error, capsys):
    with pytest.raises(typer.Exit) as ended, errors_in_one_line("verb"):
        raise error
    assert ended.value.exit_code == 2
    assert capsys.readouterr() == ("", f"jacobi-hf verb: {' '.join(str(error).split())}\n")


def test_what_is_no_bad_input_stays_as_it_is():
    with pytest.raises(ZeroDivisionError), errors_in_one_line("verb"):
        raise ZeroDivisionError


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


def test_folders_are_looked_at_and_not_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_folder(tmp_path / "new" / "deep")
    for path in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(ValueError, match=r"cannot be a folder: .*file is a file"):
            check_folder(path)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(ValueError, match=r"new cannot be written: .* is not writable; choose another folder"):
        check_folder(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_packages_that_are_missing_are_named_with_their_extra():
    need("train", "json", "typer")
    with pytest.raises(ValueError, match=r"needs no_such_package: pip install 'jacobi-hf\[train\]'"):
        need("train", "json", "no_such_package")
