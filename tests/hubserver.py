"""A Hugging Face Hub on this machine: the part of its HTTP interface that the real clients use to download."""

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

DENIED = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}


@dataclass
class Repository:
    """`files`: content by path, the same at every commit. `branches`: what each names.

    `status`: what is answered instead of its files; `metadata_too`: and of their list, as for private ones.
    `promised`: sizes it gives for files that are larger than a test wants to make them. `stalls`: after so many
    bytes of a file nothing more comes.
    """

    files: dict[str, bytes]
    branches: dict[str, str]
    status: int = 0
    metadata_too: bool = False
    promised: dict[str, int] = field(default_factory=dict)
    stalls: dict[str, int] = field(default_factory=dict)

    def entries(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "oid": _oid(content), "size": self.promised.get(path, len(content))}
            for path, content in self.files.items()
        ]


@dataclass
class HubServer:
    """`models` and `datasets` by id. `requests`: (method, path) of all that was asked, in order."""

    models: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    endpoint: str = ""

    def downloads(self) -> list[str]:
        """Paths of the files whose content was asked for, in their repositories."""
        asked = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return sorted(path.split("/resolve/")[1].partition("/")[2] for path in asked)

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _listed(repository: Repository, directory: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{directory}/" if directory else ""
    inside = [one for one in repository.entries() if one["path"].startswith(prefix)]
    if recursive:
        return inside
    names = {prefix + one["path"][len(prefix) :].partition("/")[0]: one for one in inside}
    return [
        one if name == one["path"] else {"type": "directory", "path": name, "oid": "0", "size": 0}
        for name, one in names.items()
    ]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any = None) -> None:
        path, query = unquote(urlsplit(self.path).path).strip("/"), urlsplit(self.path).query
        self.hub.requests.append((self.command, path))
        parts = path.split("/")
        api = parts[0] == "api"
        parts = parts[api:]
        kind = self.hub.datasets if parts[0] == "datasets" else self.hub.models
        parts = parts[parts[0] in ("datasets", "models") :]
        repository = kind.get("/".join(parts[:2])) if len(parts) > 3 else None
        if repository is None or (repository.status and (repository.metadata_too or not api)):
            status = repository.status if repository else 404
            self._send(status, b"{}", {"X-Error-Code": DENIED.get(status, ""), "X-Error-Message": "no"})
            return
        action, revision, inner = parts[2], parts[3], "/".join(parts[4:])
        commit = revision if revision in repository.branches.values() else repository.branches.get(revision)
        if commit is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif action == "resolve":
            self._file(repository, commit, inner)
        elif action == "revision":
            siblings = [{"rfilename": one["path"], "size": one["size"]} for one in repository.entries()]
            self._json({"_id": "0", "id": "/".join(parts[:2]), "sha": commit, "siblings": siblings})
        elif action == "tree":
            self._json(_listed(repository, inner, recursive="recursive=true" in query.lower()))
        else:  # paths-info
            self._json([one for one in repository.entries() if one["path"] in body["paths"]])

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: Repository, commit: str, path: str) -> None:
        content = repository.files.get(path)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, content[start:], headers, repository.stalls.get(path))

    def _send(self, status: int, content: bytes, headers: dict[str, str], stall: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:stall])
            if stall is not None:
                self.wfile.flush()
                self.rfile.read(1)  # until the client is gone
