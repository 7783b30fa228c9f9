"""uvicorn with limits for slow, broken and hostile clients, and one log line per refused request.

uvicorn limits neither the time that a request takes to arrive nor idle connections, see :class:`LimitedConnection`.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from reinforcepp.errors import ConfigError
from reinforcepp.monitoring.signals import handle_signals
from reinforcepp.runtime.terminal import echo_from_handler, logger

MAX_CONNECTIONS = 512
"""Open connections; the next one replaces an idle one of the address with the most, see :class:`LimitedConnection`."""
REQUEST_TIMEOUT_SECONDS = 60.0
"""Seconds for headers and body of a request to arrive, and for a client to read a response."""
KEEP_ALIVE_SECONDS = 60
"""Seconds that a connection can wait for its next request."""
LOGGED_PER_MINUTE = 10
SHOWN_CHARACTERS = 300

log = logger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; port 0 chooses a free one.

    Raises:
        ConfigError: The address is in use, needs permissions, or isn't of this computer.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        fix = "Choose another --host, an address of this computer."
        if error.errno == errno.EADDRINUSE:
            fix = "Choose another --port, or 0 for a free one."
        if error.errno == errno.EACCES:
            fix = "Choose a --port of 1024 or above."
        raise ConfigError(f"{host} port {port}: can't listen on this address ({error.strerror}). {fix}") from error


class Server(uvicorn.Server):
    """A server on a socket that listens already.

    Args:
        app: the application.
        listener: the socket.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self.refusals = Refusals()
        super().__init__(
            uvicorn.Config(
                LoggedRefusals(app, self.refusals),
                loop="asyncio",
                http=partial(LimitedConnection, self.refusals),  # type: ignore[arg-type]  # it is called like a class
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # LoggedRefusals and LimitedConnection log instead, and not without limit.
                access_log=False,
                workers=1,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )
        # Connections inherit it. Otherwise the body of a response waits 40 ms for the client to acknowledge its headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._listener = listener

    def run_until_signal(self) -> None:
        """Answer requests until SIGINT, SIGTERM or ``stop``, then finish pending responses; a second signal exits at once."""
        with handle_signals(self._stop_or_exit):
            self.run(sockets=[self._listener])

    def stop(self) -> None:
        """End ``run_until_signal``, from any thread."""
        self.should_exit = True

    def _stop_or_exit(self, number: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + number)
        if any(isinstance(each, LimitedConnection) and not each.is_waiting for each in self.server_state.connections):
            echo_from_handler("Finishing the responses in progress. A second signal stops immediately.", "yellow")
        self.stop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to ``run_until_signal``; uvicorn would raise them again in the end."""
        yield


class LimitedConnection(H11Protocol):
    """A connection whose requests must arrive, and whose responses must be read, in time.

    A new connection can replace one that waits for its client: the one that has waited for the longest time, of the client
    address with the most connections, so that one client can't close the connections of others.
    """

    def __init__(self, refusals: Refusals, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._refusals = refusals
        self._timer: asyncio.TimerHandle | None = None
        self._since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit; if there are too many connections, close one."""
        super().connection_made(transport)
        self._limit(REQUEST_TIMEOUT_SECONDS)
        if len(self.connections) > MAX_CONNECTIONS:
            limited = [each for each in self.connections if isinstance(each, LimitedConnection)]
            number = Counter(each._address for each in limited)
            waiting = [each for each in limited if each.is_waiting]
            oldest = min(waiting, key=lambda each: (-number[each._address], each._since), default=self)
            oldest.drop(f"there are more than {MAX_CONNECTIONS} connections")

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def is_waiting(self) -> bool:
        """Whether a request has yet to arrive completely, or a response to be read."""
        return self.flow.write_paused or self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def pause_writing(self) -> None:
        """Start the time limit of a client that doesn't read."""
        super().pause_writing()
        self._limit(REQUEST_TIMEOUT_SECONDS, "the client didn't read the responses")

    def resume_writing(self) -> None:
        """Start the time limit of the rest of the request, if it isn't complete."""
        super().resume_writing()
        self._limit(REQUEST_TIMEOUT_SECONDS)
        if not self.is_waiting:
            self._lift_limit()

    def data_received(self, data: bytes) -> None:
        """Lift the time limit of a complete request."""
        super().data_received(data)
        if not self.is_waiting:
            self._lift_limit()

    def on_response_complete(self) -> None:
        """Start the time limit of the next request, or of the rest of a refused one, which is discarded."""
        self._limit(KEEP_ALIVE_SECONDS + REQUEST_TIMEOUT_SECONDS)
        super().on_response_complete()
        if not self.is_waiting:  # A request that arrived earlier begins.
            self._lift_limit()

    def shutdown(self) -> None:
        """Close the connection after the response in progress, if any."""
        super().shutdown()
        if self.is_waiting:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time limit."""
        super().connection_lost(exc)
        self._lift_limit()

    def send_400_response(self, msg: str) -> None:
        """Refuse data that isn't HTTP, unless a response has begun."""
        body = json.dumps({"error": "The request isn't valid HTTP/1.1, or its headers are too long."}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._refusals.log(self.client, "sent no valid HTTP")

    def drop(self, reason: str) -> None:
        """Close the connection at once."""
        self.connections.discard(self)  # Further connections may be made before connection_lost is called.
        self.transport.abort()
        self._refusals.log(self.client, f"lost its connection because {reason}")

    def _lift_limit(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _limit(self, seconds: float, problem: str = "no complete request arrived") -> None:
        self._lift_limit()
        self._since = self.loop.time()
        self._timer = self.loop.call_later(seconds, self.drop, f"{problem} within {seconds:g} s")


class LoggedRefusals:
    """Middleware that logs the refused requests of ``app``."""

    def __init__(self, app: ASGIApp, refusals: Refusals) -> None:
        self._app, self._refusals = app, refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log its response if it is an error."""
        status = 0

        async def observed(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if status >= 400 and message["type"] == "http.response.body":
                target = scope["raw_path"].decode("ascii", "replace")[:SHOWN_CHARACTERS]
                reason = message.get("body", b"").decode("ascii", "replace")[:SHOWN_CHARACTERS]
                self._refusals.log(
                    scope["client"], f"{scope['method'][:20]} {target} refused with status {status}: {reason}"
                )
            await send(message)

        await self._app(scope, receive, observed)


class Refusals:
    """The log of refused requests, limited so that no client can fill a disk."""

    def __init__(self) -> None:
        self._minute, self._logged = -1, 0

    def log(self, client: Any, problem: str, error: BaseException | None = None) -> None:
        """Log a client's problem in one line, up to 10 per minute.

        Args:
            client: address and port, or None if unknown.
            problem: with everything the client chose escaped.
            error: exception whose traceback is logged, too.
        """
        minute = int(time.monotonic() / 60)
        self._logged = self._logged + 1 if minute == self._minute else 1
        self._minute = minute
        if self._logged <= LOGGED_PER_MINUTE:
            rest = " The next refusals of this minute aren't logged." if self._logged == LOGGED_PER_MINUTE else ""
            log.warning("Client %s: %s%s", client[0] if client else "unknown", problem, rest, exc_info=error)
