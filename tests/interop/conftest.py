"""A small hub on loopback, enough of the real one's HTTP interface to create, upload to, list and download from a repository; and scripts that import peft."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import veneer


@dataclass
class Hub:
    """The state of the stand-in: repositories as {path: bytes}."""

    endpoint: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def sha(self, repo: str) -> str:
        digest = hashlib.sha1()
        for path, content in sorted(self.repos[repo].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()

    def environment(self, home: str) -> dict[str, str]:
        """What a process needs to take this hub for the real one."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": home, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A running stand-in."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

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

        def do_POST(self) -> None:
            state.requests.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                values = json.loads(body)
                name = values["name"] if not values.get("organization") else f"{values['organization']}/{values['name']}"
                state.repos.setdefault(name, {})
                state.private[name] = bool(values.get("private", values.get("visibility") == "private"))
                return self.answer({"url": f"{state.endpoint}/{name}", "id": name})
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            repo, action = re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/.*", self.path).groups()
            if action == "preupload":
                files = json.loads(body)["files"]
                return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    state.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            sha = state.sha(repo)
            return self.answer({"success": True, "commitOid": sha, "commitUrl": f"{state.endpoint}/{repo}/commit/{sha}", "hookOutput": ""})

        def do_GET(self) -> None:
            state.requests.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/api/models/(.+?)/tree/.*", path):
                files = state.repos[found[1]]
                return self.answer(
                    [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files.items()]
                )
            if found := re.fullmatch(r"/api/models/(.+?)(/revision/.*)?", path):
                if found[1] not in state.repos:
                    return self.answer(
                        {"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
                    )
                siblings = [{"rfilename": p} for p in state.repos[found[1]]]
                return self.answer(
                    {
                        "id": found[1],
                        "modelId": found[1],
                        "sha": state.sha(found[1]),
                        "siblings": siblings,
                        "private": state.private[found[1]],
                        "tags": [],
                    }
                )
            if found := re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path):
                content = state.repos.get(found[1], {}).get(found[2])
                if content is None:
                    return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
                return self.answer(
                    content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=state.sha(found[1]), Accept_Ranges="bytes"
                )
            return self.answer({"error": f"no such address: {path}"}, 404)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def packages_without_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with links to every installed package but HF PEFT."""
    linked = tmp_path_factory.mktemp("packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name.split("-")[0] != "peft" and entry.suffix != ".pth":
            (linked / entry.name).symlink_to(entry)
    return linked


@dataclass
class Runner:
    """Runs the scripts beside the tests, which import `peft` and know nothing of Veneer."""

    packages: Path

    def environment(self, *paths: Path) -> dict[str, str]:
        """What a process needs to see this Veneer, and nothing of a hub."""
        source = Path(veneer.__file__).parents[1]
        return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*paths, source])), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def hf(self, script: str, *arguments: object) -> str:
        """The script's output with HF PEFT."""
        return self.output([sys.executable, self.path(script), *arguments], self.environment())

    def veneer(self, script: str, *arguments: object) -> str:
        """The script's output with Veneer, HF PEFT being installed."""
        return self.output([sys.executable, "-m", "veneer", "run", self.path(script), *arguments], self.environment())

    def alone(self, script: str, *arguments: object) -> str:
        """The script's output with Veneer, HF PEFT being nowhere on the path."""
        return self.output([sys.executable, "-S", "-m", "veneer", "run", self.path(script), *arguments], self.environment(self.packages))

    def path(self, script: str) -> Path:
        return Path(__file__).with_name(script)

    def output(self, command: list[object], environment: dict[str, str]) -> str:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="session")
def run(packages_without_peft: Path) -> Runner:
    """Scripts with HF PEFT, with Veneer in its place, and with Veneer alone."""
    return Runner(packages_without_peft)
