"""`push_to_hub` against the loopback Hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from jacobi_hf.hub_cards import FolderError, PushError, push_to_hub
from jacobi_hf.hub_cards.folder import stage
from jacobi_hf.hub_cards.push import _explain
from tests.hub_cards.folders import CARD, make, weights
from tests.hub_cards.hub import CUT, TOKEN, LoopbackHub

CLIENT = Path(__file__).with_name("push_client.py")
RESULTS = CLIENT.parents[2] / "examples" / "benchmarks" / "results" / "overhead.json"
ANSWERS = (400, 403, 404, 409, 412, 429, 500)
THEIRS = {"mine.txt": b"mine", "sub/model.safetensors": b"theirs"}  # other files of a repository


def run(hub, tmp_path, steps):
    """Push in one process and return each outcome by its name. The token must not appear in any output."""
    listed = [
        {key: str(value) if isinstance(value, Path) else value for key, value in step.items()}
        for step in steps.values()
    ]
    done = subprocess.run(
        [sys.executable, CLIENT],
        env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(CLIENT.parents[2])},
        input=json.dumps(listed),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert TOKEN not in done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert "HTTP Request" in said["logged"]
    return dict(zip(steps, [outcome.get("error") or outcome["url"] for outcome in said["outcomes"]], strict=True))


def commits(hub, repo):
    return [request for request in hub.requests if request.method == "POST" and f"{repo}/commit/" in request.path]


def content_of(folder):
    staged = stage(folder)
    return {
        name: content.read_bytes() if isinstance(content, Path) else content for name, content in staged.files.items()
    }


def without_attributes(files):
    return {name: content for name, content in files.items() if name != ".gitattributes"}


@dataclass
class Run:
    """All pushes of this file, made in one process because its start takes longest."""

    hub: LoopbackHub
    path: Path
    folders: dict[str, Path]
    oid: str
    seen: dict[str, str]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    path = tmp_path_factory.mktemp("push")
    kinds = {"first": "model", "third": "model", "broken": "model", "old": "model", "drafter": "drafter"}
    folders = {name: make(path / name, kind, float(number)) for number, (name, kind) in enumerate(kinds.items())}
    second = folders["second"] = make(path / "second")
    (second / "model.safetensors").unlink()
    weights(second / "model-00001-of-00001.safetensors", 20.0)
    (second / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-00001-of-00001.safetensors"}}')
    first = folders["first"]
    third = folders["third"]
    oid = hashlib.sha256((folders["broken"] / "model.safetensors").read_bytes()).hexdigest()
    with LoopbackHub() as hub:
        hub.add("user/public", third)
        hub.add("user/kept", folders["old"])
        hub.repos["user/kept"]["main"] |= THEIRS | {"results/old.json": b"{}"}
        hub.repos["user/broken"] = {"main": dict(THEIRS)}
        for status in ANSWERS:
            hub.repos[f"user/c{status}"] = {"main": dict(THEIRS)}
            hub.fail("POST", f"user/c{status}/commit/", status)
        hub.fail("POST", "user/retried/preupload", 500)
        hub.fail("POST", "user/retried.git/info/lfs", 429)
        hub.fail("PUT", "/objects/", CUT)
        hub.fail("PUT", oid, 403)
        steps = {
            "retried": {"folder": first, "repo_id": "user/retried"},
            "new": {"folder": first, "repo_id": "user/a", "private": True, "results": [str(RESULTS)]},
            "again": {"folder": first, "repo_id": "user/a", "private": True, "results": [str(RESULTS)]},
            "branch": {"folder": first, "repo_id": "user/kept", "revision": "v1"},
            "over": {"folder": second, "repo_id": "user/kept"},
            "pr": {"folder": third, "repo_id": "user/kept", "create_pr": True, "commit_message": "three"},
            "drafter": {"folder": folders["drafter"], "repo_id": "user/d"},
            "other kind": {"folder": folders["drafter"], "repo_id": "user/a"},
            "public": {"folder": third, "repo_id": "user/public", "private": True},
            "dry": {"folder": first, "repo_id": "user/dry", "dry_run": path / "dry"},
            **{f"c{status}": {"folder": first, "repo_id": f"user/c{status}"} for status in ANSWERS},
            "broken": {"folder": folders["broken"], "repo_id": "user/broken"},
            "after 500": {"folder": first, "repo_id": "user/c500"},
            "wrong token": {"folder": first, "repo_id": "user/wrong", "token": "hf_wrong"},
            "no token": {"folder": first, "repo_id": "user/nobody", "token": False},
        }
        yield Run(hub, path, folders, oid, run(hub, path, steps))


@pytest.mark.slow
def test_push_again_branch_and_pull_request(pushed):
    hub = pushed.hub
    seen = pushed.seen
    first, second, third = (pushed.folders[name] for name in ("first", "second", "third"))
    assert seen["new"].startswith(f"{hub.url}/user/a/commit/")
    assert seen["again"] == seen["new"]
    assert seen["pr"] == f"{hub.url}/user/kept/discussions/1"
    assert seen["other kind"].startswith(
        "PushError: user/a holds config.json, so it is not the repository of a drafter"
    )
    assert seen["public"].startswith("PushError: user/public already exists and is public")
    assert seen["dry"] is None
    assert [len(commits(hub, repo)) for repo in ("user/a", "user/kept", "user/d", "user/public", "user/dry")] == [
        1,
        3,
        1,
        0,
        0,
    ]
    assert hub.private == {"user/a"}
    assert without_attributes(hub.repos["user/a"]["main"]) == content_of(first) | {
        f"results/{RESULTS.name}": RESULTS.read_bytes()
    }
    kept = hub.repos["user/kept"]
    assert kept["v1"] == content_of(first) | THEIRS
    assert kept["main"] == content_of(second) | THEIRS  # one save of the weights; their files are still there
    assert kept["refs/pr/1"] == content_of(third) | THEIRS
    assert json.loads(commits(hub, "user/kept")[2].body.splitlines()[0])["value"]["summary"] == "three"
    assert "user/dry" not in hub.repos
    dry = pushed.path / "dry"
    assert {p.relative_to(dry).as_posix() for p in dry.rglob("*") if p.is_file()} == content_of(first).keys()
    assert all(
        TOKEN.encode() not in content for files in hub.repos.values() for r in files.values() for content in r.values()
    )


@pytest.mark.slow
def test_what_the_hub_may_answer(pushed):
    """The library retries some answers. Others give an error with advice and leave the repository unchanged."""
    hub = pushed.hub
    seen = pushed.seen
    first = pushed.folders["first"]
    assert seen["retried"].startswith(f"{hub.url}/user/retried/commit/")
    assert without_attributes(hub.repos["user/retried"]["main"]) == content_of(first)
    advice = {
        403: "create_pr=True",
        404: "repository or revision does not exist",
        409: "Push again later",
        429: "fewer requests",
        500: "the Hub has an internal error",
    }
    for status in ANSWERS:
        said = seen[f"c{status}"]
        assert said.startswith(f"PushError: user/c{status} was not pushed: "), said
        assert f"(HTTP {status}: " in said
        assert advice.get(status, "") in said
        assert said.endswith("Its files are unchanged.")
    assert "(HTTP 403: " in seen["broken"]
    untouched = ["user/broken", *(f"user/c{status}" for status in ANSWERS if status != 500)]
    assert all(hub.repos[repo] == {"main": THEIRS} for repo in untouched)
    assert seen["after 500"].startswith(f"{hub.url}/user/c500/commit/")  # the same push again
    assert hub.repos["user/c500"]["main"] == content_of(first) | THEIRS
    oid = hashlib.sha256((first / "model.safetensors").read_bytes()).hexdigest()
    # Cut once, then uploaded for all pushes.
    assert sum(request.method == "PUT" and oid in request.path for request in hub.requests) == 2
    assert "user/wrong was not pushed: the token is missing or unknown to the Hub" in seen["wrong token"]
    assert "hf_wrong" not in seen["wrong token"]
    assert "user/nobody was not pushed: the token is missing or unknown to the Hub" in seen["no token"]
    assert not {"user/wrong", "user/nobody"} & hub.repos.keys()


def test_no_hub(tmp_path):
    """Tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(PushError, match=r"user/a was not pushed: .*offline"):
        push_to_hub(make(tmp_path), "user/a", token="x")


