"""Run the commands of docs/newcomer.md and measure the time of each.

    python examples/benchmarks/newcomer.py FOLDER

The commands run in one shell in FOLDER, on a new clone of this repository as it is committed. Measured are the seconds
of each command, by the clock and of a processor, and the tokens per forward that the page's `bench` command finds.
Baseline of the latter: ordinary `generate`. The figures go to results/newcomer.json, and from there into the table of
the page; `--table` writes the table alone. The last line on stdout is the path of the JSON document.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from jacobi_hf.results.schema import Cost, Measurement, Results

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "newcomer.md"
DOCUMENT = HERE / "results" / "newcomer.json"
BENCH = "build/newcomer/bench.json"
BEGIN = "<!-- written by examples/benchmarks/newcomer.py -->\n"
END = "<!-- end -->\n"
UNTIMED = ("cd ", "export ")
OURS = ("PYTHON", "VIRTUAL_ENV", "OMP_", "HF_", "TOKENIZERS_")


def commands(page: str) -> list[str]:
    """Return the commands in the shell blocks of a page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


class Took(NamedTuple):
    """Seconds of a command: by the clock, and of a processor. The latter depends less on other running programs."""

    wall: float
    cpu: float


def timed(lines: list[str], folder: Path, repository: Path) -> dict[str, Took]:
    """Run commands one after the other in one shell, and return the time of each.

    Commands that only change the shell, such as `cd`, are left out of the result.

    Args:
        lines: the commands; REPOSITORY in them stands for `repository`.
        folder: where the shell starts; created if missing.
        repository: path of the repository to clone.

    Raises:
        RuntimeError: a command failed; the message ends with the command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clock = folder.resolve() / "times.txt"
    clock.unlink(missing_ok=True)
    # `times` has a line for the shell and one for its children, each with user and system time since the beginning.
    script = "set -e\n" + "".join(
        f'before=$EPOCHREALTIME\n{line}\n{{ echo "$before $EPOCHREALTIME"; times; }} >> {shlex.quote(str(clock))}\n'
        for line in lines
    )
    script = re.sub(r"\bREPOSITORY\b", lambda _: shlex.quote(str(repository)), script)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, check=False)
    noted = clock.read_text().splitlines() if clock.is_file() else []
    if done.returncode:
        raise RuntimeError(f"A command failed with exit code {done.returncode} at: {lines[len(noted) // 3]}")
    took = {}
    before = 0.0
    for line, wall, children in zip(lines, noted[::3], noted[2::3], strict=True):
        start, end = map(float, wall.split())
        after = sum(60 * float(m) + float(s) for m, s in re.findall(r"(\d+)m([\d.]+)s", children))
        took[line] = Took(end - start, after - before)
        before = after
    return {line: found for line, found in took.items() if not line.startswith(UNTIMED)}


def table(results: Results) -> str:
    """Return the section of the page on a run, between its marks."""
    costs = results.costs
    rows = [(f"`{cost.name}`", cost.value, cost.setting["cpu_seconds"]) for cost in costs]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    machine = f"{results.hardware.cores} cores of {results.hardware.cpu}"
    lines = [
        f"{BEGIN}\n## How long it took\n",
        f"Measured on {machine}, {results.created[:10]}, {costs[0].setting['beside']}.\n",
        "| command | wall time | processor time |",
        "|---|---:|---:|",
        *(f"| {name} | {_time(wall)} | {_time(cpu)} |" for name, wall, cpu in rows),
        *(_sentence(m) for m in results.measurements if m.tokens_per_forward and m.agreement),
    ]
    return "\n".join(lines) + f"\n{END}"


def _sentence(m: Measurement) -> str:
    assert m.agreement is not None
    return (
        f"\nTokens per forward with the drafter, `{m.decoder.name}`: {m.tokens_per_forward:.2f} on {m.prompts.count} "
        f"problems. {m.agreement.identical} of {m.agreement.total} texts equal those of ordinary decoding."
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def with_table(page: str, results: Results) -> str:
    """Return the page with the table of a run."""
    return re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: table(results), page, count=1, flags=re.DOTALL)


def measure(folder: Path, beside: str) -> Results:
    """Run the page's commands in a folder and return the document; `beside` says what else the machine was doing."""
    from transformers import AutoModelForCausalLM

    seconds = timed(commands(PAGE.read_text(encoding="utf-8")), folder, ROOT)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "tiny_qwen3" / "checkpoint")
    results = Results.start("A newcomer's path: seconds of each command", model, "examples/tiny_qwen3/checkpoint")
    measurements: list[Measurement] = Results.read(folder / "jacobi-hf" / BENCH).measurements
    costs = [
        Cost(
            name=line,
            value=round(took.wall, 1),
            unit="s",
            setting={"beside": beside, "cpu_seconds": round(took.cpu, 1)},
        )
        for line, took in seconds.items()
    ]
    update = {"measurements": measurements, "costs": costs, "command": "examples/benchmarks/newcomer.py FOLDER"}
    return results.model_copy(update=update)


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        others = sys.argv[2] if len(sys.argv) > 2 else "nothing else running"
        measure(Path(sys.argv[1]), others).write(DOCUMENT)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), Results.read(DOCUMENT)), encoding="utf-8")
    print(DOCUMENT.relative_to(ROOT))
