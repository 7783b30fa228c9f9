"""A local HTTP server that implements the part of the Hugging Face Hub API that an upload needs."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from huggingface_hub import close_session, constants


class Hub(ThreadingHTTPServer):
    """The server. ``repos`` holds the repositories with their files, ``tokens`` maps each valid token to its owner."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.tokens: dict[str, str] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def use_hub(monkeypatch: Any, endpoint: str, token: str | None, home: Path) -> None:
    """Let huggingface_hub use the server at ``endpoint``, with ``token`` as the only one, and ``home`` for its files."""
    for name in os.environ:
        if name.startswith(("HF_", "HUGGING")):
            monkeypatch.delenv(name)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    own: dict[str, Any] = {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    own |= {"HF_TOKEN_PATH": str(home / "token"), "HF_STORED_TOKENS_PATH": str(home / "all")}
    own |= {"HF_ASSETS_CACHE": str(home), "HF_HUB_CACHE": str(home)}
    for name, value in own.items():  # read from the environment when the library is imported
        monkeypatch.setattr(constants, name, value)
    close_session()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        owner = self.server.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if owner is None:
            return self._send({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return self._send({"name": owner, "type": "user", "auth": {}})
        if path == "/api/repos/create":
            return self._create(json.loads(body), owner)
        if path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        _, _, _, user, name, *rest = path.split("/")
        repo = self.server.repos.get(f"{user}/{name}")
        if repo is None:
            return self._send({"error": "Repository not found"}, 404, error_code="RepoNotFound")
        if not rest or rest[0] == "revision":
            return self._send({"id": f"{user}/{name}", "private": repo["private"], "sha": "0" * 40, "siblings": []})
        if rest[0] == "preupload":
            files = json.loads(body)["files"]
            return self._send(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        assert rest[0] == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                repo["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.server.url}/{user}/{name}/commit/{'1' * 40}"
        return self._send({"commitUrl": url, "commitOid": "1" * 40})

    def _create(self, wanted: dict[str, Any], owner: str) -> None:
        user = wanted.get("organization") or owner
        name = f"{user}/{wanted['name']}"
        if user != owner:
            return self._send({"error": "You don't have the rights to create a model under this namespace"}, 403)
        if name in self.server.repos:
            return self._send({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.server.repos[name] = {"private": private, "files": {}}
        return self._send({"url": f"{self.server.url}/{name}"})

    def _send(self, value: dict[str, Any], code: int = 200, error_code: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if error_code:
            self.send_header("X-Error-Code", error_code)
        self.end_headers()
        self.wfile.write(body)
