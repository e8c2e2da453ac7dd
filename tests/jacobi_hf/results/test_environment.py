from __future__ import annotations

import torch

from jacobi_hf.results.environment import Hardware, Software, command_line


def test_the_machine_is_described():
    hardware = Hardware.of(torch.device("cpu"))
    assert hardware.cpu
    assert hardware.cores >= 1
    assert hardware.gpu is None


def test_versions_are_those_of_the_installed_packages():
    software = Software.installed()
    assert software.packages["torch"] == torch.__version__
    assert {"transformers", "jacobi-hf"} <= set(software.packages)


def test_a_command_line_shows_no_secret(monkeypatch):
    words = ["run.py", "--hub_token", "hf_" + "a" * 30, "--api-key=abc", "--max_new_tokens", "8", "x=hf_" + "b" * 30]
    monkeypatch.setattr("sys.argv", [*words, "--password", "secret"])
    assert command_line() == "run.py --hub_token ... --api-key=... --max_new_tokens 8 x=... --password ..."


def test_the_folder_of_a_program_is_not_shown(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/jacobi-hf", "eval"])
    assert command_line() == "jacobi-hf eval"
