"""Interrupted work: settings and finished parts in a file."""

from __future__ import annotations

import json
import multiprocessing

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jacobi_hf.resume import Progress, ResumeError, differences, read_progress

FILES = ("work.json", "work.jsonl")
SETTINGS = {"n": 4, "data": {"split": "train", "seed": 1}}

values = st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@pytest.mark.parametrize("name", FILES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.tuples(st.text(max_size=5), values), max_size=6))
def test_parts_come_back_after_an_interruption(tmp_path, name, parts):
    file = tmp_path / name
    file.unlink(missing_ok=True)
    for part, value in parts:  # each by a process of its own, as it were
        Progress(file, SETTINGS).add(part, value)
    assert Progress(file, SETTINGS).parts == dict(parts)
    assert [other.name for other in tmp_path.iterdir()] == ([name] if parts else [])


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_there_from_the_beginning_to_the_end_of_the_work(tmp_path, name):
    progress = Progress(tmp_path / "deep" / name, SETTINGS)
    assert not progress.file.exists()
    progress.begin()
    assert progress.file.is_file()
    progress.add("a", 1)
    progress.begin()
    assert Progress(progress.file, SETTINGS).parts == {"a": 1}
    progress.remove()
    assert not progress.file.exists()
    assert Progress(progress.file, SETTINGS).parts == {}


@pytest.mark.parametrize("name", FILES)
def test_other_settings_are_refused_and_named(tmp_path, name):
    progress = Progress(tmp_path / name, SETTINGS)
    progress.add("a", 1)
    before = progress.file.read_text()
    other = {"n": 8, "data": {"split": "train", "seed": 2}, "new": "x" * 200}
    with pytest.raises(ResumeError) as error:
        Progress(tmp_path / name, other, place="the folder", option="output_dir")
    assert str(error.value) == (
        f"the folder was begun under other settings (data.seed: 1, now 2; n: 4, now 8; new: None, now '{'x' * 79}..). "
        "Use those settings again, choose another output_dir, or delete it."
    )
    assert progress.file.read_text() == before


def test_settings_are_compared_as_json_keeps_them():
    assert differences({"a": [1, 2], "b": None}, {"a": [1, 2]}) == []
    assert differences({"a": {"b": 1}}, {"a": 3}) == ["a: {'b': 1}, now 3"]


def test_tuples_and_numbers_as_keys_are_no_difference(tmp_path):
    for _ in range(2):
        Progress(tmp_path / "work.json", {"a": (1, 2), "b": {1: 2}}).begin()


@given(cut=st.integers(0, 200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_line_that_was_cut_off_is_lost_and_no_other(tmp_path, cut):
    file = tmp_path / "work.jsonl"
    file.unlink(missing_ok=True)
    progress = Progress(file, SETTINGS)
    for number in range(4):
        progress.add(f"part {number}", number)
    content = file.read_text()
    kept = content[: min(cut, len(content))]
    file.write_text(kept)
    whole = max(0, kept.count("\n") - 1)
    again = Progress(file, SETTINGS)
    assert again.parts == {f"part {number}": number for number in range(whole)}
    again.add("next", [])
    assert Progress(file, SETTINGS).parts == {**again.parts, "next": []}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"settings": {}, \n', "is not JSON: .* damaged: delete it"),
        ("[1]\n", "is not a JSON object .* damaged: delete it"),
        ('{"of": {}, "done": {}}\n', "is no record of unfinished work that this version can continue. Delete it"),
        (b"\xff\xfe\n", "is not UTF-8"),
    ],
)
def test_a_damaged_or_foreign_file_is_reported(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ResumeError, match=f"{name}.*{message}"):
        Progress(file, SETTINGS)


def test_a_damaged_line_is_named(tmp_path):
    progress = Progress(tmp_path / "work.jsonl", SETTINGS)
    progress.add("a", 1)
    progress.file.write_text(progress.file.read_text() + "{\n")
    with pytest.raises(ResumeError, match=r"work.jsonl, line 3 is not JSON"):
        Progress(progress.file, SETTINGS)


def test_keys_of_other_documents_and_former_names(tmp_path):
    file = tmp_path / "manifest.json"
    options = {"parts_key": "shards", "renamed": {"window": "levels"}, "facts": {"complete": False}}
    file.write_text(json.dumps({"settings": {"window": 8}, "versions": {"a": "1"}, "shards": {"x": 1}}))
    progress = Progress(file, {"levels": 8}, **options)
    progress.add("y", 2)
    progress.note(complete=True)
    content = read_progress(file, "shards")
    assert content == {"settings": {"levels": 8}, "versions": {"a": "1"}, "shards": {"x": 1, "y": 2}, "complete": True}
    with pytest.raises(ResumeError, match="levels: 8, now 9"):
        Progress(file, {"levels": 9}, **options)


def add_parts(file, first):
    progress = Progress(file, SETTINGS, lock=FileLock(file.with_name(".lock")))
    for number in range(first, first + 20):
        progress.add(f"{number:02d}", number)


def test_processes_that_share_a_file_lose_no_part(tmp_path):
    file = tmp_path / "work.json"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add_parts, args=(file, first)) for first in (0, 20, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert Progress(file, SETTINGS).parts == {f"{number:02d}": number for number in range(60)}


def test_a_process_notices_that_another_began_with_other_settings(tmp_path):
    first = Progress(tmp_path / "work.json", SETTINGS)
    second = Progress(tmp_path / "work.json", {"n": 5})
    first.begin()
    with pytest.raises(ResumeError, match="n: 4, now 5"):
        second.begin()
