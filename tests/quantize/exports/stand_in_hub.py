"""A stand-in for the hub, on the loopback: the parts of its API that one commit of files needs, and no more.

It is no hub: it keeps what it is sent in memory, knows one token, and stores large files by LFS's basic transfer.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_the_stand_in"


@dataclass
class StandInHub:
    """Its address, and its repositories: whether each is private, and its files."""

    endpoint: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    full: bool = False  # takes no large file

    def add(self, repo: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> None:
        self.private[repo], self.files[repo] = private, dict(files or {})

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        self.asked.append(f"{method} {path}")
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if parts[:2] == ["api", "models"] and method == "GET":
            return self._describe("/".join(parts[2:4]))
        if parts[:2] == ["api", "models"] and parts[4] == "preupload":
            said = json.loads(body)["files"]
            return 200, {"files": [_mode(file["path"]) for file in said]}
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if parts[0] == "lfs":
            self.objects[parts[1]] = body
            return 200, {}
        if parts[:2] == ["api", "models"] and parts[4] == "commit":
            return self._commit("/".join(parts[2:4]), body)
        return 404, {"error": f"the stand-in knows no {method} {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "strangers":
            return 403, {"error": "You don't have the rights to create a model under the namespace strangers"}
        if repo in self.files:
            return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{repo}"}
        self.add(repo, private=asked.get("visibility") == "private")
        return 200, {"url": f"{self.endpoint}/{repo}"}

    def _describe(self, repo: str) -> tuple[int, Any]:
        if repo not in self.files:
            return 404, {"error": "Repository not found"}
        siblings = [{"rfilename": name} for name in self.files[repo]]
        return 200, {"id": repo, "private": self.private[repo], "siblings": siblings}

    def _batch(self, asked: dict[str, Any]) -> tuple[int, Any]:
        if self.full:
            return 507, {"error": "the stand-in is full"}
        found = [
            {**one, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": found}

    def _commit(self, repo: str, body: bytes) -> tuple[int, Any]:
        new: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                new[value["path"]] = content
        self.files[repo].update(new)
        self.commits.append(repo)
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitUrl": f"{self.endpoint}/{repo}/commit/{oid}", "commitOid": oid}


def _mode(path: str) -> dict[str, Any]:
    return {
        "path": path,
        "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
        "shouldIgnore": False,
    }


@contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """Serves one until the block ends."""
    hub = StandInHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self._body()
            path = self.path.partition("?")[0]
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith(("/lfs/",))
            status, answer = (
                hub.answer(self.command, path, body) if allowed else (401, {"error": "Invalid token"})
            )
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
