"""A Hub in memory, on the loopback interface, with which huggingface_hub's client can create, push and download.

It knows repositories of models and datasets, branches, pull requests, commits, and the basic transfer of LFS, but not
Xet. The client reads its environment when it is imported, so it runs in a subprocess with `hub.environment(home)`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "loopback" * 4
USER = "user"
CUT = 0  # instead of a status: the connection is closed after half of the body
LARGE = 10_000_000
BINARY = (".safetensors", ".bin", ".pt", ".pkl", ".parquet", ".png", ".pdf", ".gz")
_KIND = r"(?P<kind>model|dataset)s"
_REPO = r"(?P<repo>[^/]+/[^/]+)"

Files = dict[str, bytes]


@dataclass(frozen=True)
class Request:
    """A received request: `path` includes the query, `body` is what was read of it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Failure:
    """An order to answer `status` to the next `times` requests of a method whose path contains a pattern."""

    method: str
    pattern: str
    status: int
    times: int


@dataclass
class Refusal(Exception):
    """An answer that is an error. `code` is the Hub's own name for it."""

    status: int
    message: str
    code: str | None = None
    body: dict[str, Any] = field(default_factory=dict)


class LoopbackHub:
    """The Hub of a test.

    Its files are `repos[name][revision][path]`; the name of a dataset starts with `datasets/`. Only commits change
    `repos`, each in one assignment. `requests` is the log. `private` holds the names of private repositories.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        self.private: set[str] = set()
        self.requests: list[Request] = []
        self.objects: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self._commits: dict[str, dict[str, Files]] = {}
        self._failures: list[Failure] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def fail(self, method: str, pattern: str, status: int, times: int = 1) -> None:
        """Answer the next requests whose path matches with `status`; `CUT` breaks the connection."""
        self._failures.append(Failure(method, pattern, status, times))

    def add(self, repo: str, folder: Path) -> None:
        """Put a folder on `main` without a client."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.repos.setdefault(repo, {})["main"] = files

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a subprocess that uses this Hub and has its caches in `home`."""
        dropped = (
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HUGGING_FACE_HUB_TOKEN",
            "HF_TOKEN_PATH",
            "HF_HUB_CACHE",
            "HF_MODULES_CACHE",
        )
        kept = {
            name: value for name, value in os.environ.items() if name not in dropped and "proxy" not in name.lower()
        }
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def failure_for(self, method: str, path: str) -> int | None:
        """Return the status that was ordered for this request, or None."""
        with self.lock:
            for failure in self._failures:
                if failure.times and failure.method == method and re.search(failure.pattern, path):
                    failure.times -= 1
                    return failure.status
        return None

    def sha(self, repo: str, revision: str = "main") -> str:
        """Return the commit of a revision, named after its content."""
        files = self.files(repo, revision)
        sha = hashlib.sha1(
            "".join(f"{path} {oid_of(path, files[path])}\n" for path in sorted(files)).encode()
        ).hexdigest()
        self._commits.setdefault(repo, {})[sha] = files
        return sha

    def files(self, repo: str, revision: str) -> Files:
        if repo not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        found = self.repos[repo].get(revision, self._commits.get(repo, {}).get(revision))
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def file(self, repo: str, revision: str, path: str) -> bytes:
        files = self.files(repo, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return files[path]

    def commit(self, repo: str, revision: str, lines: list[dict[str, Any]], *, create_pr: bool) -> str:
        """Apply all lines of a commit or none, and return the revision that has them."""
        with self.lock:
            parent = lines[0]["value"].get("parentCommit")
            if parent is not None and parent != self.sha(repo, revision):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            self.sha(repo, revision)  # so that the previous commit stays readable by its name
            files = dict(self.files(repo, revision))
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            if create_pr:
                revision = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in self.repos[repo])}"
            self.repos[repo][revision] = files
            return revision

    def _apply(self, files: Files, key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        match key:
            case "file":
                files[path] = base64.b64decode(value["content"])
            case "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = self.objects[value["oid"]]
            case "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            case "deletedFolder":
                for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                    del files[name]
            case _:
                raise Refusal(400, f"unknown operation {key}")


def is_large(path: str, size: int) -> bool:
    """Return whether a file goes through LFS."""
    return size > 0 and (path.endswith(BINARY) or size > LARGE)


@functools.lru_cache(maxsize=4096)
def oid_of(path: str, content: bytes) -> str:
    """Return the Hub's id of a file: a hash of its content, of another kind for LFS."""
    if is_large(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """Return the entry of a file in the listing of a tree."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid_of(path, content)}
    return entry | (
        {"lfs": {"oid": entry["oid"], "size": len(content), "pointerSize": 134}}
        if is_large(path, len(content))
        else {}
    )


class _Handler(BaseHTTPRequestHandler):
    """Handler of the requests of one connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60

    def __init__(self, hub: LoopbackHub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write nothing to stderr, since `hub.requests` is the log."""

    def do_GET(self) -> None:
        ordered = self.hub.failure_for(self.command, self.path)
        body = self._body(half=ordered == CUT)
        self.hub.requests.append(Request(self.command, self.path, dict(self.headers.items()), body))
        if ordered == CUT:
            self.close_connection = True
            return
        try:
            self._route(body, ordered)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._answer({"error": refusal.message} | refusal.body, refusal.status, headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _body(self, *, half: bool) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
                if half:
                    return chunks[0]
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length // 2 if half else length)

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        named = {"Content-Type": "application/octet-stream" if isinstance(content, bytes) else "application/json"}
        for name, value in (named | {"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, body: bytes, ordered: int | None) -> None:
        if ordered is not None:
            raise Refusal(ordered, f"this answer, {ordered}, was ordered")
        path, query = urlsplit(self.path)[2:4]
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        self._authorise(path)
        for method, pattern, act in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == ("GET" if self.command == "HEAD" else self.command):
                named = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                if named.pop("kind", None) == "dataset" or named.pop("prefix", None):
                    named["repo"] = f"datasets/{named['repo']}"
                if named.get("repo") in self.hub.private and not self._is_known:
                    raise Refusal(401, "Repository not found", "RepoNotFound")
                act(self, body, **named)
                return
        raise Refusal(404, f"this Hub does not know {self.command} {path}")

    @property
    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _authorise(self, path: str) -> None:
        writes = (
            self.command != "GET"
            and self.command != "HEAD"
            and not path.startswith(("/objects/", "/api/validate-yaml"))
        )
        is_wrong = "Authorization" in self.headers and not self._is_known
        if is_wrong or ((writes or path == "/api/whoami-v2") and not self._is_known):
            raise Refusal(401, "Invalid credentials in Authorization header")

    def _whoami(self, body: bytes) -> None:
        self._answer(
            {
                "name": USER,
                "type": "user",
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"role": "write"}},
            }
        )

    def _validate_yaml(self, body: bytes) -> None:
        front = re.match(r"---\s*\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        try:
            fields = yaml.safe_load(front[1]) if front else {}
        except yaml.YAMLError as error:
            raise Refusal(400, "Invalid metadata", body={"errors": [{"message": str(error)}]}) from error
        missing = [] if fields else [{"message": "empty or missing yaml metadata in repo card"}]
        self._answer({"errors": [], "warnings": missing})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        key = name if asked.get("type", "model") == "model" else f"{asked['type']}s/{name}"
        with self.hub.lock:
            exists = key in self.hub.repos
            if not exists:
                self.hub.repos[key] = {
                    "main": {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
                }
                if asked.get("visibility") == "private" or asked.get("private"):
                    self.hub.private.add(key)
        answer = {"url": f"{self.hub.url}/{key}", "name": name, "id": key}
        if exists:
            raise Refusal(409, "You already created this model repo", body=answer)
        self._answer(answer)

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        there = self.hub.files(repo, revision)
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            mode = "lfs" if is_large(path, asked["size"]) else "regular"
            oid = oid_of(path, there[path]) if path in there else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": answers})

    def _lfs_batch(self, body: bytes, repo: str) -> None:
        self.hub.files(repo, "main")
        objects: list[dict[str, Any]] = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.hub.objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}
        self._answer({"transfer": "basic", "objects": objects})

    def _put_object(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the object is not what its name says")
        self.hub.objects[oid] = body
        self._answer({})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        new = self.hub.commit(repo, revision, lines, create_pr="create_pr" in self.query)
        sha = self.hub.sha(repo, new)
        number = new.removeprefix("refs/pr/")
        self._answer(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}",
                "pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}" if new != revision else None,
            }
        )

    def _branch(self, body: bytes, repo: str, branch: str) -> None:
        files = self.hub.files(repo, json.loads(body or b"{}").get("startingPoint") or "main")
        if branch in self.hub.repos[repo]:
            raise Refusal(409, f"Reference already exists: {branch}")
        self.hub.repos[repo][branch] = files
        self._answer({})

    def _refs(self, body: bytes, repo: str) -> None:
        self.hub.files(repo, "main")
        refs = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": self.hub.sha(repo, name)}
            for name in self.hub.repos[repo]
        ]
        self._answer(
            {"branches": [ref for ref in refs if not ref["name"].startswith("refs/")], "converts": [], "tags": []}
        )

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        sha = self.hub.sha(repo, revision)
        files = self.hub.files(repo, revision)
        name = repo.removeprefix("datasets/")
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = repo in self.hub.private
        self._answer(
            {
                "id": name,
                "modelId": name,
                "sha": sha,
                "siblings": siblings,
                "private": private,
                "tags": [],
                "gated": False,
            }
        )

    def _tree(self, body: bytes, repo: str, revision: str, folder: str) -> None:
        files = self.hub.files(repo, revision)
        inside = f"{folder.strip('/')}/" if folder.strip("/") else ""
        found = {path: content for path, content in sorted(files.items()) if path.startswith(inside)}
        if inside and not found:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        deep = self.query.get("recursive", "").lower() in ("true", "1")
        below = {inside + path[len(inside) :].split("/")[0] for path in found if "/" in path[len(inside) :]}
        folders = [
            {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
            for path in sorted(below)
        ]
        self._answer(
            folders
            + [_entry(path, content) for path, content in found.items() if deep or "/" not in path[len(inside) :]]
        )

    def _paths_info(self, body: bytes, repo: str, revision: str) -> None:
        form = body.decode()
        asked = json.loads(form)["paths"] if form.startswith("{") else parse_qs(form)["paths"]
        files = self.hub.files(repo, revision)
        self._answer([_entry(path, files[path]) for path in asked if path in files])

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        content = self.hub.file(repo, revision, path)
        sha = self.hub.sha(repo, revision)
        oid = oid_of(path, content)
        linked = (
            {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))} if is_large(path, len(content)) else {}
        )
        self._answer(content, headers={"ETag": f'"{oid}"', "X-Repo-Commit": sha} | linked)

    def _delete(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        key = name if asked.get("type", "model") == "model" else f"{asked['type']}s/{name}"
        self.hub.files(key, "main")
        del self.hub.repos[key]
        self._answer({})


_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("POST", "/api/validate-yaml", _Handler._validate_yaml),
    ("POST", "/api/repos/create", _Handler._create),
    ("DELETE", "/api/repos/delete", _Handler._delete),
    ("POST", rf"/api/{_KIND}/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler._preupload),
    ("POST", rf"/(?P<prefix>datasets/)?{_REPO}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", "/objects/(?P<oid>[0-9a-f]{64})", _Handler._put_object),
    ("POST", rf"/api/{_KIND}/{_REPO}/commit/(?P<revision>[^/]+)", _Handler._commit),
    ("POST", rf"/api/{_KIND}/{_REPO}/branch/(?P<branch>[^/]+)", _Handler._branch),
    ("GET", rf"/api/{_KIND}/{_REPO}/refs", _Handler._refs),
    ("GET", rf"/api/{_KIND}/{_REPO}/revision/(?P<revision>[^/]+)", _Handler._info),
    ("GET", rf"/api/{_KIND}/{_REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", _Handler._tree),
    ("POST", rf"/api/{_KIND}/{_REPO}/paths-info/(?P<revision>[^/]+)", _Handler._paths_info),
    ("GET", rf"/api/{_KIND}/{_REPO}", _Handler._info),
    ("GET", rf"/(?P<prefix>datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
]
