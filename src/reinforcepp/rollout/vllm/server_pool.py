"""A worker pool of vLLM servers. A lost server is retried with backoff and gets the current weights before it is used again."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from reinforcepp.errors import EngineLost, RolloutError, option, setting
from reinforcepp.rollout.dispatch import ChunkDone, WorkerLost, WorkerReady
from reinforcepp.rollout.vllm.client import (
    IncompatibleServer,
    RequestFailed,
    ServerRequirements,
    ServerUnavailable,
    Timeouts,
    VllmClient,
    response_field,
    run_in_daemon,
)
from reinforcepp.rollout.vllm.nccl import BACKEND, NcclServerTransfer
from reinforcepp.rollout.vllm.server import environment_key
from reinforcepp.rollout.vllm.server_transfer import EXTENSION, FileTransfer, MessageTransfer
from reinforcepp.rollout.weight_transfer import WeightTransfer
from reinforcepp.runtime.process import is_loopback
from reinforcepp.runtime.terminal import logger
from reinforcepp.types import Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["check", "load", "generate"]
POLL_SECONDS = 0.5
"""How long the pool waits for an event before it looks for lost servers to retry."""
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 5.0, 60.0
"""Backoff for a lost server: the first delay, doubled at each failure up to the second."""

log = logger(__name__)


@dataclass
class _Absence:
    """A lost server."""

    reason: str
    retry_at: float
    delay: float
    """Seconds from its last failure to the retry."""


class ServerPool:
    """vLLM servers as a :class:`~reinforcepp.rollout.dispatch.WorkerPool`; its workers are the servers' clients.

    A server that joins or comes back is checked, then gets the current weights, and only then is ready. All decisions are made
    in the caller's thread; other threads each only wait for one server.

    Args:
        addresses: The servers' addresses.
        requirements: Requirements of this training.
        tokenizer: The policy's tokenizer.
        batch_size: Completions that each server generates at a time.
        folder: A folder that the servers see under the same path.
        timeouts: Timeouts for each server.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        requirements: ServerRequirements,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        folder: Path,
        timeouts: Timeouts,
    ) -> None:
        key = environment_key()
        _warn_about_exposed(addresses)
        self.clients = [VllmClient(address, key, requirements, timeouts) for address in addresses]
        self._tokenizer, self._batch_size, self._timeouts = tokenizer, batch_size, timeouts
        self._files, self._messages, self._nccl = FileTransfer(folder), MessageTransfer(), NcclServerTransfer()
        self._model: Any = None
        self._run, self._updates = secrets.token_hex(4), 0
        self._ready: dict[VllmClient, None] = {}
        self._lost: dict[VllmClient, _Absence] = {}
        self._tasks: dict[Future[Any], tuple[VllmClient, Task]] = {}
        self._sampling = Sampling(1)

    # --- weights ---

    def load(self, model: PreTrainedModel) -> None:
        """Give ``model``'s weights to all servers that respond.

        Raises:
            EngineLost: No server responds.
            RolloutError: At the first call, one of the servers can't be used for this training.
        """
        first = self._model is None
        while self._tasks:  # a server that is coming back would get the previous weights
            self._poll(retry_lost=False)
        self._model, self._updates = model, self._updates + 1
        self._files.invalidate()
        for client in self.clients if first else list(self._ready):
            if first:
                self._start(client, "check", client.check)
            else:
                self._start_loading(client)
        while self._tasks:
            self._poll(retry_lost=False, strict=first)
        if first and not self._ready:
            raise EngineLost(self._no_server_message())
        begin = time.monotonic()
        while not self._ready:
            self._poll()
            self._check_time(begin)

    def _start_loading(self, client: VllmClient) -> None:
        self._ready.pop(client, None)
        transfer = self._transfer_for(client)
        transfer.prepare(self._model)
        version = self._version

        def load() -> None:
            client.post("/pause?mode=abort")
            transfer.push(client)
            if not response_field(client.post("/reset_prefix_cache"), "success"):
                raise RequestFailed("didn't empty its prefix cache, which holds keys and values of older weights")
            client.post("/update_weight_version", {"new_version": version})
            client.post("/resume")

        self._start(client, "load", load)

    def _transfer_for(self, client: VllmClient) -> WeightTransfer[VllmClient]:
        """Return the path for which the server was started."""
        assert client.info is not None, "a server is checked first"
        if client.info.extension == EXTENSION:
            return self._messages
        if client.info.weight_transfer == BACKEND and self._model.device.type == "cuda":
            return self._nccl
        return self._files

    @property
    def _version(self) -> str:
        """The servers' name of the current weights, by which a server shows that it still has them."""
        return f"reinforcepp-{self._run}-{self._updates}"

    # --- work ---

    def begin(self, sampling: Sampling) -> None:
        """Set how the next prompts are sampled, and drop results of an interrupted call."""
        while self._generating:
            self._poll(retry_lost=False)
        self._sampling = sampling

    def ready(self) -> list[VllmClient]:
        """Return the servers that have the current weights."""
        return list(self._ready)

    def submit(self, worker: VllmClient, chunk: Sequence[Prompt]) -> None:
        """Have a server complete a chunk of prompts."""
        sampling, version = self._sampling, self._version
        self._start(
            worker,
            "generate",
            lambda: worker.generate(self._tokenizer, chunk, sampling, max_concurrent=self._batch_size, version=version),
        )

    def wait(self) -> Any:
        """Block until something happens and return it.

        Raises:
            EngineLost: All servers are lost and none comes back in time.
        """
        begin = time.monotonic()
        while (event := self._poll()) is None:
            self._check_time(begin)
        return event

    def close(self) -> None:
        """Release the weight transfers; the servers keep running with the last weights."""
        for transfer in (self._files, self._messages, self._nccl):
            transfer.close()

    # --- events ---

    def _start(self, client: VllmClient, task: Task, work: Callable[[], Any]) -> None:
        self._tasks[run_in_daemon(work)] = client, task

    def _poll(self, *, retry_lost: bool = True, strict: bool = False) -> Any:
        """Return an event for the caller that happens within ``POLL_SECONDS``, or None."""
        if retry_lost:
            self._retry_lost()
        if not self._tasks:
            time.sleep(POLL_SECONDS)
            return None
        done, _ = wait_for(self._tasks, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        if not done:
            return None
        future = done.pop()
        client, task = self._tasks.pop(future)
        try:
            result = future.result()
        except ServerUnavailable as error:
            return self._lose(client, str(error), task)
        except RolloutError as error:
            if strict or (task == "generate" and not isinstance(error, IncompatibleServer)):
                raise
            return self._lose(client, f"can't be used any more: {error}", task)
        if task == "generate":
            return ChunkDone(client, result)
        if task == "check":
            self._start_loading(client)
            return None
        self._ready[client] = None
        if self._lost.pop(client, None) is not None:
            log.warning("The vLLM server %s is back and has the current weights.", client.url)
        return WorkerReady(client)

    def _lose(self, client: VllmClient, reason: str, task: Task) -> WorkerLost[VllmClient] | None:
        """Record that ``client`` is lost; return an event if it had prompts to complete."""
        before = self._lost.get(client)
        self._ready.pop(client, None)
        delay = min(2 * before.delay, MAX_RETRY_SECONDS) if before else FIRST_RETRY_SECONDS
        self._lost[client] = _Absence(reason, time.monotonic() + delay, delay)
        if before is None:
            log.warning("Lost the vLLM server %s, which %s. It is retried with backoff.", client.url, reason)
        return WorkerLost(client, f"{client.url} {reason}") if task == "generate" else None

    @property
    def _generating(self) -> bool:
        return any(task == "generate" for _, task in self._tasks.values())

    def _retry_lost(self) -> None:
        """Check the lost servers whose retry is due."""
        busy = {client for client, _ in self._tasks.values()}
        for client, absence in self._lost.items():
            if client not in busy and time.monotonic() >= absence.retry_at:
                self._start(client, "check", client.check)

    def _check_time(self, begin: float) -> None:
        """Raise ``EngineLost`` if no server has been ready or working since ``begin``, for longer than the timeout."""
        if self._ready or self._generating:
            return
        loading = self._timeouts.progress if self._tasks else 0.0  # a server that is coming back can load a large model
        if time.monotonic() - begin > self._timeouts.rejoin + loading:
            raise EngineLost(self._no_server_message())

    def _no_server_message(self) -> str:
        listed = "; ".join(f"{client.url} {absence.reason}" for client, absence in self._lost.items())
        return (
            f"{setting('rollout')}: no vLLM server is available: {listed}. Start a server at its address again, or use "
            f"{option('rollout', 'auto')}."
        )


def _warn_about_exposed(addresses: Sequence[str]) -> None:
    """Log a warning about servers that other nodes can reach."""
    exposed = [address for address in addresses if not is_loopback(urlsplit(address).hostname or "")]
    if exposed:
        clear = "the connection isn't encrypted, and " if any(url.startswith("http:") for url in exposed) else ""
        log.warning(
            "%s: %svLLM's endpoints for weights run code for every client, unless the server requires the key there. "
            "docs/vllm_server.md explains the key and ssh tunnels.",
            ", ".join(exposed),
            clear,
        )
