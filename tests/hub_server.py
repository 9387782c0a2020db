"""A loopback server that speaks as much of the Hugging Face hub's API as its client needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """Models by name, then by revision; `requests` records what the client asked for."""

    models: dict[str, dict[str, Files]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    status: int = 0  # answer every request so
    url: str = ""

    def add(self, name: str, files: Files, revision: str = "main") -> None:
        self.models.setdefault(name, {})[revision] = files

    def downloads(self) -> list[str]:
        return [line.split("/")[-1] for line in self.requests if line.startswith("GET /resolve")]


def commit_of(files: Files) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.state.status:
            return self.send(self.state.status, b"{}")
        if path.startswith("/api/models/"):
            return self.model(path.removeprefix("/api/models/"))
        if "/resolve/" in path:
            return self.file(path)
        return self.send(404, b"{}")

    def model(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        self.state.requests.append(f"GET model {name}")
        files = self.found(name, revision or "main")
        if files is not None:
            siblings = [{"rfilename": file} for file in sorted(files)]
            info = {"id": name, "sha": commit_of(files), "siblings": siblings}
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def file(self, path: str) -> None:
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        self.state.requests.append(f"{self.command} /resolve/{file}")
        files = self.found(name, revision)
        if files is None:
            return
        if file not in files:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha1(files[file], usedforsecurity=False).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(files)}
        self.send(200, files[file], headers)

    def found(self, name: str, revision: str) -> Files | None:
        """The files of a revision, or None after the error was sent."""
        revisions = self.state.models.get(name)
        if name in self.state.gated:
            self.send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"})
        elif revisions is None:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            commits = {commit_of(files): files for files in revisions.values()}
            files = revisions.get(revision, commits.get(revision))
            if files is not None:
                return files
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return None

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
