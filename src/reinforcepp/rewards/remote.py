"""Client of a reward server with OpenRLHF's protocol for remote rewards.

    POST {"query": [prompt + completion, ...], "prompts": [...], "labels": [...], "finish_reason": [...]}
    -> {"rewards": [...]}, a number or null per completion; {"scores": [...]} and a plain list are accepted, too

``finish_reason`` and ``messages``, the prompts as lists of messages, are extensions that other servers ignore. ``messages`` is
sent if a prompt of the batch is a conversation. The client retries transient failures (no connection, timeout,
408, 425, 429, 5xx) with exponential backoff. The last failure in a row raises a RewardError, as does any other failure, so
that training stops instead of continuing with made-up scores.

The server isn't trusted: ``timeout`` covers a whole request, from connecting to the last byte, and a response has a size limit
and no compression.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from reinforcepp.config.reward_spec import TOKEN_VARIABLE
from reinforcepp.errors import ConfigError, RewardError
from reinforcepp.runtime.process import is_loopback, outcome
from reinforcepp.runtime.redaction import redacted
from reinforcepp.runtime.terminal import logger
from reinforcepp.types import Conversation

TRANSIENT_STATUSES = {408, 425, 429, *range(500, 600)}
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 30.0
MAX_RESPONSE_BYTES, MAX_RESPONSE_BYTES_PER_COMPLETION = 2**20, 4096
"""Size limit of a response: the first plus the second times the completions. A score takes about 20 bytes; other servers also
send logs per completion, which are ignored."""
SHOWN_CHARACTERS = 200
"""Characters of a server's response that an error shows."""

log = logger(__name__)
logger("httpx2")  # At level INFO, it logs the address of each request.


class _TransientError(Exception):
    """A failure after which the same request can succeed."""


