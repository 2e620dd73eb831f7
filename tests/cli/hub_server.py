"""A hub on loopback: the model API, the tree in pages, /resolve/ with redirects to a second server.

The second server plays the storage behind the hub: another origin, with ranges. Both can be told to
misbehave, and remember what they were asked.
"""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PAGE = 2
"""Entries of a tree listing in one answer."""
PIECE = 1 << 16


@dataclass
class Asked:
    """One request for bytes of a file."""

    path: str
    start: int
    token: str | None
    from_storage: bool


@dataclass
class Hub:
    """Repositories by name; what is served can be made wrong."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commit: str = "c" * 40
    asked: list[Asked] = field(default_factory=list)
    calls: int = 0
    """Requests of any kind."""
    refuse: tuple[int, str] | None = None
    """Status and X-Error-Code of every answer."""
    refuse_files: list[tuple[int, str]] = field(default_factory=list)
    """The next answers to requests for files, the same way."""
    cut: dict[str, list[int]] = field(default_factory=dict)
    """By path: the next answers end after so many bytes, without a word."""
    damage: dict[str, int] = field(default_factory=dict)
    """By path: how many more answers have a wrong byte."""
    sizes: dict[str, int] = field(default_factory=dict)
    """By path: sizes the listing gives instead of the true ones."""
    ignores_ranges: bool = False
    on_bytes: Callable[[int], None] = lambda n: None
    """Called with the number of bytes before they are sent."""
    endpoint: str = ""
    storage: str = ""

    def tree(self, repo: str) -> list[dict[str, Any]]:
        """The listing as the hub gives it: large files are LFS files."""
        entries: list[dict[str, Any]] = [{"type": "directory", "oid": "d" * 40, "path": "folder"}]
        for path, data in self.repositories[repo].items():
            size = self.sizes.get(path, len(data))
            entry: dict[str, Any] = {"type": "file", "path": path, "size": size}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if is_large(data):
                lfs = {"oid": sha256(data), "size": size, "pointerSize": 134}
                entry |= {"oid": "e" * 40, "lfs": lfs, "xetHash": "f" * 64}
            entries.append(entry)
        return entries

    def named(self, digest: str) -> tuple[str, bytes]:
        """A stored file by its hash."""
        files = [item for files in self.repositories.values() for item in files.items()]
        return next((path, data) for path, data in files if sha256(data) == digest)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_large(data: bytes) -> bool:
    return len(data) > 10_000


class Answer(BaseHTTPRequestHandler):
    """What both servers do: headers, ranges, faults."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def say(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say_file(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        start, stop, status = 0, len(data), 200
        wanted = self.headers.get("Range")
        if wanted and not self.hub.ignores_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last) + 1, len(data)), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        from_storage = isinstance(self, StorageAnswer)
        token = self.headers.get("Authorization")
        self.hub.asked.append(Asked(path, start, token, from_storage))
        body = bytearray(data[start:stop])
        if self.hub.damage.get(path, 0) and body:
            self.hub.damage[path] -= 1
            body[len(body) // 2] ^= 1
        self.send_response(status)
        for name, value in {"Content-Length": str(stop - start), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.hub.cut.get(path):
            del body[self.hub.cut[path].pop(0) :]
            self.close_connection = True
        for at in range(0, len(body), PIECE):
            piece = body[at : at + PIECE]
            self.hub.on_bytes(len(piece))
            self.wfile.write(piece)


class HubAnswer(Answer):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.calls += 1
        url = urlsplit(self.path)
        if self.hub.refuse:
            status, code = self.hub.refuse
            return self.say(status, {"X-Error-Code": code} if code else {})
        head, _, rest = url.path.strip("/").partition("/resolve/")
        if rest:
            return self.resolve(head, *rest.split("/", 1))
        parts = head.removeprefix("api/models/").split("/")
        repo = "/".join(parts[:2])
        if repo not in self.hub.repositories:
            return self.say(404, {"X-Error-Code": "RepoNotFound"})
        revision = parts[3] if len(parts) > 3 else "main"
        if revision not in ("main", self.hub.commit):
            return self.say(404, {"X-Error-Code": "RevisionNotFound"})
        if parts[2:3] == ["tree"]:
            return self.tree(repo, int(parse_qs(url.query).get("cursor", ["0"])[0]))
        info = {"id": repo, "sha": self.hub.commit, "siblings": [], "private": False}
        return self.json(info)

    def tree(self, repo: str, cursor: int) -> None:
        entries, headers = self.hub.tree(repo), {}
        if cursor + PAGE < len(entries):
            place = f"{self.hub.endpoint}/api/models/{repo}/tree/{self.hub.commit}"
            headers["Link"] = f'<{place}?recursive=true&cursor={cursor + PAGE}>; rel="next"'
        self.json(entries[cursor : cursor + PAGE], headers)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if self.hub.refuse_files:
            status, code = self.hub.refuse_files.pop()
            return self.say(status, {"X-Error-Code": code} if code else {})
        data = self.hub.repositories[repo][path]
        headers = {"X-Repo-Commit": self.hub.commit, "ETag": f'"{sha256(data)}"'}
        if is_large(data):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256(data)}"'}
            return self.say(302, headers | {"Location": f"{self.hub.storage}/{sha256(data)}"})
        return self.say_file(path, data, headers)

    def json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.say(200, {"Content-Type": "application/json", **(headers or {})}, body)


class StorageAnswer(Answer):
    def do_GET(self) -> None:
        self.hub.calls += 1
        self.say_file(*self.hub.named(self.path.strip("/")), {})


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        # Little is on its way between us and a client: what was sent has arrived, nearly.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub, running."""
    hub = Hub()
    servers = [
        Server(("127.0.0.1", 0), type(kind.__name__, (kind,), {"hub": hub}))
        for kind in (HubAnswer, StorageAnswer)
    ]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    threads = [threading.Thread(target=s.serve_forever, args=(0.05,)) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()
