"""`make test-versions`: the tests of what depends on transformers, on each release that is claimed to work.

    python -m tests.versions                    # the releases of docs/compatibility.md
    python -m tests.versions 5.5.4 5.24.0       # some of them
    python -m tests.versions 5.17.0+torch2.11.0 # with another torch
    python -m tests.versions --record           # and write down what came out

Each release gets an environment of its own under build/versions: the packages of this environment, and over them the
release with the dependencies that it asks for. With `--record` the counts go to
tests/versions.json, and the table of docs/compatibility.md is written from that file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import site
import subprocess
import sys
import venv
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "build" / "versions"
RESULTS = ROOT / "tests" / "versions.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- written by make test-versions ARGS=--record -->", "<!-- end -->"
RELEASES = ("5.5.4", "5.10.4", "5.17.0", "5.19.0", "5.23.0", "5.24.0")
EQUALITY_CASES = 300
# What runs on each release, by the column of the table that counts it.
TESTS = {
    "equality": ("tests/jacobi_hf/test_equality.py::test_same_as_generate",),
    "hooks": (
        "tests/jacobi_hf/integration",
        "tests/jacobi_hf/decoding/test_cache.py",
        "tests/field/test_architectures.py",
        "tests/field/test_arguments.py",
        "tests/field/test_limits.py",
        "tests/field/test_turns.py",
    ),
    "drafter": (
        "tests/jacobi_hf/drafts/test_lora.py::test_save_load_and_unload",
        "tests/jacobi_hf/drafts/test_lora.py::test_compiled_steps",
    ),
    "trainer": (
        "tests/trainer/forcing/test_trainer.py::test_gradient_checkpointing_changes_nothing",
        "tests/trainer/forcing/test_trainer.py::test_lora_leaves_the_base_untouched",
        "tests/trainer/forcing/test_trainer.py::test_the_checkpoint_is_plain_and_decodes_as_it_says",
        "tests/trainer/drafter/test_trainer.py::test_the_drafter_learns_and_the_model_stays_the_same",
    ),
}
_VERSIONS = (
    "import json, torch, transformers, peft; print(json.dumps([m.__version__ for m in (transformers, torch, peft)]))"
)


def environment(release: str) -> Path:
    """Return the Python of a release's environment, made where it is missing.

    Args:
        release: a version of transformers, or that and a version of torch: `5.17.0+torch2.11.0`.
    """
    folder = ENVIRONMENTS / release
    python = folder / "bin" / "python"
    if (folder / "installed").exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    seen = [path for path in site.getsitepackages() if Path(path).is_dir()]
    # Its own packages come first; `addsitedir` also follows the .pth files there, such as that of an editable install.
    lines = [f"import site; site.addsitedir({path!r})" for path in seen]
    (packages / "tests.pth").write_text("\n".join(lines), encoding="utf-8")
    transformers, _, torch = release.partition("+torch")
    wanted = [f"transformers=={transformers}", *([f"torch=={torch}"] if torch else [])]
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_CONSTRAINT": ""})
    if done.returncode:
        raise SystemExit(f"transformers {release} cannot be installed:\n{done.stderr}")
    (folder / "installed").touch()
    return python


def run(release: str) -> dict[str, Any]:
    """Return what came out for a release: the versions, and passed and failed tests by column."""
    python, report = environment(release), ENVIRONMENTS / f"{release}.xml"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "JACOBI_HF_CASES": str(EQUALITY_CASES)}
    found = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, env=variables, cwd=ROOT)
    if found.returncode:
        raise SystemExit(f"transformers {release} cannot be imported:\n{found.stderr}")
    tests = [name for names in TESTS.values() for name in names]
    command = [python, "-m", "pytest", "-m", "not deep", "--show-capture=no", f"--junit-xml={report}", *tests]
    log = ENVIRONMENTS / f"{release}.log"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT).returncode
    if code not in (0, 1):
        raise SystemExit(
            f"the tests did not run with transformers {release}:\n{log.read_text(encoding='utf-8')[-4000:]}"
        )
    versions = dict(zip(("transformers", "torch", "peft"), json.loads(found.stdout.splitlines()[-1]), strict=True))
    return {**versions, **counts(report)}


def counts(report: Path) -> dict[str, list[int]]:
    """Return `[passed, failed]` tests of each column, from pytest's report."""
    totals = {column: [0, 0] for column in TESTS}
    for case in ET.parse(report).getroot().iter("testcase"):
        if case.find("skipped") is None:
            failed = case.find("failure") is not None or case.find("error") is not None
            totals[column_of(case.attrib["classname"].replace(".", "/"))][failed] += 1
    return totals


def column_of(module: str) -> str:
    """Return the column that counts a test module, `tests/jacobi_hf/test_mixin`."""
    return next(
        column
        for column, names in TESTS.items()
        if any(module.startswith(re.split(r"\.py|::", name)[0]) for name in names)
    )


def table(results: list[dict[str, Any]]) -> str:
    """Return the table of docs/compatibility.md."""
    rows = [
        "| transformers | torch | PEFT | equality | hooks of `generate`, caches | drafter | trainer |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [result["transformers"], result["torch"], result["peft"]]
        for column in TESTS:
            passed, failed = result[column]
            what = f"{EQUALITY_CASES} cases" if column == "equality" and not failed else str(passed)
            cells.append(what if not failed else f"{passed}, **{failed} failed**")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def record(results: list[dict[str, Any]]) -> None:
    """Keep results, those of other releases too, and write the table of the docs."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    fresh = {(result["transformers"], result["torch"]) for result in results}
    kept = [result for result in known if (result["transformers"], result["torch"]) not in fresh]
    every = sorted(
        [*kept, *results], key=lambda result: ([int(n) for n in result["transformers"].split(".")], result["torch"])
    )
    RESULTS.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(every)}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def main() -> None:
    """Run the tests on several releases; the exit status is 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "releases", nargs="*", default=RELEASES, help=f"of transformers; default: {' '.join(RELEASES)}"
    )
    parser.add_argument("--jobs", type=int, default=2, help="releases at the same time")
    parser.add_argument("--record", action="store_true", help="write the results and the table of the docs")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(run, options.releases))
    print(table(results))
    if options.record:
        record(results)
    failed = sum(result[column][1] for result in results for column in TESTS)
    passed = sum(result[column][0] for result in results for column in TESTS)
    print(f"{passed} passed, {failed} failed")
    if failed:
        sys.exit(f"what failed is in {ENVIRONMENTS.relative_to(ROOT)}/RELEASE.log")


if __name__ == "__main__":
    main()
