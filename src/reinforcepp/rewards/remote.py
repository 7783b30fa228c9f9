"""Client of a reward server with OpenRLHF's protocol for remote rewards.

    POST {"query": [prompt + completion, ...], "prompts": [...], "labels": [...], "finish_reason": [...]}
    -> {"rewards": [...]}, a number or null per completion; {"scores": [...]} and a plain list are accepted, too

``finish_reason`` and ``messages``, the prompts as lists of messages, are extensions that other servers ignore. ``messages`` is
sent if a prompt of the batch is a conversation. The client retries transient failures (no connection, timeout,
408, 425, 429, 5xx) with exponential backoff. The last failure in a row raises a RewardError, as does any other failure, so
that training stops instead of continuing with made-up scores.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from reinforcepp.config.reward_spec import TOKEN_VARIABLE
from reinforcepp.errors import ConfigError, RewardError
from reinforcepp.types import Conversation

TRANSIENT_STATUSES = {408, 425, 429, *range(500, 600)}
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 30.0
SHOWN_CHARACTERS = 200
"""Characters of a server's response that an error shows."""

log = logging.getLogger(__name__)


class _TransientError(Exception):
    """A failure after which the same request can succeed."""


class RemoteReward:
    """A reward server as a reward function.

    Args:
        url: address of the scoring endpoint.
        timeout: seconds to wait for a response.
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
        self.headers = {"Content-Type": "application/json"} | authorization()

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
        scores: list[float | None] = []
        with httpx2.Client(timeout=self.timeout, headers=self.headers) as client:
            for start in range(0, len(prompts), self.batch_size):
                batch = {name: values[start : start + self.batch_size] for name, values in rows.items()}
                scores += self._scores(client, batch)
        return scores

    def _scores(self, client: httpx2.Client, rows: dict[str, list[Any]]) -> list[float | None]:
        retrying = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential_jitter(multiplier=self.first_pause, max=MAX_PAUSE_SECONDS, jitter=self.first_pause),
            retry=retry_if_exception_type(_TransientError),
            before_sleep=self._log_retry,
            reraise=True,
        )
        try:
            response = retrying(self._post, client, json.dumps(rows, default=str).encode())
        except _TransientError as failure:
            times = f"{self.attempts} times in a row" if self.attempts > 1 else "once, and reward_attempts is 1"
            raise RewardError(
                f"{self.url}: the reward server failed {times}; it {failure}. Check the server, or raise reward_attempts."
            ) from failure
        return self._read(response, len(rows["query"]))

    def _post(self, client: httpx2.Client, body: bytes) -> httpx2.Response:
        try:
            response = client.post(self.url, content=body)
        except httpx2.TimeoutException as error:
            raise _TransientError(f"sent no response within {self.timeout:g} s") from error
        except httpx2.TransportError as error:
            raise _TransientError(
                f"can't be reached or closed the connection ({error or type(error).__name__})"
            ) from error
        if response.status_code in TRANSIENT_STATUSES:
            raise _TransientError(f"answered {_status(response)}")
        if not response.is_success:
            raise RewardError(
                f"{self.url}: the reward server answered {_status(response)}. {_fix(response.status_code)}"
            )
        return response

    def _log_retry(self, state: RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        log.warning(
            "Reward server %s %s. Retrying in %.1f s (failure %d of %d).",
            self.url,
            state.outcome.exception(),
            state.next_action.sleep,
            state.attempt_number,
            self.attempts,
        )

    def _read(self, response: httpx2.Response, count: int) -> list[float | None]:
        try:
            payload = response.json()
        except ValueError as error:
            raise RewardError(
                f"{self.url}: the reward server's response isn't JSON: {response.text[:SHOWN_CHARACTERS]!r}. {_fix(404)}"
            ) from error
        scores = payload.get("rewards", payload.get("scores")) if isinstance(payload, dict) else payload
        if not isinstance(scores, list):
            raise RewardError(
                f"{self.url}: the reward server's response has no list 'rewards': {str(payload)[:SHOWN_CHARACTERS]!r}. "
                'Send {"rewards": [...]}.'
            )
        if len(scores) != count:
            raise RewardError(
                f"{self.url}: the reward server sent {len(scores)} scores for {count} completions. Send one per completion."
            )
        return scores


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


def _status(response: httpx2.Response) -> str:
    text = f" {response.text[:SHOWN_CHARACTERS]!r}" if response.text else ""
    return f"{response.status_code} {response.reason_phrase}{text}"


def _fix(status: int) -> str:
    if status in (401, 403):
        return f"Set {TOKEN_VARIABLE} to the server's token."
    if status in (404, 405):
        return "Check the address of the scoring endpoint; most end in /get_reward."
    return "Check the server's log."
