"""Client of a reward server with OpenRLHF's protocol for remote rewards.

    POST {"query": [prompt + completion, ...], "prompts": [...], "labels": [...], "finish_reason": [...]}
    -> {"rewards": [...]}, a number or null per completion; {"scores": [...]} and a plain list are accepted, too

``finish_reason`` and ``messages``, the prompts as lists of messages, are extensions that other servers ignore. ``messages`` is
sent if a prompt of the batch is a conversation. The module ``endpoint`` says which failures are retried, and what is limited.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2

from reinforcepp.config.reward_spec import TOKEN_VARIABLE
from reinforcepp.errors import RewardError
from reinforcepp.rewards.endpoint import FIRST_PAUSE_SECONDS, Endpoint, authorization
from reinforcepp.runtime.process import outcome
from reinforcepp.types import Conversation

MAX_RESPONSE_BYTES, MAX_RESPONSE_BYTES_PER_COMPLETION = 2**20, 4096
"""Size limit of a response: the first plus the second times the completions. A score takes about 20 bytes; other servers also
send logs per completion, which are ignored."""


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
        self.batch_size = batch_size
        self.label_column = label_column
        self.endpoint = Endpoint(
            url,
            noun="reward server",
            fix=_fix,
            attempts_option="reward_attempts",
            headers=authorization(TOKEN_VARIABLE),
            timeout=timeout,
            attempts=attempts,
            first_pause=first_pause,
        )

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
        scores: list[float | None] = []
        async with self.endpoint.client() as client:
            for batch in batches:
                scores += await self._scores(client, batch)
        return scores

    async def _scores(self, client: httpx2.AsyncClient, rows: dict[str, list[Any]]) -> list[float | None]:
        count = len(rows["query"])
        limit = MAX_RESPONSE_BYTES + count * MAX_RESPONSE_BYTES_PER_COMPLETION
        body = json.dumps(rows, default=str).encode()
        return self._read(await self.endpoint.retried(self.endpoint.send, client, body, limit), count)

    def _read(self, content: bytes, count: int) -> list[float | None]:
        """Return the scores in a response."""
        try:
            payload = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RewardError(
                f"{self.url}: the reward server's response isn't JSON: {self.endpoint.shown(content)}. {_fix(404)}"
            ) from error
        scores = payload.get("rewards", payload.get("scores")) if isinstance(payload, dict) else payload
        if not isinstance(scores, list):
            raise RewardError(
                f"{self.url}: the reward server's response has no list 'rewards': {self.endpoint.shown(content)}. "
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


def _fix(status: int) -> str:
    if status in (401, 403):
        return f"Set {TOKEN_VARIABLE} to the server's token."
    if status in (404, 405):
        return "Check the address of the scoring endpoint; most end in /get_reward."
    return "Check the server's log."