class RemoteReward:
    """A reward server as a reward function.

    Args:
        url: address of the scoring endpoint.
        timeout: seconds for a request, from connecting to the last byte of the response.
        attempts: requests before the client gives up, including the first.
        batch_size: completions per request.
        label_column: column of the data that is sent as labels.
        first_pause: seconds before the first retry, plus random jitter of up to as much.
    """

    plain_text = True

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        attempts: int = 5,
        batch_size: int = 64,
        label_column: str = "label",
        first_pause: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self.url = url
        self.timeout = timeout
        self.attempts = attempts
        self.batch_size = batch_size
        self.label_column = label_column
        self.first_pause = first_pause
        self.headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"} | authorization()

    @property
    def name(self) -> str:
        """Host and port, under which the metrics are logged."""
        parts = urlsplit(self.url)
        return f"{parts.hostname}-{parts.port}" if parts.port else str(parts.hostname)

    def __call__(
        self, prompts: list[str], completions: list[str], finish_reason: Sequence[str] | None = None, **columns: Any
    ) -> list[float | None]:
        """Return the server's score of each completion.

        Raises:
            RewardError: the server failed or sent an unusable response.
        """
        rows = {
            "query": [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
            "prompts": prompts,
            **_messages(columns.get("conversations") or ()),
            **_variables(columns.get("chat_template_kwargs") or ()),
            "labels": columns.get(self.label_column, [None] * len(prompts)),
            "finish_reason": list(finish_reason or ["stop"] * len(prompts)),
        }
        batches = [
            {name: values[start : start + self.batch_size] for name, values in rows.items()}
            for start in range(0, len(prompts), self.batch_size)
        ]
        return outcome(self._score_batches(batches))

    async def _score_batches(self, batches: list[dict[str, list[Any]]]) -> list[float | None]:
        # A proxy from the environment can't reach the loopback addresses of this node, but would receive texts and token.
        direct = httpx2.AsyncHTTPTransport() if is_loopback(urlsplit(self.url).hostname or "") else None
        scores: list[float | None] = []
        async with httpx2.AsyncClient(timeout=None, headers=self.headers, transport=direct) as client:
            for batch in batches:
                scores += await self._scores(client, batch)
        return scores

    async def _scores(self, client: httpx2.AsyncClient, rows: dict[str, list[Any]]) -> list[float | None]:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential_jitter(multiplier=self.first_pause, max=MAX_PAUSE_SECONDS, jitter=self.first_pause),
            retry=retry_if_exception_type(_TransientError),
            before_sleep=self._log_retry,
            reraise=True,
        )
        count = len(rows["query"])
        limit = MAX_RESPONSE_BYTES + count * MAX_RESPONSE_BYTES_PER_COMPLETION
        try:
            content: bytes = await retrying(self._post, client, json.dumps(rows, default=str).encode(), limit)
        except _TransientError as failure:
            times = f"{self.attempts} times in a row" if self.attempts > 1 else "once, and reward_attempts is 1"
            raise RewardError(
                f"{self.url}: the reward server failed {times}; it {failure}. Check the server, or raise reward_attempts."
            ) from failure
        return self._read(content, count)

    async def _post(self, client: httpx2.AsyncClient, body: bytes, limit: int) -> bytes:
        """Return the content of the response to one request."""
        content = bytearray()
        try:
            async with asyncio.timeout(self.timeout), client.stream("POST", self.url, content=body) as response:
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > limit:
                        break
        except TimeoutError as error:
            raise _TransientError(f"sent no complete response within {self.timeout:g} s") from error
        except httpx2.TransportError as error:
            raise _TransientError(
                f"can't be reached or closed the connection ({error or type(error).__name__})"
            ) from error
        reason = redacted(response.reason_phrase, self.url)
        status = f"answered {response.status_code} {reason} {self._shown(content) if content else ''}".rstrip()
        if response.status_code in TRANSIENT_STATUSES:
            raise _TransientError(status)
        if not response.is_success:
            raise RewardError(f"{self.url}: the reward server {status}. {_fix(response.status_code)}")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise RewardError(
                f"{self.url}: the reward server's response has the Content-Encoding {encoding[:SHOWN_CHARACTERS]!r}. "
                "Turn off compression in the server or its proxy."
            )
        if len(content) > limit:
            raise RewardError(
                f"{self.url}: the reward server's response is over {limit / 2**20:.1f} MiB. Send one number per completion."
            )
        return bytes(content)

    def _log_retry(self, state: RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        log.warning(
            "Reward server %s %s. Retrying in %.1f s (failure %d of %d).",
            redacted(self.url),
            state.outcome.exception(),
            state.next_action.sleep,
            state.attempt_number,
            self.attempts,
        )

    def _shown(self, content: bytes | bytearray) -> str:
        """Return the beginning of a response for a message, with control characters escaped and without secrets."""
        text = content[: 4 * SHOWN_CHARACTERS].decode(errors="replace")
        return repr(redacted(text, self.url)[:SHOWN_CHARACTERS])

    def _read(self, content: bytes, count: int) -> list[float | None]:
        """Return the scores in a response."""
        try:
            payload = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RewardError(
                f"{self.url}: the reward server's response isn't JSON: {self._shown(content)}. {_fix(404)}"
            ) from error
        scores = payload.get("rewards", payload.get("scores")) if isinstance(payload, dict) else payload
        if not isinstance(scores, list):
            raise RewardError(
                f"{self.url}: the reward server's response has no list 'rewards': {self._shown(content)}. "
                'Send {"rewards": [...]}.'
            )
        if len(scores) != count:
            raise RewardError(
                f"{self.url}: the reward server sent {len(scores)} scores for {count} completions. Send one per completion."
            )
        return [self._number(i, score) for i, score in enumerate(scores)]

    def _number(self, index: int, score: Any) -> float | None:
        """Return a score; a number that isn't finite is handled with those of other reward functions."""
        if score is None:
            return None
        if not isinstance(score, (int, float)):
            raise RewardError(
                f"{self.url}: the reward server sent a {type(score).__name__} as score {index}. Send a number or null."
            )
        try:
            return float(score)
        except OverflowError as error:
            raise RewardError(
                f"{self.url}: the reward server sent an integer that is too large as score {index}. Send a smaller number."
            ) from error


def _messages(conversations: Sequence[Conversation]) -> dict[str, list[Any]]:
    if all(isinstance(prompt, str) for prompt in conversations):
        return {}
    return {"messages": [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in conversations]}


def _variables(variables: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {"chat_template_kwargs": list(variables)} if any(variables) else {}


def authorization() -> dict[str, str]:
    """Return the authorization header if the environment holds a token.

    Raises:
        ConfigError: the token has characters that a header can't hold. The message never shows the token.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        return {}
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(
            f"{TOKEN_VARIABLE}: the token has invalid characters, such as a space or a line break. Set it to the token alone."
        )
    return {"Authorization": f"Bearer {token}"}


def _fix(status: int) -> str:
    if status in (401, 403):
        return f"Set {TOKEN_VARIABLE} to the server's token."
    if status in (404, 405):
        return "Check the address of the scoring endpoint; most end in /get_reward."
    return "Check the server's log."