def test_a_server_that_is_not_a_hub(tmp_path, monkeypatch):
    """Another kind of server and a wrong address raise many kinds of errors in the HTTP library."""
    for error in (KeyError("url"), TypeError("no list"), Exception("Invalid port: '80a'")):

        class Api:
            def __init__(self, token):
                pass

            def create_repo(self, *_, error=error, **__):
                raise error

        monkeypatch.setattr("jacobi_hf.hub_cards.push.HfApi", Api)
        with pytest.raises(PushError, match=rf"user/a was not pushed: .*\({type(error).__name__}\)"):
            push_to_hub(make(tmp_path / type(error).__name__), "user/a", token="hf_secret")


def test_a_token_that_cannot_be_one_is_not_shown(tmp_path, monkeypatch):
    folder = make(tmp_path / "folder")
    seen = []

    def api(token):
        seen.append(token)
        raise AssertionError

    monkeypatch.setattr("jacobi_hf.hub_cards.push.HfApi", api)
    secret = "hf_" + "ab" * 17
    for token in (f"{secret}\n{secret}", f"{secret} x", f"{secret}\u20ac", f"{secret}\x00"):
        with pytest.raises(ValueError, match="no token has") as told:
            push_to_hub(folder, "user/a", token=token)
        assert secret not in str(told.value)
    assert not seen
    with pytest.raises(AssertionError):
        push_to_hub(folder, "user/a", token=f" {secret}\n")  # with the space and line break of a careless copy
    assert seen == [secret]


