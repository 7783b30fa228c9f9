"""Requests to servers that score: retries of transient failures, and limits on what a server can send.

The client retries failures that can pass (no connection, timeout, 408, 425, 429, 5xx) with exponential backoff, and waits at
least as long as the server's ``Retry-After`` says. The last failure in a row raises a RewardError, as does any other failure,
so that training stops instead of continuing with made-up scores.

The server isn't trusted: ``timeout`` covers a whole request, from connecting to the last byte, and a response has a size limit
and no compression.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from reinforcepp.errors import ConfigError, RewardError
from reinforcepp.runtime.process import is_loopback
from reinforcepp.runtime.redaction import redacted
from reinforcepp.runtime.terminal import logger

TRANSIENT_STATUSES = {408, 425, 429, *range(500, 600)}
NO_CREDIT = b"insufficient_quota"
"""In a response with status 429: the account has no credit, so waiting doesn't help."""
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 30.0
MAX_RETRY_AFTER_SECONDS = 120.0
"""A server that asks for a longer pause stops the run, because the pause can be a day."""
SHOWN_CHARACTERS = 200
"""Characters of a server's response that an error shows."""

T = TypeVar("T")
log = logger(__name__)
logger("httpx2")  # At level INFO, it logs the address of each request.


class TransientError(Exception):
    """A failure after which the same request can succeed.

    ``status`` is that of the response, None without one. ``pause`` is the number of seconds for which the server wants no
    request.
    """

    def __init__(self, message: str, status: int | None = None, pause: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.pause = status, pause


class StatusError(RewardError):
    """A response whose ``status`` isn't a success and won't become one, with its ``content``."""

    def __init__(self, message: object = "", status: int = 0, content: bytes = b"") -> None:
        super().__init__(message)
        self.status, self.content = status, content


class Endpoint:
    """The address of a server that scores.

    Args:
        url: address of the requests.
        noun: what the server is called in messages, such as "reward server".
        fix: function from the status of a response to the fix for it.
        attempts_option: name of the setting ``attempts``, for messages.
        headers: of each request.
        timeout: seconds for a request, from connecting to the last byte of the response.
        attempts: requests before the client gives up, including the first.
        first_pause: seconds before the first retry, plus random jitter of up to as much.
    """

    def __init__(
        self,
        url: str,
        *,
        noun: str,
        fix: Callable[[int], str],
        attempts_option: str,
        headers: Mapping[str, str],
        timeout: float,
        attempts: int,
        first_pause: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self.url, self.noun, self.fix, self.attempts_option = url, noun, fix, attempts_option
        self.headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **headers}
        self.timeout, self.attempts, self.first_pause = timeout, attempts, first_pause
        self._logged: set[tuple[str, int]] = set()

    def client(self) -> httpx2.AsyncClient:
        """Return an HTTP client, to be used in one event loop."""
        # A proxy from the environment can't reach the loopback addresses of this node, but would receive texts and token.
        direct = httpx2.AsyncHTTPTransport() if is_loopback(urlsplit(self.url).hostname or "") else None
        return httpx2.AsyncClient(timeout=None, headers=self.headers, transport=direct)

    async def retried(self, send: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Return the result of ``send``, after retries of its transient failures.

        Raises:
            RewardError: the last attempt failed, or an attempt raised it.
        """
        backoff = wait_exponential_jitter(multiplier=self.first_pause, max=MAX_PAUSE_SECONDS, jitter=self.first_pause)

        def pause(state: RetryCallState) -> float:
            failure = state.outcome.exception() if state.outcome is not None else None
            return max(backoff(state), failure.pause if isinstance(failure, TransientError) else 0.0)

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.attempts),
            wait=pause,
            retry=retry_if_exception_type(TransientError),
            before_sleep=self._log_retry,
            reraise=True,
        )
        try:
            result: T = await retrying(send, *arguments)
        except TransientError as failure:
            option = self.attempts_option
            times = f"{self.attempts} times in a row" if self.attempts > 1 else f"once, and {option} is 1"
            raise RewardError(
                f"{self.url}: the {self.noun} failed {times}; it {failure}. Check the server, or raise {option}."
            ) from failure
        self._logged.clear()
        return result

    async def send(self, client: httpx2.AsyncClient, body: bytes, limit: int) -> bytes:
        """Return the content of the response to one request, up to ``limit`` bytes.

        Raises:
            TransientError: the request failed, and can be retried.
            RewardError: the request failed; a StatusError if the server refused it.
        """
        content = bytearray()
        try:
            async with asyncio.timeout(self.timeout), client.stream("POST", self.url, content=body) as response:
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > limit:
                        break
        except TimeoutError as error:
            raise TransientError(f"sent no complete response within {self.timeout:g} s") from error
        except httpx2.TransportError as error:
            raise TransientError(
                f"can't be reached or closed the connection ({error or type(error).__name__})"
            ) from error
        code = response.status_code
        reason = redacted(response.reason_phrase, self.url)
        status = f"answered {code} {reason} {self.shown(content) if content else ''}".rstrip()
        if code in TRANSIENT_STATUSES and NO_CREDIT not in content:
            pause = retry_after(response.headers.get("Retry-After", ""))
            if pause > MAX_RETRY_AFTER_SECONDS:
                fix = "Try again after it."
                raise StatusError(
                    f"{self.url}: the {self.noun} {status}, and asks for a pause of {pause:.0f} s. {fix}", code, b""
                )
            raise TransientError(status, code, pause)
        if not response.is_success:
            raise StatusError(f"{self.url}: the {self.noun} {status}. {self.fix(code)}", code, bytes(content))
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise RewardError(
                f"{self.url}: the {self.noun}'s response has the Content-Encoding {encoding[:SHOWN_CHARACTERS]!r}. "
                "Turn off compression in the server or its proxy."
            )
        if len(content) > limit:
            raise RewardError(
                f"{self.url}: the {self.noun}'s response is over {limit / 2**20:.1f} MiB. Check the server."
            )
        return bytes(content)

    def shown(self, content: bytes | bytearray) -> str:
        """Return the beginning of a response for a message, with control characters escaped and without secrets."""
        text = content[: 4 * SHOWN_CHARACTERS].decode(errors="replace")
        return repr(redacted(text, self.url)[:SHOWN_CHARACTERS])

    def _log_retry(self, state: RetryCallState) -> None:
        """Log a retry, once for all requests that fail in the same way before one succeeds."""
        assert state.outcome is not None and state.next_action is not None
        failure = str(state.outcome.exception())
        if (failure, state.attempt_number) in self._logged:
            return
        self._logged.add((failure, state.attempt_number))
        log.warning(
            "%s %s %s. Retrying in %.1f s (failure %d of %d).",
            self.noun.capitalize(),
            redacted(self.url),
            failure,
            state.next_action.sleep,
            state.attempt_number,
            self.attempts,
        )


def retry_after(header: str) -> float:
    """Return the seconds in a header ``Retry-After``, which holds a number or a date; 0 for an invalid one."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def authorization(variable: str) -> dict[str, str]:
    """Return the authorization header if the environment variable holds a token.

    Raises:
        ConfigError: the token has characters that a header can't hold. The message never shows the token.
    """
    token = os.environ.get(variable, "")
    if not token:
        return {}
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(
            f"{variable}: the token has invalid characters, such as a space or a line break. Set it to the token alone."
        )
    return {"Authorization": f"Bearer {token}"}
