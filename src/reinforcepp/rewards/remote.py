"""A reward server, asked in the protocol of OpenRLHF's remote rewards.

    POST {"query": [prompt + completion, ...], "prompts": [...], "labels": [...], "finish_reason": [...]}
    -> {"rewards": [...]}, a number or null for each; {"scores": [...]} and a plain list are taken, too

``finish_reason`` is an addition of ours, which other servers ignore. A failure that may pass (no connection, no answer in
time, 408, 425, 429, 5xx) is tried again after a pause that doubles each time; the last of several in a row, like any
other failure, is a RewardError: a training stops then instead of going on with made-up scores.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from reinforcepp.config.reward_spec import TOKEN_VARIABLE
from reinforcepp.errors import ConfigError, RewardError

PASSING = {408, 425, 429, *range(500, 600)}
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds
SHOWN = 200  # characters of what a server says

log = logging.getLogger(__name__)


class _MayPass(Exception):
    """A failure after which the same request may succeed; its text ends a sentence about the server."""


class RemoteReward:
    """A reward server as a reward function.

    Args:
        url: where it is asked.
        timeout: seconds that an answer may take.
        attempts: requests, all but one of them repetitions, before it counts as failed.
        batch_size: completions in a request.
        label_column: the data's column that is sent as labels.
        first_pause: seconds before the first repetition, give or take a part of it.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        attempts: int = 5,
        batch_size: int = 64,
        label_column: str = "label",
        first_pause: float = FIRST_PAUSE,
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
        """Host and port, for the metrics."""
        parts = urlsplit(self.url)
        return f"{parts.hostname}-{parts.port}" if parts.port else str(parts.hostname)

    def __call__(
        self, prompts: list[str], completions: list[str], finish_reason: Sequence[str] | None = None, **columns: Any
    ) -> list[float | None]:
        """What the server says of each completion.

        Raises:
            RewardError: if it says nothing that can be used.
        """
        rows = {
            "query": [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
            "prompts": prompts,
            "labels": columns.get(self.label_column, [None] * len(prompts)),
            "finish_reason": list(finish_reason or ["stop"] * len(prompts)),
        }
        scores: list[float | None] = []
        with httpx2.Client(timeout=self.timeout, headers=self.headers) as client:
            for start in range(0, len(prompts), self.batch_size):
                part = {name: values[start : start + self.batch_size] for name, values in rows.items()}
                scores += self._scores(client, part)
        return scores

    def _scores(self, client: httpx2.Client, rows: dict[str, list[Any]]) -> list[float | None]:
        retrying = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential_jitter(multiplier=self.first_pause, max=LONGEST_PAUSE, jitter=self.first_pause),
            retry=retry_if_exception_type(_MayPass),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            answer = retrying(self._post, client, json.dumps(rows, default=str).encode())
        except _MayPass as failure:
            times = f"{self.attempts} times in a row" if self.attempts > 1 else "once, and reward_attempts is 1"
            raise RewardError(
                f"The reward server {self.url} failed {times}, the last time because it {failure}: without scores there is "
                "nothing to train on."
            ) from failure
        return self._read(answer, len(rows["query"]))

    def _post(self, client: httpx2.Client, body: bytes) -> httpx2.Response:
        try:
            response = client.post(self.url, content=body)
        except httpx2.TimeoutException as error:
            raise _MayPass(f"gave no answer within {self.timeout:g} s") from error
        except httpx2.TransportError as error:
            raise _MayPass(f"can't be reached or broke off ({error or type(error).__name__})") from error
        if response.status_code in PASSING:
            raise _MayPass(f"answered {_status(response)}")
        if not response.is_success:
            raise RewardError(f"The reward server {self.url} answered {_status(response)}{_cure(response.status_code)}")
        return response

    def _tell(self, state: RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        log.warning(
            "The reward server %s %s; asking again in %.1f s (failure %d of %d).",
            self.url,
            state.outcome.exception(),
            state.next_action.sleep,
            state.attempt_number,
            self.attempts,
        )

    def _read(self, response: httpx2.Response, count: int) -> list[float | None]:
        try:
            said = response.json()
        except ValueError as error:
            raise RewardError(
                f"The reward server {self.url} answered something that isn't JSON: {response.text[:SHOWN]!r}."
            ) from error
        scores = said.get("rewards", said.get("scores")) if isinstance(said, dict) else said
        if not isinstance(scores, list):
            raise RewardError(
                f"The answer of the reward server {self.url} has no list 'rewards': {str(said)[:SHOWN]!r}."
            )
        if len(scores) != count:
            raise RewardError(f"The reward server {self.url} gave {len(scores)} scores for {count} completions.")
        return scores


def authorization() -> dict[str, str]:
    """The header with the token that the environment holds, if any.

    Raises:
        ConfigError: if it can't stand in a header; the token itself is never told.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        return {}
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(f"{TOKEN_VARIABLE} holds characters that no token has, such as a space or the end of a line.")
    return {"Authorization": f"Bearer {token}"}


def _status(response: httpx2.Response) -> str:
    said = f" {response.text[:SHOWN]!r}" if response.text else ""
    return f"{response.status_code} {response.reason_phrase}{said}"


def _cure(status: int) -> str:
    if status in (401, 403):
        return f": set {TOKEN_VARIABLE} to the token that it wants."
    if status in (404, 405):
        return ": is that the address that it scores under? Most end in /get_reward."
    return "."
