"""The tutorial for newcomers: its commands, their times, and the table on its page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def newcomer(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import newcomer

    yield newcomer
    sys.modules.pop("newcomer")


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "a repository"
    folder.mkdir()
    (folder / "word.txt").write_text("hello")
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for arguments in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "one")):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def test_commands_run_in_one_shell_and_are_timed(newcomer, repository, tmp_path):
    page = "```bash\ngit clone -q REPOSITORY copy\ncd copy  # into it\n```\n\n```python\n1\n```\n"
    page += "```bash\n\ncp word.txt ../out.txt\nsleep 0.2\n```\n"
    lines = newcomer.commands(page)
    assert lines == ["git clone -q REPOSITORY copy", "cd copy", "cp word.txt ../out.txt", "sleep 0.2"]
    lines.append("python3 -c 'sum(range(3_000_000))'")
    seconds = newcomer.timed(lines, tmp_path / "new", repository)
    assert (tmp_path / "new" / "out.txt").read_text() == "hello"
    assert list(seconds) == [lines[0], *lines[2:]]
    assert seconds["sleep 0.2"].wall >= 0.2
    assert seconds["sleep 0.2"].cpu < 0.1 * seconds["sleep 0.2"].wall + 0.1
    assert 0.01 < seconds[lines[-1]].cpu <= seconds[lines[-1]].wall + 0.1


def test_a_command_that_fails_is_named(newcomer, repository, tmp_path):
    with pytest.raises(RuntimeError, match="exit code 3 at: sh -c 'exit 3'"):
        newcomer.timed(["true", "sh -c 'exit 3'", "touch later"], tmp_path / "new", repository)
    assert not (tmp_path / "new" / "later").exists()


def test_the_table_has_every_command_and_the_tokens_per_forward(newcomer):
    stored = newcomer.Results.read(newcomer.HERE / "results" / "drafter" / "drafter-seed42.json")
    costs = [
        newcomer.Cost(name=n, value=v, unit="s", setting={"beside": "alone", "cpu_seconds": v / 2})
        for n, v in (("a b", 50), ("c", 90))
    ]
    results = stored.model_copy(update={"costs": costs})
    page = f"before\n{newcomer.BEGIN}old\n{newcomer.END}after\n"
    written = newcomer.with_table(page, results)
    assert newcomer.with_table(written, results) == written
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "| `a b` | 50 s | 25 s |\n| `c` | 90 s | 45 s |\n| all | 2.3 min | 70 s |" in written
    assert written.count("Tokens per forward") == sum(m.agreement is not None for m in stored.measurements)


def test_the_page_shows_the_committed_run_of_its_own_commands(newcomer):
    page = newcomer.PAGE.read_text(encoding="utf-8")
    results = newcomer.Results.read(newcomer.DOCUMENT)
    assert [cost.name for cost in results.costs] == [
        line for line in newcomer.commands(page) if not line.startswith(newcomer.UNTIMED)
    ]
    assert newcomer.with_table(page, results) == page
