"""huggingface_hub's client works with the loopback Hub."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.hub_cards.hub import CUT, TOKEN

_CLIENT = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

folder, api, seen = Path(sys.argv[1]), HfApi(), {}

def status(call):
    try:
        call()
    except HfHubHTTPError as error:
        return error.response.status_code

def relative(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())

def upload(**kwargs):
    return api.upload_folder(repo_id="user/x", folder_path=folder, **kwargs)

seen["name"] = api.whoami()["name"]
seen["missing"] = [api.repo_exists("user/x"), status(lambda: hf_hub_download("user/x", "a.json"))]
api.create_repo("user/x"), api.create_repo("user/x", exist_ok=True)
seen["again"] = status(lambda: api.create_repo("user/x"))
seen["wrong token"] = status(lambda: api.create_repo("user/y", token="hf_wrong"))
seen["refused"], seen["after"] = status(upload), api.list_repo_files("user/x")
seen["first"] = upload().oid
seen["unchanged"] = upload().oid
Path(folder, "a.json").write_text("[1]")
pr = upload(create_pr=True)
seen["pr"] = pr.pr_revision
seen["texts"] = [Path(hf_hub_download("user/x", "a.json", revision=r)).read_text() for r in ("main", pr.pr_revision)]
seen["snapshot"] = relative(snapshot_download("user/x"))
seen["exist"] = [api.file_exists("user/x", n) for n in ("a.json", "no.json")] + [api.revision_exists("user/x", "v0")]
api.create_branch("user/x", branch="v1")
seen["branches"] = [branch.name for branch in api.list_repo_refs("user/x").branches]
api.create_repo("user/d", repo_type="dataset", private=True)
api.upload_file(path_or_fileobj=b"abc", path_in_repo="q/x.parquet", repo_id="user/d", repo_type="dataset")
seen["dataset"] = Path(hf_hub_download("user/d", "q/x.parquet", repo_type="dataset")).read_text()
seen["stranger"] = status(lambda: api.dataset_info("user/d", token=False))
seen["tree"] = [file.path for file in api.list_repo_tree("user/d", recursive=True, repo_type="dataset")]
print(json.dumps(seen))
"""


def test_a_client_creates_pushes_and_downloads(hub, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub dir").mkdir(parents=True)
    weights = bytes(range(256)) * 500
    for name, content in {
        "a.json": b"{}",
        "model.safetensors": weights,
        "sub dir/ö.txt": b"",
        "README.md": b"---\nlicense: mit\n---\n",
    }.items():
        (folder / name).write_bytes(content)
    hub.fail("POST", "preupload", 500)
    hub.fail("PUT", "/objects/", CUT)
    hub.fail("POST", r"commit/main$", 403)
    client = [sys.executable, "-c", _CLIENT, folder]
    found = subprocess.run(client, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, check=True)
    seen = json.loads(found.stdout)
    first = seen.pop("first")
    names = [".gitattributes", "README.md", "a.json", "model.safetensors", "sub dir/ö.txt"]
    assert seen == {
        "name": "user",
        "missing": [False, 404],
        "again": 409,
        "wrong token": 401,
        "refused": 403,
        "after": [".gitattributes"],
        "unchanged": first,
        "pr": "refs/pr/1",
        "texts": ["{}", "[1]"],
        "snapshot": names,
        "exist": [True, False, False],
        "branches": ["main", "v1"],
        "dataset": "abc",
        "stranger": 401,
        "tree": ["q", ".gitattributes", "q/x.parquet"],
    }
    assert sorted(hub.repos) == ["datasets/user/d", "user/x"]
    assert hub.repos["user/x"]["main"]["model.safetensors"] == weights
    # Refused, first, pull request, dataset. The push that changed nothing made none.
    assert sum("/commit/" in request.path for request in hub.requests) == 4
    uploads = [request.body for request in hub.requests if request.method == "PUT"]
    assert uploads == [weights[: len(weights) // 2], weights, b"abc"]
    assert not any(TOKEN in request.path or TOKEN.encode() in request.body for request in hub.requests)
