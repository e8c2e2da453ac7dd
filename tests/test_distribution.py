"""Wheel and sdist: what they hold, and that the wheel runs without the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import jacobi_hf

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny_qwen3"
PACKAGES = {"jacobi_hf": "jacobi_hf", "trainer": "jacobi_hf/trainer", "hub_cards": "jacobi_hf/hub_cards"}


class Built(NamedTuple):
    """Wheel and sdist of `python -m build`, and the wheel that is built directly from the tree."""

    wheel: Path
    sdist: Path
    direct: Path


def _run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that sees neither this process's paths nor a Hub."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Build from a copy of the tree, since setuptools writes beside the sources and reads what earlier builds left."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    folder = tmp_path_factory.mktemp("dist")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree" / name, follow_symlinks=False)
    for options in (["--outdir", folder / "dist"], ["--wheel", "--outdir", folder / "direct"]):
        done = _run(sys.executable, "-m", "build", "--no-isolation", *options, "tree", cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (direct,) = (folder / "direct").glob("*.whl")
    return Built(wheel, sdist, direct)


class Elsewhere(NamedTuple):
    """A virtual environment with the wheel, and an empty working directory."""

    bin: Path
    folder: Path

    def jacobi_hf(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run the program that the wheel installed."""
        return _run(self.bin / "jacobi-hf", *arguments, cwd=self.folder)


@pytest.fixture(scope="module")
def elsewhere(built, tmp_path_factory) -> Elsewhere:
    """An environment with the wheel and the dependencies of the tests.

    It sees them through a .pth file. Python does not read the .pth files of the folders named there, so an editable
    install of this repository stays hidden.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    _run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder).check_returncode()
    python = folder / "venv" / "bin" / "python"
    install = (
        "--python",
        python,
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--disable-pip-version-check",
        built.wheel,
    )
    done = _run(sys.executable, "-m", "pip", *install, cwd=folder)
    assert done.returncode == 0, done.stderr
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    seen = [path for path in sys.path if path.endswith("-packages")]
    (packages / "dependencies.pth").write_text("\n".join(seen), encoding="utf-8")
    (folder / "empty").mkdir()
    return Elsewhere(python.parent, folder / "empty")


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(built):
    expected = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = set(_contents(built.wheel))
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {name.split("/")[0] for name in names} == {"jacobi_hf", f"jacobi_hf-{jacobi_hf.__version__}.dist-info"}
    assert "jacobi_hf/py.typed" in names


def test_the_sdist_builds_the_same_wheel_and_carries_no_tests_or_examples(built):
    assert _contents(built.wheel) == _contents(built.direct)
    with tarfile.open(built.sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    files = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert tops == {*PACKAGES, *files, "jacobi_hf.egg-info"}


@pytest.mark.slow
def test_what_is_imported_is_what_was_installed(elsewhere):
    program = (
        "import json, sys, importlib.metadata as m, jacobi_hf, jacobi_hf.trainer as t, jacobi_hf.hub_cards as h; "
        "[getattr(t, name) for name in t.__all__]; "
        "print(json.dumps([jacobi_hf.__file__, t.__file__, h.__file__, m.version('jacobi-hf'), sys.path]))"
    )
    done = _run(elsewhere.bin / "python", "-c", program, cwd=elsewhere.folder)
    assert done.returncode == 0, done.stderr
    *files, version, path = json.loads(done.stdout)
    assert all(Path(file).is_relative_to(elsewhere.bin.parent) for file in files)
    assert version == jacobi_hf.__version__
    assert str(ROOT) not in path


@pytest.mark.slow
def test_help_names_every_verb(elsewhere):
    from jacobi_hf.cli import app

    done = elsewhere.jacobi_hf("--help")
    assert done.returncode == 0, done.stderr
    for command in app.registered_commands:
        assert f" {command.name or command.callback.__name__} " in done.stdout


@pytest.mark.slow
def test_the_demo_without_the_repository_says_what_to_pass(elsewhere):
    done = elsewhere.jacobi_hf("demo")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--model" in done.stderr
    assert "--prompt" in done.stderr


@pytest.mark.slow
def test_info_says_what_is_installed(elsewhere):
    done = elsewhere.jacobi_hf("info", TINY / "checkpoint", "--json")
    assert done.returncode == 0, done.stderr
    assert jacobi_hf.__version__ in done.stdout
    assert "Qwen3ForCausalLM" in done.stdout


@pytest.mark.slow
def test_generate_writes_with_a_checkpoint_folder(elsewhere):
    done = elsewhere.jacobi_hf(
        "generate",
        "--model",
        TINY / "checkpoint",
        "--dtype",
        "float32",
        "--max-new-tokens",
        8,
        "--compare",
        "--json",
        "def",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["identical"] is True
