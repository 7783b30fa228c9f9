"""The middleware of the HTTP servers: which requests it passes on, and how it refuses the others."""

from __future__ import annotations

import asyncio
import json

import pytest

from reinforcepp.commands.access import RefuseWebPages, RequireKey
from reinforcepp.rollout.vllm.server import GUARD

KEY = "sk-quite-secret"
BEARER = ("authorization", f"Bearer {KEY}")
ORIGIN = ("origin", "https://evil.example")
PREFLIGHT = ("access-control-request-method", "POST")


def ask(middleware, *headers, path="/v1/models", method="GET", kind="http", **scope):
    """Return the messages that the server sends; ``[]`` if the request reaches the application."""
    reached, sent = [], []

    async def app(*_):
        reached.append(path)

    async def send(message):
        sent.append(message)

    async def receive():
        pytest.fail("the body was read")

    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": kind, "path": path, "headers": pairs, **scope} | ({"method": method} if kind == "http" else {})
    asyncio.run(middleware(app)(scope, receive, send))
    assert bool(reached) != bool(sent)
    return sent


def with_key(app):
    return RequireKey(app, KEY)


def test_the_middleware_has_the_documented_name():
    assert f"{RequireKey.__module__}.{RequireKey.__name__}" == GUARD


def test_the_key_opens_every_path_and_health_needs_none():
    assert not ask(with_key, BEARER)
    assert not ask(with_key, BEARER, ORIGIN, path="/invocations", method="POST")
    assert not ask(with_key, ("authorization", f"bearer  {KEY}"))
    assert not ask(with_key, BEARER, kind="websocket")
    assert not ask(with_key, kind="lifespan")
    assert not ask(with_key, path="/health")


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/",
        "",
        "/metrics",
        "/health/",
        "//health",
        "/health/../invocations",
        "/health%2f..%2finvocations",
        "/HEALTH",
        "/health;x",
        "/health?x",
        "/health\x00",
        "/health ",
        "http://localhost/health",
        "*",
    ],
)
def test_a_path_that_resembles_health_requires_the_key(path):
    assert ask(with_key, path=path)[0]["status"] == 401


def test_a_prefix_of_a_proxy_changes_no_path():
    assert ask(with_key, path="/api/invocations", root_path="/api")
    assert ask(with_key, path="/health/invocations", root_path="/health")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", KEY)],
        [("authorization", f"Basic {KEY}")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {KEY}x")],
        [("authorization", f"Bearer {KEY[:-1]}")],
        [("authorization", f"Bearer {KEY}, Bearer {KEY}")],
        [("authorization", f"Bearer {KEY}\xe9")],
        [("authorization", "Bearer wrong"), BEARER],
        [BEARER, BEARER],
        [("x-api-key", KEY)],
        [("cookie", f"authorization=Bearer {KEY}")],
    ],
)
def test_another_authorization_is_refused(headers):
    assert ask(with_key, *headers)[0]["status"] == 401


def test_a_refusal_has_the_form_of_openai():
    start, body = ask(with_key)
    error = json.loads(body["body"])["error"]
    assert error["type"] == "authentication_error" and "Authorization: Bearer" in error["message"]
    headers = dict(start["headers"])
    assert headers[b"www-authenticate"] == b"Bearer" and int(headers[b"content-length"]) == len(body["body"])

    def plain(app):
        return RequireKey(app, KEY, word="token", error=lambda status, message: {"error": f"{status}: {message}"})

    error = json.loads(ask(plain)[1]["body"])["error"]
    assert error.startswith("401: Authorization: the token is missing or wrong.") and "key" not in error


def test_a_websocket_without_the_key_is_closed_before_it_opens():
    for path in ("/v1/realtime", "/health"):
        assert ask(with_key, kind="websocket", path=path) == [{"type": "websocket.close", "code": 1008}]


def test_only_a_true_preflight_passes_without_the_key():
    """Starlette's CORS middleware answers exactly these requests itself."""
    assert not ask(with_key, ORIGIN, PREFLIGHT, method="OPTIONS")
    assert ask(with_key, ORIGIN, method="OPTIONS")
    assert ask(with_key, PREFLIGHT, method="OPTIONS")
    assert ask(with_key, ORIGIN, PREFLIGHT, method="POST")
    assert ask(with_key, ORIGIN, PREFLIGHT, method="options")


def test_the_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "other")
    assert not ask(RequireKey, ("authorization", "Bearer other"))
    assert ask(RequireKey, BEARER)
    for empty in ("", None):
        monkeypatch.delenv("VLLM_API_KEY") if empty is None else monkeypatch.setenv("VLLM_API_KEY", empty)
        with pytest.raises(ValueError, match="without one"):
            ask(RequireKey)


@pytest.mark.parametrize(
    "headers",
    [
        [],  # HTTP/1.0
        [("host", "127.0.0.1:8000")],
        [("host", "localhost")],
        [("host", "LocalHost:8000")],
        [("host", "[::1]:8000")],
        [("host", "127.0.0.1:8000"), ("origin", "http://localhost:3000")],
        [("host", "127.0.0.1:8000"), ("origin", "https://[::1]")],
        [("host", "127.0.0.1:8000"), ("origin", "http://tauri.localhost")],
        [("host", "127.0.0.1:8000"), ("origin", "chrome-extension://abcdef")],
        [("host", "127.0.0.1:8000"), ("origin", "vscode-webview://abcdef")],
    ],
)
def test_programs_and_local_pages_use_a_loopback_server(headers):
    assert not ask(RefuseWebPages, *headers)
    assert not ask(RefuseWebPages, *headers, kind="websocket")


@pytest.mark.parametrize(
    "headers",
    [
        [("host", "evil.example:8000")],
        [("host", "")],
        [("host", "0.0.0.0:8000")],
        [("host", "192.168.1.7:8000")],
        [("host", "127.0.0.1.evil.example")],
        [("host", "localhost.evil.example")],
        [("host", "notlocalhost")],
        [("host", "[::1")],
        [("host", "127.0.0.1:8000"), ("host", "evil.example")],
        [("host", "127.0.0.1:8000"), ORIGIN],
        [("host", "127.0.0.1:8000"), ("origin", "null")],
        [("host", "127.0.0.1:8000"), ("origin", "HTTP://evil.example")],
        [("host", "127.0.0.1:8000"), ("origin", "http://localhost@evil.example")],
        [("host", "127.0.0.1:8000"), ("origin", "http://localhost:3000"), ORIGIN],
        [("host", "evil.example"), ("origin", "http://evil.example")],
    ],
)
def test_web_pages_of_other_hosts_are_refused(headers):
    assert ask(RefuseWebPages, *headers, path="/health")[0]["status"] == 403
    assert ask(RefuseWebPages, *headers, PREFLIGHT, method="OPTIONS")[0]["status"] == 403
    assert ask(RefuseWebPages, *headers, kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_the_refusal_of_a_web_page_names_the_header_and_the_fix():
    body = ask(RefuseWebPages, ("host", "evil\x1b[2J\xe9.example"))[1]["body"]
    message = json.loads(body)["error"]["message"]
    assert (
        message.startswith("Host: evil\\x1b[2J\\xe9.example isn't this computer")
        and "127.0.0.1" in message
        and "with a key" in message
    )


def test_the_refusal_of_web_pages_uses_the_word_of_the_server():
    body = ask(lambda app: RefuseWebPages(app, word="token"), ("host", "evil.example"))[1]["body"]
    assert b"requires no token" in body and b"with a token" in body and b"a key" not in body
