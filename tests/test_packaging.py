"""pyproject.toml, CI and docs agree with the files of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import jacobi_hf

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "jacobi_hf").rglob("__init__.py")}
    for beside in ("trainer", "hub_cards"):
        found |= {
            ".".join(("jacobi_hf", *path.parent.relative_to(ROOT).parts))
            for path in (ROOT / beside).rglob("__init__.py")
        }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize("folder", [ROOT, ROOT / "docs"])
def test_the_trainer_is_one_module_wherever_one_stands(folder):
    program = (
        "import sys, jacobi_hf.trainer as t; [getattr(t, n) for n in t.__all__]; assert 'trainer' not in sys.modules; "
        "assert sorted(m for m in sys.modules if m.endswith('.losses')) == ['jacobi_hf.trainer.forcing.losses']; "
        "print(t.__file__)"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).resolve() == ROOT / "trainer" / "__init__.py"


@pytest.mark.parametrize("package", ["trainer", "hub_cards"])
def test_packages_beside_jacobi_hf_are_linked_into_it(package):
    link = ROOT / "jacobi_hf" / package
    assert link.is_symlink()
    assert link.readlink() == Path("..") / package


def test_a_checkout_that_is_not_installed_imports_all_of_itself(tmp_path):
    """PYTHONPATH names the checkout, as for a git worktree beside the installed one."""
    for name in ("jacobi_hf", "trainer", "hub_cards"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    program = "import jacobi_hf, jacobi_hf.trainer as t, jacobi_hf.hub_cards as h; print(t.__file__, h.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert all(Path(file).is_relative_to(tmp_path) for file in found.stdout.split())


def test_public_names_of_the_trainer_exist_and_have_docstrings():
    import jacobi_hf.trainer

    assert sorted(jacobi_hf.trainer._MODULE_OF) == sorted(jacobi_hf.trainer.__all__)
    assert all(getattr(jacobi_hf.trainer, name).__doc__ for name in jacobi_hf.trainer.__all__)
    with pytest.raises(AttributeError, match="Jacobi"):
        jacobi_hf.trainer.Jacobi  # noqa: B018


@pytest.mark.parametrize("package", ["trainer", "hub_cards"])
def test_inside_a_package_everything_is_imported_by_its_full_name(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not re.search(rf"^\s*(from|import) ({package}|\.)", path.read_text(encoding="utf-8"), re.MULTILINE), (
            path.name
        )


def test_public_names_exist_and_have_docstrings():
    for name in jacobi_hf.__all__:
        assert getattr(jacobi_hf, name)
        if name != "__version__":
            assert getattr(jacobi_hf, name).__doc__


def test_constraints_pin_what_the_project_declares():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    declared = [
        *PROJECT["project"]["dependencies"],
        *(d for extra in PROJECT["project"]["optional-dependencies"].values() for d in extra),
    ]
    names = {requirement.split(">")[0].split("<")[0].split("[")[0].strip().lower() for requirement in declared}
    assert names - {"jacobi-hf"} <= pinned


def test_no_machine_paths_in_the_repository():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yml", ".json", ".txt", ""} and path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert "/" + "root/" not in text, name
            assert "/" + "work/" not in text, name


def test_the_docs_say_which_releases_of_transformers_are_supported():
    (declared,) = [d for d in PROJECT["project"]["dependencies"] if d.startswith("transformers")]
    for page in (ROOT / "README.md", ROOT / "docs" / "compatibility.md"):
        assert f"`{declared}`" in page.read_text(encoding="utf-8"), page.name


@pytest.mark.parametrize(
    "workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem
)
def test_workflows_run_what_is_there(workflow):
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    commands = "\n".join(step["run"] for job in jobs.values() for step in job["steps"] if "run" in step)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, value in 2 * re.findall(r"^(\w+) := ([^#\n]*)", makefile, re.MULTILINE):  # a value may name another
        makefile = makefile.replace(f"$({name})", value)
    targets = re.findall(r"^([\w/. -]+):(?!=)", makefile, re.MULTILINE)
    assert set(re.findall(r"^\s*make (\S+)", commands, re.MULTILINE)) <= {
        name for line in targets for name in line.split()
    }
    named = re.findall(r"(?:bash|python|pytest) (?:-\S+ )*((?:\.ci|tests|examples)\S*)", commands) + re.findall(
        r"\stests/\S+", commands
    )
    assert all((ROOT / path.strip()).exists() for path in named)
    assert all(job.get("timeout-minutes") for job in jobs.values())


def test_ci_tests_the_oldest_release_beside_the_newest_and_the_docs_show_what_came_out():
    from tests import versions

    numbers = [[int(n) for n in release.split(".")] for release in versions.RELEASES]
    assert numbers == sorted(numbers)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (tested,) = re.findall(r'make test-versions ARGS="([^"]*)"', ci)
    assert versions.RELEASES[0] in tested.split()
    assert set(tested.split()) <= set(versions.RELEASES)
    # All other tests of CI run with the newest one.
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\ntransformers=={versions.RELEASES[-1]}\n" in pinned
    results = json.loads(versions.RESULTS.read_text(encoding="utf-8"))
    assert set(versions.RELEASES) <= {result["transformers"] for result in results}
    assert f"{versions.BEGIN}\n{versions.table(results)}\n{versions.END}" in versions.PAGE.read_text(encoding="utf-8")


def test_every_tested_node_exists_and_is_counted_in_its_column():
    from tests import versions

    for column, names in versions.TESTS.items():
        for name in names:
            path, _, function = name.partition("::")
            assert (ROOT / path).exists()
            assert not function or f"def {function}(" in (ROOT / path).read_text(encoding="utf-8")
            assert versions.column_of(path.removesuffix(".py")) == column