def test_bad_input_is_reported_before_anything_is_sent(tmp_path, monkeypatch):
    monkeypatch.setattr("jacobi_hf.hub_cards.push.HfApi", None)
    folder = make(tmp_path / "folder")
    for name in ("a", "a/b/c", "user/a b", "", "user/--x", "user/a\n"):
        with pytest.raises(ValueError, match=r"^repo_id="):
            push_to_hub(folder, name)
    with pytest.raises(FolderError, match=r"README\.md holds the token of this push"):
        push_to_hub(folder, "user/a", card=CARD + "a-token-of-mine", token="a-token-of-mine")
    (folder / "x.pt").write_bytes(b"")
    with pytest.raises(FolderError, match=r"x\.pt is pickled"):
        push_to_hub(folder, "user/a", token="x")


def test_a_folder_without_a_card_gets_one(tmp_path):
    for kind in ("model", "adapter", "drafter"):
        folder = make(tmp_path / kind, kind)
        (folder / "README.md").unlink()
        if kind == "adapter":
            form = "---\nlibrary_name: peft\n---\n# Card\n[More Information Needed]\n"  # as PEFT writes it
            (folder / "README.md").write_text(form)
        about = {
            "base_model": "user/other",
            "license": "mit",
            "language": "en",
            "datasets": ["user/data"],
            "results": [RESULTS],
        }
        pushed = push_to_hub(folder, f"user/{kind}", dry_run=tmp_path / "out" / kind, token=False, **about)
        assert pushed.url is None
        card = ModelCard.load(tmp_path / "out" / kind / "README.md")
        assert (card.data.license, card.data.base_model, card.data.language) == ("mit", "user/other", ["en"])
        assert card.data.base_model_relation == ("finetune" if kind == "model" else "adapter")
        assert ("## Guarantee" in card.text) == (kind == "drafter")
        assert ("pip install peft" in card.text) == (kind == "adapter")
    with pytest.raises(ValueError, match="The license is missing"):
        push_to_hub(folder, "user/x", dry_run=tmp_path / "none", token=False)
    assert not (tmp_path / "none").exists()


def test_the_token_is_cut_out_of_errors():
    with pytest.raises(PushError, match=r"Bearer \[token\] is wrong") as told:
        _explain("user/a", OSError("Bearer abc is wrong"), "abc")
    assert told.value.__suppress_context__
