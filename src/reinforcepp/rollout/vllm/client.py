"""One vLLM server that is trained against: what it is asked, what it must be like, and how it is seen to be gone.

Written against vLLM 0.32 and the endpoints that ``vllm serve`` has itself: ``/v1/completions``, and those of
``VLLM_SERVER_DEV_MODE=1`` for weights. Whatever is asked, the server's ``/health`` is looked at beside it, so a server that
has died, was stopped or can't be reached any more is told from one that is slow.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2
import torch

from reinforcepp.errors import RolloutError
from reinforcepp.rollout.engine import completed
from reinforcepp.rollout.vllm.compat import sampling_settings
from reinforcepp.rollout.vllm.server import KEY, training_command
from reinforcepp.runtime import outcome
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
TESTED = "0.32."
SHOWN = 300  # characters of what a server says
EVENT, END = b"data: ", b"data: [DONE]"  # lines of a stream
TOKENS_PER_EVENT = 16

log = logging.getLogger(__name__)


class Fault(Exception):
    """Why a server can't be used now, though it may be later; the text goes on where its address ends."""


class Failed(Fault):
    """It is there, and failed to do what it was asked."""


class Unfit(RolloutError):
    """It isn't a server that can be trained against: at the start a mistake of the user's."""


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for, in seconds."""

    connect: float = 5.0
    """To be reached."""
    beat: float = 5.0
    """Between two looks at its health while it works."""
    health: float = 10.0
    """For the answer to each; two in a row may not fail."""
    work: float = 300.0
    """For its next token, or until it has taken over weights."""
    gone: float = 60.0
    """For one of the servers to come back when none is left."""


@dataclass(frozen=True)
class Need:
    """What a training needs of a server."""

    model: str
    """For the command to start it."""
    max_length: int
    """Prompt and completion together, in tokens."""
    vocabulary: int
    eos_ids: frozenset[int]


@dataclass(frozen=True)
class Facts:
    """What a server says of itself."""

    model: str
    """The name that requests have to give."""
    version: str
    max_length: int
    dtype: torch.dtype
    logprobs_mode: str
    extension: str
    """The worker extension that it was started with."""
    weight_transfer: str
    """The backend for weights that it was started with."""


class VllmClient:
    """A server at ``url``, spoken to with ``key``; for one thread at a time.

    Its methods raise a ``Fault`` where the server can't be used now, ``Unfit`` where it never can, and another ``RolloutError``
    where no server could do what is asked.
    """

    def __init__(self, url: str, key: str | None, need: Need, patience: Patience) -> None:
        self.url, self.need, self.patience = url, need, patience
        self.facts: Facts | None = None
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._last_sign = 0.0
        self._tls = ssl.create_default_context()  # reads many certificates, and would be made for each connection

    # --- what it is asked ---

    def check(self) -> Facts:
        """See that the server is one that can be trained against."""
        self.facts = outcome(self._watched(self._check()))
        return self.facts

    def post(self, path: str, body: Any = None) -> Any:
        """What an endpoint answers."""
        return outcome(self._watched(self._post(path, body)))

    def get(self, path: str) -> Any:
        """What an endpoint says."""

        async def work() -> Any:
            async with self._client() as client:
                return await self._get(client, path)

        return outcome(self._watched(work()))

    def answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        at_a_time: int,
        version: str,
    ) -> list[list[Completion]]:
        """The completions of each prompt, sampled from the weights called ``version``."""

        async def all_of_them() -> list[list[Completion]]:
            rows = [(prompt, sample) for prompt in prompts for sample in range(sampling.num_samples)]
            room = asyncio.Semaphore(at_a_time)
            async with self._client() as client:
                sampled = await asyncio.gather(*(self._sample(client, room, sampling, *row) for row in rows))
                held = (await self._get(client, "/weight_info"))["weight_version"]
            if held != version:
                raise Fault(
                    f"holds other weights ({held!r}) than it was given ({version!r}): it was started again, or another "
                    "training uses it"
                )
            whole = [
                completed(tokenizer, self.need.eos_ids, prompt, *drawn)
                for (prompt, _), drawn in zip(rows, sampled, strict=True)
            ]
            number = sampling.num_samples
            return [whole[i : i + number] for i in range(0, len(whole), number)]

        return outcome(self._watched(all_of_them()))

    # --- inside ---

    async def _check(self) -> Facts:
        async with self._client() as client:
            await self._look_at_health(client)
            listed = await self._get(client, "/v1/models")
            version = await self._get(client, "/version")
            info = await self._get(client, "/server_info?config_format=json")
            try:
                facts = _facts(listed, version, info)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise Unfit(
                    f"What {self.url} says of itself isn't what a server of vLLM {TESTED}x says: {error!r}."
                ) from error
            if not facts.version.startswith(TESTED):
                log.warning("%s runs vLLM %s; this was written against %sx.", self.url, facts.version, TESTED)
            if facts.max_length < self.need.max_length:
                self._refuse(
                    f"takes sequences of {facts.max_length} tokens, but this training's have up to {self.need.max_length}"
                )
            if facts.logprobs_mode != "processed_logprobs":
                self._refuse(f"tells {facts.logprobs_mode}, not the log-probabilities of what is sampled")
            # whoever used it before may have died in the middle of an update
            await self._post("/resume", client=client)
            await self._knows_last_token(client, facts.model)
        return facts

    async def _knows_last_token(self, client: httpx2.AsyncClient, model: str) -> None:
        """Refuse a model with fewer tokens, which weights of this training's model would break."""
        last = self.need.vocabulary - 1
        response = await client.post("/v1/completions", json={"model": model, "prompt": [last], "max_tokens": 1})
        if response.status_code == 400 and "vocabulary" in response.text:
            self._refuse(f"serves another model ({model}), one that doesn't know token {last}")
        self._read(response)

    async def _sample(
        self, client: httpx2.AsyncClient, room: asyncio.Semaphore, sampling: Sampling, prompt: Prompt, sample: int
    ) -> tuple[list[int], list[float]]:
        assert self.facts is not None, "a server is checked first"
        body = sampling_settings(sampling, prompt, sample, self.need.eos_ids) | {
            "model": self.facts.model,
            "prompt": list(prompt.ids),
            "min_p": 0,  # or a server would take what the model's own settings say
            "return_token_ids": True,
            "stream": True,
            "stream_interval": TOKENS_PER_EVENT,
        }
        ids: list[int] = []
        logprobs: list[float] = []
        reason = None
        async with room, client.stream("POST", "/v1/completions", json=body) as response:
            if not response.is_success:
                await response.aread()
                self._read(response)
            async for event in _events(response):
                part = _part(event)
                ids += part[0]
                logprobs += part[1]
                reason = part[2] or reason
                self._last_sign = time.monotonic()
        if reason not in ("stop", "length") or not len(ids) == len(logprobs) > 0:
            raise Fault(f"gave up in the middle of an answer ({reason or 'without a reason'})")
        return ids, logprobs

    async def _get(self, client: httpx2.AsyncClient, path: str) -> Any:
        return self._read(await client.get(path))

    async def _post(self, path: str, body: Any = None, *, client: httpx2.AsyncClient | None = None) -> Any:
        if client is not None:
            return self._read(await client.post(path, json=body))
        async with self._client() as own:
            return self._read(await own.post(path, json=body))

    async def _look_at_health(self, client: httpx2.AsyncClient) -> None:
        limits = httpx2.Timeout(self.patience.health, connect=self.patience.connect)
        self._read(await client.get("/health", timeout=limits))

    def _client(self) -> httpx2.AsyncClient:
        """A client without limits of time: those are :meth:`_watched`'s."""
        return httpx2.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            verify=self._tls,
            timeout=None,
            limits=httpx2.Limits(),
            trust_env=False,
        )

    def _read(self, response: httpx2.Response) -> Any:
        """What the server says, if it is an answer."""
        status, said = response.status_code, response.text[:SHOWN]
        if status in (401, 403):
            raise Unfit(f"The vLLM server {self.url} wants another key: set {KEY} to the one that it was started with.")
        if status == 404:
            self._refuse(f"doesn't offer {response.url.path}")
        if 400 <= status < 500 and status not in (408, 425, 429):
            raise RolloutError(f"The vLLM server {self.url} refuses {response.url.path}: {said}")
        if not response.is_success:
            raise Failed(f"failed with {status} {response.reason_phrase} ({said})")
        if not said:
            return None
        try:
            return response.json()
        except ValueError as error:
            raise Unfit(f"At {self.url} is something else than a vLLM server; it said {said!r}.") from error

    def _refuse(self, why: str) -> None:
        raise Unfit(
            f"The vLLM server {self.url} {why}: start it by `{training_command(self.need.model, self.need.max_length)}`."
        )

    # --- whether it is there ---

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` gives, unless the server is seen to be gone before."""
        self._last_sign = time.monotonic()
        task, beat = asyncio.create_task(work), asyncio.create_task(self._beat())
        try:
            await asyncio.wait((task, beat), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await beat  # raises
            return await task
        except httpx2.ConnectTimeout as error:
            raise Fault(f"can't be reached (no connection within {self.patience.connect:g} s)") from error
        except httpx2.ConnectError as error:
            raise Fault(f"can't be reached ({_cause(error)})") from error
        except httpx2.TimeoutException as error:
            raise Fault("gave no answer in time") from error
        except httpx2.TransportError as error:
            raise Fault(f"broke off ({_cause(error)})") from error
        finally:
            task.cancel()
            beat.cancel()

    async def _beat(self) -> None:
        """Look at the server's health until it is bad, or nothing comes for too long."""
        patience, missed = self.patience, 0
        async with self._client() as client:
            while True:
                await asyncio.sleep(patience.beat)
                if time.monotonic() - self._last_sign > patience.work:
                    raise Fault(f"has shown no progress for {patience.work:g} s, though it says it is well")
                try:
                    await self._look_at_health(client)
                    missed = 0
                except httpx2.TransportError as error:
                    missed += 1
                    if missed > 1:
                        raise Fault(f"no longer answers ({_cause(error)})") from error


# --- what it says -----------------------------------------------------------------------------------------------------


def _facts(listed: Any, version: Any, info: Any) -> Facts:
    model, config = listed["data"][0], info["vllm_config"]["model_config"]
    return Facts(
        model=str(model["id"]),
        version=str(version["version"]),
        max_length=int(model["max_model_len"]),
        dtype=getattr(torch, config["dtype"].removeprefix("torch.")),
        logprobs_mode=str(config["logprobs_mode"]),
        extension=info["vllm_config"]["parallel_config"]["worker_extension_cls"],
        weight_transfer=(info["vllm_config"]["weight_transfer_config"] or {}).get("backend", ""),
    )


async def _events(response: httpx2.Response) -> AsyncIterator[bytes]:
    """What a stream says, event by event. ``aiter_lines`` won't do: it also ends lines within texts, where they have an end
    of line that JSON leaves as it is.
    """
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(EVENT) and line.rstrip() != END:
                yield line.removeprefix(EVENT)


def _part(event: bytes) -> tuple[list[int], list[float], str | None]:
    """The tokens, their log-probabilities and, at the end, the reason for it."""
    try:
        said = json.loads(event)
        if "error" in said:
            raise Fault(f"failed in the middle of an answer ({str(said['error'])[:SHOWN]})")
        (choice,) = said["choices"]
        logprobs = choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
        return choice["token_ids"], logprobs, choice["finish_reason"]
    except (KeyError, TypeError, ValueError) as error:
        raise Fault(f"answered something that can't be read ({event[:SHOWN]!r})") from error


def _cause(error: BaseException) -> str:
    """What the system says, which the libraries in between put in other words."""
    if isinstance(error, httpx2.TimeoutException):
        return "nothing came in time"
    deepest, inner = str(error) or type(error).__name__, error.__cause__ or error.__context__
    while inner is not None:
        if isinstance(inner, ssl.SSLError):
            return str(inner)  # its number is none of the system's
        if isinstance(inner, OSError) and inner.errno:
            deepest = os.strerror(inner.errno) if inner.errno > 0 else str(inner.strerror)
        inner = inner.__cause__ or inner.__context__
    return deepest
