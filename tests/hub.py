"""A small hub of models on this machine: the routes that huggingface_hub uses, over HTTP, with faults on request."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`repositories` has the files of each, by name. `refusals` has, for a repository, the status and the error code
    with which it is answered; "files" before a name refuses its files alone."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.cut: set[str] = set()  # files of which half is sent
        self.altered: set[str] = set()  # files that have other bytes than the hub states
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("authorization"))
        parts = path.strip("/").split("/")
        of_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if of_api else parts
        name = "/".join(parts[:2])
        refusal = self.server.refusals.get(name) or (None if of_api else self.server.refusals.get(f"files {name}"))
        files = self.server.repositories.get(name)
        revision = parts[3] if len(parts) > 3 else "main"
        if refusal is not None:
            self._send(*refusal)
        elif files is None:
            self._send(401, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self._send(404, "RevisionNotFound")
        elif of_api:
            siblings = [{"rfilename": file} for file in files]
            self._send(200, "", json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self._send_file("/".join(parts[4:]), files, body=body)

    def _send_file(self, name: str, files: dict[str, bytes], *, body: bool) -> None:
        if name not in files:
            self._send(404, "EntryNotFound")
            return
        content = files[name]
        digest = hashlib.sha256(content).hexdigest()
        if name in self.server.altered:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if name in self.server.cut else content)

    def _send(self, status: int, code: str, content: bytes = b"{}") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def use_hub(hub: Hub, cache: Any, monkeypatch: Any) -> None:
    """Lets huggingface_hub, which reads its variables when it is imported, talk to this hub and keep files there."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
