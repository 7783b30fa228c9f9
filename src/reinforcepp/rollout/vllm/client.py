"""The client of one vLLM server: its requests, its requirements, and how a lost server is detected.

Written against vLLM 0.32 and the endpoints of ``vllm serve``: ``/v1/completions``, and those of ``VLLM_SERVER_DEV_MODE=1``
for weights. During every request the client also polls the server's ``/health``. So it distinguishes a server that died, was
stopped or can't be reached from a slow one.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2
import torch

from reinforcepp.errors import RolloutError, setting
from reinforcepp.rollout.engine import to_completion, token_limit
from reinforcepp.rollout.vllm.compat import sampling_settings
from reinforcepp.rollout.vllm.server import KEY, training_command
from reinforcepp.runtime.process import outcome
from reinforcepp.runtime.terminal import logger
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
TESTED_VERSION = "0.32."
SHOWN_CHARACTERS = 300  # of a server's response in an error message
MAX_RESPONSE_BYTES = 16 << 20  # of a response, or of one event of a stream
EVENT, END = b"data: ", b"data: [DONE]"  # lines of a stream
TOKENS_PER_EVENT = 16

log = logger(__name__)


class ServerUnavailable(Exception):
    """Why a server can't be used now, though perhaps later. The text continues a sentence that begins with its address."""


class RequestFailed(ServerUnavailable):
    """The server responded with an internal error."""


class IncompatibleServer(RolloutError):
    """The server can't be used for this training; at the start it is a user's mistake."""


@dataclass(frozen=True)
class Timeouts:
    """Timeouts for a server, in seconds."""

    connect: float = 5.0
    """To open a connection."""
    health_interval: float = 5.0
    """Between two health checks during a request."""
    health: float = 10.0
    """For one health check; two failures in a row mean that the server is lost."""
    progress: float = 300.0
    """To the next token, or to the end of a weight transfer."""
    rejoin: float = 60.0
    """For one of the servers to come back if none is left."""


@dataclass(frozen=True)
class ServerRequirements:
    """Requirements of this training for a server."""

    model: str
    """Name of the model, for the command that starts a server."""
    max_length: int
    """Tokens of prompt and completion together."""
    vocab_size: int
    eos_ids: frozenset[int]


@dataclass(frozen=True)
class ServerInfo:
    """A server's description of itself."""

    model: str
    """The model's name in requests."""
    version: str
    max_length: int
    dtype: torch.dtype
    logprobs_mode: str
    extension: str
    """Its worker extension."""
    weight_transfer: str
    """Backend of its weight transfer."""


