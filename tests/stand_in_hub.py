"""A small hub on loopback: enough of the real one's HTTP interface to create repositories, commit to branches and pull requests, list and download."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
OWNER = "me"


@dataclass
class Hub:
    """The state of the stand-in: repositories as {path: bytes}, data sets under `datasets/owner/name`."""

    endpoint: str = ""
    repos: dict[str, Files] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    branches: dict[tuple[str, str], Files] = field(default_factory=dict)
    """What was committed elsewhere than to `main`: (repository, branch or refs/pr/N) → files."""
    requests: list[str] = field(default_factory=list)

    def sha(self, repo: str, revision: str = "main") -> str:
        return self.sha_of(self.files(repo, revision))

    def files(self, repo: str, revision: str) -> Files:
        """A repository at a branch or commit; only the newest commit of each branch is kept."""
        for (name, branch), files in self.branches.items():
            if name == repo and revision in (branch, self.sha_of(files)):
                return files
        return self.repos[repo]

    @staticmethod
    def sha_of(files: Files) -> str:
        digest = hashlib.sha1()
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()

    def add(self, name: str, directory: Path) -> None:
        """Make a public repository of a directory's files."""
        self.repos[name] = {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
        self.private[name] = False

    def environment(self, home: str) -> dict[str, str]:
        """What a process needs to take this hub for the real one."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": home, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def run(self, folder: Path, *arguments: str) -> str:
        """Run Python in a folder as a process of its own that knows this hub, with a new cache, and return what it printed."""
        with tempfile.TemporaryDirectory() as home:
            environment = os.environ | self.environment(home)
            done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `hub` is set by `serving`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, body: object = None, status: int = 200, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def refuse(self, what: str, code: str, status: int = 404) -> None:
        self.answer({"error": what}, status, X_Error_Code=code, X_Error_Message=what)

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+?)/branch/(.+)", path):
            if (found[1], found[2]) in self.hub.branches or found[2] == "main":
                return self.refuse("Reference already exists", "", 409)
            self.hub.branches[found[1], found[2]] = dict(self.hub.repos[found[1]])
            return self.answer({})
        found = re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/(.*)", path)
        assert found is not None, path
        if found[2] == "preupload":
            files = json.loads(body)["files"]
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        return self.commit(found[1], found[3], body, pull_request=query.get("create_pr") == ["1"])

    def create(self, values: dict[str, object]) -> None:
        name = f"{values.get('organization') or OWNER}/{values['name']}"
        if name in self.hub.repos:
            return self.answer({"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"}, 409)
        self.hub.repos[name] = {}
        self.hub.private[name] = bool(values.get("private", values.get("visibility") == "private"))
        return self.answer({"url": f"{self.hub.endpoint}/{name}", "id": name})

    def commit(self, repo: str, revision: str, body: bytes, *, pull_request: bool) -> None:
        hub = self.hub
        target = hub.files(repo, revision)
        more = {}
        if pull_request:
            number = 1 + sum(name == repo and branch.startswith("refs/pr/") for name, branch in hub.branches)
            target = hub.branches[repo, f"refs/pr/{number}"] = dict(target)
            more = {"pullRequestUrl": f"{hub.endpoint}/{repo}/discussions/{number}"}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                target[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        sha = hub.sha_of(target)
        return self.answer(
            {"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{repo}/commit/{sha}", "hookOutput": "", **more}
        )

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            return self.tree(_key(found[1], found[2]), found[3], found[4])
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.about(_key(found[1], found[2]), found[2], found[3] or "main")
        if found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            return self.file(found[1], found[2], found[3])
        return self.answer({"error": f"no such address: {path}"}, 404)

    do_HEAD = do_GET

    def tree(self, repo: str, revision: str, folder: str) -> None:
        files = {p: c for p, c in self.hub.files(repo, revision).items() if not folder or p.startswith(f"{folder}/")}
        entries = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files.items()]
        folders = {str(parent) for p in files for parent in Path(p).parents if str(parent) != "."}
        return self.answer([*({"type": "directory", "path": f, "oid": "0" * 40} for f in sorted(folders)), *entries])

    def about(self, repo: str, name: str, revision: str) -> None:
        if repo not in self.hub.repos:
            return self.refuse("Repository not found", "RepoNotFound")
        siblings = [{"rfilename": p} for p in self.hub.files(repo, revision)]
        values = {"sha": self.hub.sha(repo, revision), "siblings": siblings, "private": self.hub.private[repo], "tags": []}
        return self.answer({"id": name, "modelId": name, **values})

    def file(self, repo: str, revision: str, name: str) -> None:
        if repo not in self.hub.repos:
            return self.refuse("Repository not found", "RepoNotFound")
        content = self.hub.files(repo, revision).get(name)
        if content is None:
            return self.refuse("Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": self.hub.sha(repo, revision)}
        return self.answer(content, **headers, Accept_Ranges="bytes")


def _key(kind: str, name: str) -> str:
    return f"datasets/{name}" if kind == "datasets" else name


@contextmanager
def serving() -> Iterator[Hub]:
    """A running stand-in."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
