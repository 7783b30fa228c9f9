"""ASGI middleware of the HTTP servers: one that requires a key, and one that refuses web pages where no key is required.

vLLM takes a class by its name (``--middleware``) and gives it only the application.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from reinforcepp.runtime.process import is_loopback

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
ErrorBody = Callable[[int, str], object]

OPEN_PATH = "/health"
NO_KEY = (
    "Authorization: the {word} is missing or wrong. Send the server's {word} as in Authorization: Bearer {capitals}."
)
WEB_PAGE = (
    "{header}: {value} isn't this computer, and a server that requires no {word} refuses web pages of other hosts. Use the "
    "address 127.0.0.1 or localhost. For requests from other hosts or through a proxy, start the server with a {word}."
)


def openai_error(status: int, message: str) -> object:
    """Return the body of an error in the form of OpenAI's API."""
    kind = "authentication_error" if status == 401 else "permission_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


class RequireKey:
    """Refuse every request without the key, except to ``/health``.

    A preflight request of a browser passes, because it can't carry a key: the server's CORS middleware answers it. A request
    for a WebSocket is refused before it is accepted.

    Args:
        app: The application.
        key: The key; default: that of vLLM in the environment.
        word: What the server's users call the key.
        error: Function from status and message to the body of a refusal.

    Raises:
        ValueError: There is no key.
    """

    def __init__(self, app: App, key: str | None = None, *, word: str = "key", error: ErrorBody = openai_error) -> None:
        if not key:
            from reinforcepp.rollout.vllm.server import environment_key  # It loads torch, which not every server needs.

            key = environment_key()
        if not key:
            raise ValueError("a server that requires a key was started without one")
        self._app, self._key, self._error = app, key.encode(), error
        self._message = NO_KEY.format(word=word, capitals=word.upper())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass an allowed request on, or refuse it."""
        if scope["type"] == "lifespan" or self._is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
        else:
            await _refuse(send, scope["type"], 401, self._error(401, self._message))

    def _is_open(self, scope: Message) -> bool:
        if scope["type"] != "http":
            return False
        preflight = scope["method"] == "OPTIONS" and all(
            _values(scope, name) for name in (b"origin", b"access-control-request-method")
        )
        return preflight or scope["path"] == OPEN_PATH

    def _has_key(self, scope: Message) -> bool:
        values = _values(scope, b"authorization")
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        return hmac.compare_digest(key.strip(b" "), self._key) and scheme.lower() == b"bearer"


class RefuseWebPages:
    """Refuse what web pages of other hosts request through the browser of this computer, from a server on a loopback address.

    Their requests have a foreign ``Origin``, or a foreign ``Host`` if the page's host name was changed to a loopback address
    (DNS rebinding). Programs and browser extensions send neither.

    Args:
        app: The application.
        word: What the server's users call a key.
        error: Function from status and message to the body of a refusal.
    """

    def __init__(self, app: App, *, word: str = "key", error: ErrorBody = openai_error) -> None:
        self._app, self._word, self._error = app, word, error

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass an allowed request on, or refuse it."""
        foreign = _foreign_header(scope) if scope["type"] != "lifespan" else None
        if foreign is None:
            await self._app(scope, receive, send)
        else:
            header, value = foreign
            message = WEB_PAGE.format(header=header, value=ascii(value)[1:-1][:100], word=self._word)
            await _refuse(send, scope["type"], 403, self._error(403, message))


def _foreign_header(scope: Message) -> tuple[str, str] | None:
    """Return the first header that names another host, and its value."""
    for value in _values(scope, b"host"):
        host = value.decode("latin-1")
        if not _is_local(f"//{host}"):
            return "Host", host
    for value in _values(scope, b"origin"):
        origin = value.decode("latin-1")
        of_a_page = origin.partition(":")[0].lower() in ("http", "https", "null")
        if of_a_page and not _is_local(origin):
            return "Origin", origin
    return None


def _is_local(url: str) -> bool:
    """Return whether ``url`` names this computer; browsers resolve ``localhost`` and its subdomains themselves."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    return host.endswith(".localhost") or is_loopback(host)


def _values(scope: Message, name: bytes) -> list[bytes]:
    return [value for header, value in scope["headers"] if header.lower() == name]


async def _refuse(send: Send, protocol: str, status: int, content: object) -> None:
    if protocol == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # The server answers the request with status 403.
        return
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