class VllmClient:
    """The client of the server at ``url`` with an API ``key``; for one thread at a time.

    Methods raise ``ServerUnavailable`` if the server can't be used now, ``IncompatibleServer`` if it never can, and another
    ``RolloutError`` if no server could fulfill the request.
    """

    def __init__(self, url: str, key: str | None, requirements: ServerRequirements, timeouts: Timeouts) -> None:
        self.url, self.requirements, self.timeouts = url, requirements, timeouts
        self.info: ServerInfo | None = None
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._last_progress = 0.0
        self._tls = ssl.create_default_context()  # made once, because it reads many certificates

    # --- requests ---

    def check(self) -> ServerInfo:
        """Check that the server meets the requirements."""
        self.info = outcome(self._monitored(self._check()))
        return self.info

    def post(self, path: str, body: Any = None) -> Any:
        """Send a POST request and return its response."""

        async def request() -> Any:
            async with self._client() as client:
                return await self._request(client, "POST", path, body)

        return outcome(self._monitored(request()))

    def get(self, path: str) -> Any:
        """Send a GET request and return its response."""

        async def request() -> Any:
            async with self._client() as client:
                return await self._request(client, "GET", path)

        return outcome(self._monitored(request()))

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        max_concurrent: int,
        version: str,
    ) -> list[list[Completion]]:
        """Return the completions of each prompt, sampled from the weights called ``version``."""

        async def request() -> list[list[Completion]]:
            rows = [(prompt, sample) for prompt in prompts for sample in range(sampling.num_samples)]
            slots = asyncio.Semaphore(max_concurrent)
            async with self._client() as client:
                sampled = await asyncio.gather(*(self._sample(client, slots, sampling, *row) for row in rows))
                current = response_field(await self._request(client, "GET", "/weight_info"), "weight_version")
            if current != version:
                raise ServerUnavailable(
                    f"holds other weights ({current!r}) than this run gave it ({version!r}): it was restarted, or another "
                    "training uses it"
                )
            completions = [
                to_completion(tokenizer, self.requirements.eos_ids, prompt, *tokens)
                for (prompt, _), tokens in zip(rows, sampled, strict=True)
            ]
            number = sampling.num_samples
            return [completions[i : i + number] for i in range(0, len(completions), number)]

        return outcome(self._monitored(request()))

    # --- inside ---

    async def _check(self) -> ServerInfo:
        async with self._client() as client:
            await self._check_health(client)
            models = await self._request(client, "GET", "/v1/models")
            version = await self._request(client, "GET", "/version")
            config = await self._request(client, "GET", "/server_info?config_format=json")
            try:
                info = _parse_info(models, version, config)
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise IncompatibleServer(
                    f"{setting('rollout')}: the server {self.url} doesn't describe itself as vLLM {TESTED_VERSION}x "
                    f"does ({error!r}). Start vLLM {TESTED_VERSION}x there."
                ) from error
            if not info.version.startswith(TESTED_VERSION):
                log.warning("%s runs vLLM %s. This client is tested with %sx.", self.url, info.version, TESTED_VERSION)
            if info.max_length < self.requirements.max_length:
                self._reject(
                    f"takes sequences of {info.max_length} tokens, but this training needs {self.requirements.max_length}"
                )
            if info.logprobs_mode != "processed_logprobs":
                self._reject(
                    f"returns {info.logprobs_mode!r} instead of the log-probabilities of the sampling distribution"
                )
            # an earlier client can have died in the middle of an update, which leaves the server paused
            await self._request(client, "POST", "/resume")
            await self._check_last_token(client, info.model)
        return info

    async def _check_last_token(self, client: httpx2.AsyncClient, model: str) -> None:
        """Reject a model with a smaller vocabulary, because this training's weights would break it."""
        last = self.requirements.vocab_size - 1
        body = {"model": model, "prompt": [last], "max_tokens": 1}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            text = await self._read(response)
        if response.status_code == 400 and "vocabulary" in text:
            self._reject(f"serves another model ({model!r}), whose vocabulary lacks token {last}")
        self._parse(response, text)

    async def _sample(
        self, client: httpx2.AsyncClient, slots: asyncio.Semaphore, sampling: Sampling, prompt: Prompt, sample: int
    ) -> tuple[list[int], list[float]]:
        assert self.info is not None, "a server is checked first"
        body = sampling_settings(sampling, prompt, sample, self.requirements.eos_ids) | {
            "model": self.info.model,
            "prompt": list(prompt.ids),
            "min_p": 0,  # otherwise a server takes the value from the model's own settings
            "return_token_ids": True,
            "stream": True,
            "stream_interval": TOKENS_PER_EVENT,
        }
        ids: list[int] = []
        logprobs: list[float] = []
        reason = None
        async with slots, client.stream("POST", "/v1/completions", json=body) as response:
            if not response.is_success:
                self._parse(response, await self._read(response))
            self._check_encoding(response)
            async for event in _events(response):
                part = _parse_event(event, self.requirements.vocab_size)
                ids += part[0]
                logprobs += part[1]
                reason = part[2] or reason
                if len(ids) > token_limit(prompt, sampling):
                    raise ServerUnavailable(f"sent more than the {body['max_tokens']} tokens of a completion")
                if part[0]:
                    self._last_progress = time.monotonic()
        if reason not in ("stop", "length") or not len(ids) == len(logprobs) > 0:
            raise ServerUnavailable(f"broke off in the middle of a completion ({reason or 'without a reason'})")
        return ids, logprobs

    async def _request(self, client: httpx2.AsyncClient, method: str, path: str, body: Any = None) -> Any:
        async with client.stream(method, path, json=body) as response:
            return self._parse(response, await self._read(response))

    async def _read(self, response: httpx2.Response) -> str:
        """Return the body, which isn't trusted to be small."""
        self._check_encoding(response)
        body = bytearray()
        async for data in response.aiter_raw():
            body += data
            if len(body) > MAX_RESPONSE_BYTES:
                raise IncompatibleServer(
                    f"{setting('rollout')}: {self.url} isn't a vLLM server, because its response to {response.url.path} "
                    f"exceeds {MAX_RESPONSE_BYTES >> 20} MiB. Check the address."
                )
        return body.decode("utf-8", errors="replace")

    def _check_encoding(self, response: httpx2.Response) -> None:
        """Reject a compressed response, because a few bytes can become gigabytes."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise IncompatibleServer(
                f"{setting('rollout')}: the server {self.url} compresses its responses ({encoding[:SHOWN_CHARACTERS]!r}), "
                "which this client doesn't accept. Turn compression off in the server or its proxy."
            )

    async def _check_health(self, client: httpx2.AsyncClient) -> None:
        try:
            async with asyncio.timeout(self.timeouts.health):  # httpx2's own timeout starts again with each byte
                await self._request(client, "GET", "/health")
        except TimeoutError as error:
            raise httpx2.ReadTimeout("no complete response") from error

    def _client(self) -> httpx2.AsyncClient:
        """Return an HTTP client without timeouts, because :meth:`_monitored` sets them."""
        return httpx2.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            verify=self._tls,
            timeout=None,
            limits=httpx2.Limits(),
            trust_env=False,
        )

    def _parse(self, response: httpx2.Response, text: str) -> Any:
        """Return the content of a successful response with this body; raise an error for any other."""
        status, body = response.status_code, text[:SHOWN_CHARACTERS]
        if status in (401, 403):
            raise IncompatibleServer(
                f"{KEY}: the vLLM server {self.url} expects another key. Set {KEY} to the key that it was started with."
            )
        if status == 404:
            self._reject(f"doesn't offer {response.url.path}")
        if 400 <= status < 500 and status not in (408, 425, 429):
            raise RolloutError(f"The vLLM server {self.url} rejected a request to {response.url.path}: {body!r}")
        if not response.is_success:
            raise RequestFailed(f"failed with {status} {response.reason_phrase} ({body!r})")
        if not text:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise IncompatibleServer(
                f"{setting('rollout')}: {self.url} isn't a vLLM server; it answered {body!r}. Check the address."
            ) from error

    def _reject(self, problem: str) -> None:
        needed = self.requirements
        command = training_command(needed.model, needed.max_length, with_key="Authorization" in self._headers)
        raise IncompatibleServer(
            f"{setting('rollout')}: the vLLM server {self.url} {problem}. Start it with:\n  {command}\n"
            "docs/vllm_server.md explains the key and servers on other nodes."
        )

    # --- lost servers ---

    async def _monitored(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of ``work``, or raise ``ServerUnavailable`` as soon as the server is lost."""
        self._last_progress = time.monotonic()
        task, monitor = asyncio.create_task(work), asyncio.create_task(self._monitor())
        try:
            await asyncio.wait((task, monitor), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await monitor  # raises
            return await task
        except httpx2.ConnectTimeout as error:
            raise ServerUnavailable(f"can't be reached (no connection within {self.timeouts.connect:g} s)") from error
        except httpx2.ConnectError as error:
            raise ServerUnavailable(f"can't be reached ({_root_cause(error)})") from error
        except httpx2.TimeoutException as error:
            raise ServerUnavailable("didn't respond in time") from error
        except httpx2.TransportError as error:
            raise ServerUnavailable(f"closed the connection ({_root_cause(error)})") from error
        finally:
            task.cancel()
            monitor.cancel()

    async def _monitor(self) -> None:
        """Check the server's health until it fails, or until there is no progress for too long."""
        timeouts, failures = self.timeouts, 0
        async with self._client() as client:
            while True:
                await asyncio.sleep(timeouts.health_interval)
                if time.monotonic() - self._last_progress > timeouts.progress:
                    raise ServerUnavailable(
                        f"made no progress for {timeouts.progress:g} s, though its health check succeeds"
                    )
                try:
                    await self._check_health(client)
                    failures = 0
                except httpx2.TransportError as error:
                    failures += 1
                    if failures > 1:
                        raise ServerUnavailable(f"no longer responds ({_root_cause(error)})") from error


def run_in_daemon(work: Callable[[], T]) -> Future[T]:
    """Run ``work`` in a daemon thread, so that a training that stops doesn't wait for a server."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised again by future.result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# --- responses --------------------------------------------------------------------------------------------------------


def response_field(response: Any, name: str) -> Any:
    """Return a field of a server's response.

    Raises:
        RequestFailed: The response isn't an object with this field.
    """
    if not isinstance(response, dict) or name not in response:
        raise RequestFailed(f"sent a response without {name!r} ({str(response)[:SHOWN_CHARACTERS]!r})")
    return response[name]


def _parse_info(models: Any, version: Any, info: Any) -> ServerInfo:
    model, config = models["data"][0], info["vllm_config"]["model_config"]
    dtype = getattr(torch, config["dtype"].removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{config['dtype']!r} isn't a data type")
    return ServerInfo(
        model=str(model["id"]),
        version=str(version["version"]),
        max_length=int(model["max_model_len"]),
        dtype=dtype,
        logprobs_mode=str(config["logprobs_mode"]),
        extension=info["vllm_config"]["parallel_config"]["worker_extension_cls"],
        weight_transfer=(info["vllm_config"]["weight_transfer_config"] or {}).get("backend", ""),
    )


async def _events(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Yield the events of a stream.

    ``aiter_lines`` doesn't work here: it also splits lines at Unicode separators, which JSON leaves inside texts.
    """
    rest = b""
    async for data in response.aiter_raw():
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > MAX_RESPONSE_BYTES:
            raise ServerUnavailable(f"sent an event of more than {MAX_RESPONSE_BYTES >> 20} MiB")
        for line in lines:
            if line.startswith(EVENT) and line.rstrip() != END:
                yield line.removeprefix(EVENT)


def _parse_event(event: bytes, vocab_size: int) -> tuple[list[int], list[float], str | None]:
    """Return the event's tokens, their log-probabilities, and the finish reason if it is the last one."""
    try:
        content = json.loads(event)
        if "error" in content:
            shown = repr(content["error"])[:SHOWN_CHARACTERS]
            raise ServerUnavailable(f"failed in the middle of a completion ({shown})")
        (choice,) = content["choices"]
        ids = choice["token_ids"]
        logprobs = choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids) or not all(map(math.isfinite, logprobs)):
            raise ValueError("a token or its log-probability is out of range")
        return ids, logprobs, choice["finish_reason"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ServerUnavailable(f"sent an unreadable response ({event[:SHOWN_CHARACTERS]!r})") from error


def _root_cause(error: BaseException) -> str:
    """Return the operating system's message, which the libraries in between replace by other words."""
    if isinstance(error, httpx2.TimeoutException):
        return "timeout"
    deepest, inner = str(error) or type(error).__name__, error.__cause__ or error.__context__
    while inner is not None:
        if isinstance(inner, ssl.SSLError):
            return str(inner)  # its number isn't one of the operating system's
        if isinstance(inner, OSError) and inner.errno:
            deepest = os.strerror(inner.errno) if inner.errno > 0 else str(inner.strerror)
        inner = inner.__cause__ or inner.__context__
    return deepest
