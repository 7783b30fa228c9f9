"""A worker pool of Ray actors. Only this file imports ray."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from reinforcepp.errors import EngineLost, RolloutError, first_line, option, setting
from reinforcepp.rollout.dispatch import ChunkDone, WorkerLost, WorkerReady
from reinforcepp.rollout.ray.worker import MIN_RAY, check_ray_version, pack
from reinforcepp.rollout.weight_transfer import WeightsNeeded, WeightTransfer
from reinforcepp.runtime.terminal import echo, warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONNECT_TIMEOUT_SECONDS = 10
WORKER_READY_TIMEOUT_SECONDS = 180
"""Time in which a first worker must be ready if none has a process, because the cluster has no room."""
WORKER_LOAD_TIMEOUT_SECONDS = 1800
"""The same for workers with a process, which load the model and compile its code; one that dies is reported at once."""
PROGRESS_SECONDS = 60
"""Time between two messages while no worker is ready."""
LOAD_TIMEOUT_SECONDS = 10
"""Time that up-to-date workers wait for workers still loading weights."""
POLL_SECONDS = 1.0
"""How long the pool waits for an event before it checks whether the cluster has room for more workers."""
HEAD_TIMEOUT_SECONDS = 30
"""Time that the cluster's head can be unreachable; after 60 s Ray itself ends processes, without a checkpoint."""


class ObjectStoreTransfer(WeightTransfer[Any]):
    """Weights through Ray's object store, which copies them once to each node. The receiver is a Ray actor.

    The first ``push`` puts them there, so weights that all actors get on another path aren't copied to the CPU.

    Args:
        ray: The connected library.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._model: PreTrainedModel | None = None
        self._weights: Any = None

    def prepare(self, model: PreTrainedModel) -> None:
        """Keep ``model`` until the first ``push``."""
        self._model, self._weights = model, None

    def push(self, receiver: Any) -> Any:
        """Start loading on an actor; return a reference to wait for."""
        if self._model is not None:
            self._weights, self._model = self._ray.put(pack(self._model)), None
        return receiver.load.remote(self._weights)

    def close(self) -> None:
        """Release the object."""
        self._model = self._weights = None


class RayPool:
    """Ray actors as a :class:`~reinforcepp.rollout.dispatch.WorkerPool`; its workers are their numbers.

    An actor that dies is replaced, and more are started if the cluster grows. An actor without the current weights isn't ready.

    Args:
        ray: The connected library.
        worker: Class of the actors. An instance is made from a spec, has ``load(packed)`` and ``process(items, sampling)``,
            which returns one result per item, and is called a ``kind`` worker in messages.
        spec: Argument of each actor.
        max_workers: Largest number of actors; 0 is as many as the cluster has room for.
        reserved: GPUs or CPUs that the pool doesn't use.
        gpus: GPUs per actor; if it is 1 and the cluster has none, an actor gets a CPU.
    """

    def __init__(
        self, ray: Any, worker: type[Any], spec: Any, max_workers: int, reserved: int = 0, gpus: int = 1
    ) -> None:
        self._ray, self._worker = ray, worker
        self._max_workers, self._reserved, self._gpus = max_workers, reserved, gpus
        self._spec = ray.put(spec)
        self._store = ObjectStoreTransfer(ray)
        self._version = 0
        self.actors: dict[int, Any] = {}
        self._ready: dict[int, None] = {}
        self._tasks: dict[Any, tuple[int, int]] = {}
        """Running tasks: number of the actor, and version of the weights that it loads, or 0 if it processes a chunk."""
        self._processes: dict[int, Any] = {}
        """Reference, by actor, that is available once its process runs."""
        self._started = 0
        self._next_message = 0.0
        self._last_growth = 0.0
        self._head = ray.get_runtime_context().gcs_address
        self._head_lost_at: float | None = None
        self._last_loss = ""
        self._sampling: Any = None

    # --- weights ---

    def load(self, model: PreTrainedModel, broadcast: Callable[[], set[int]] = set) -> None:
        """Give ``model``'s weights to all actors and wait until they have them; a slow actor follows later.

        Args:
            model: The model. Its weights must stay the same while the pool works with them: an actor that is started
                meanwhile gets them, too.
            broadcast: Gives the weights to some of the ready actors on another path and returns their numbers.

        Raises:
            RolloutError: No actor is ready in time.
        """
        self._store.prepare(model)
        self._version += 1
        updated = broadcast()
        for number in set(self._ready) - updated:
            self._start_loading(number)
        begin = time.monotonic()
        while not self._ready or (self._loading and time.monotonic() - begin < LOAD_TIMEOUT_SECONDS):
            self._poll()
            self._check_time(begin)

    @property
    def _loading(self) -> bool:
        return any(version for _, version in self._tasks.values())

    def _start_loading(self, number: int) -> None:
        self._ready.pop(number, None)
        self._tasks[self._store.push(self.actors[number])] = number, self._version

    # --- work ---

    def begin(self, sampling: Any) -> None:
        """Set the second argument of ``process`` for the next items, and drop results of an interrupted call."""
        self._tasks = {task: (number, version) for task, (number, version) in self._tasks.items() if version}
        self._sampling = self._ray.put(sampling)

    def ready(self) -> list[int]:
        """Return the actors that have the current weights."""
        return list(self._ready)

    def submit(self, worker: int, chunk: Sequence[Any]) -> None:
        """Have an actor process a chunk of items."""
        self._tasks[self.actors[worker].process.remote(list(chunk), self._sampling)] = worker, 0

    def wait(self) -> Any:
        """Block until something happens and return it.

        Raises:
            RolloutError: No actor is ready for too long, or an actor raised an error.
        """
        begin = time.monotonic()
        while (event := self._poll()) is None:
            self._check_time(begin)
        return event

    def call_all(self, method: str, *arguments: Any) -> dict[int, Any]:
        """Call a method of all ready actors and return its results by number; a dead actor returns none and is replaced."""
        tasks = {number: getattr(self.actors[number], method).remote(*arguments) for number in self._ready}
        results = {number: self._result(number, task) for number, task in tasks.items()}
        return {number: result for number, result in results.items() if not isinstance(result, WorkerLost)}

    def replace(self, numbers: Iterable[int]) -> None:
        """Stop these actors and start others."""
        self._stop(numbers)
        self._grow()

    def close(self) -> None:
        """Stop all actors."""
        self._stop(self.actors)
        self._store.close()

    # --- events ---

    def _poll(self) -> Any:
        """Return an event that happens within ``POLL_SECONDS``, or None."""
        if time.monotonic() - self._last_growth > POLL_SECONDS:
            self._grow()
        if not self._tasks:
            time.sleep(POLL_SECONDS)
            return None
        done, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=POLL_SECONDS)
        if not done:
            return None
        number, version = self._tasks.pop(done[0])
        result = self._result(number, done[0])
        if isinstance(result, WorkerLost):
            return result
        if version == 0:
            return ChunkDone(number, result)
        if version < self._version:  # the weights have changed since
            self._start_loading(number)
            return None
        self._ready[number] = None
        return WorkerReady(number)

    def _result(self, number: int, task: Any) -> Any:
        """Return the result of an actor's task, or a ``WorkerLost`` after starting another actor or its engine."""
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        try:
            return self._ray.get(task)
        except (RayActorError, OutOfMemoryError) as error:
            self._last_loss = first_line(error)
            self._forget(number)
            self._grow()
            return WorkerLost(number, self._last_loss)
        except RayTaskError as error:
            if isinstance(error.cause, WeightsNeeded):
                self._start_loading(number)
                return WorkerLost(number, str(error.cause))
            raise RolloutError(f"A {self._worker.kind} worker failed: {first_line(error.cause)}") from error

    def _stop(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            self._ray.kill(self.actors[number])
            self._forget(number)

    def _forget(self, number: int) -> None:
        del self.actors[number]
        self._ready.pop(number, None)
        self._processes.pop(number, None)
        self._tasks = {task: state for task, state in self._tasks.items() if state[0] != number}

    def _grow(self) -> None:
        """Start as many actors as the cluster has room for."""
        head_responds, self._last_growth = self._head_responds(), time.monotonic()
        if not head_responds:  # a request to Ray would block without end
            return
        resources = self._ray.cluster_resources()
        needs = {"num_gpus": self._gpus} if resources.get("GPU") or self._gpus > 1 else {"num_cpus": 1}
        free = int(resources.get("GPU") or resources.get("CPU", 0)) - self._reserved
        room = max(1, free // self._gpus)
        for _ in range(len(self.actors), min(self._max_workers or room, room)):
            number, self._started = self._started, self._started + 1
            self.actors[number] = self._ray.remote(self._worker).options(**needs).remote(self._spec)
            self._processes[number] = self.actors[number].__ray_ready__.remote()
            self._start_loading(number)

    def _head_responds(self) -> bool:
        """Return whether the cluster's head is reachable.

        Raises:
            EngineLost: It hasn't been reachable for too long.
        """
        now, problem = time.monotonic(), _connection_problem(self._head)
        self._head_lost_at = (self._head_lost_at or now) if problem else None
        if self._head_lost_at is not None and time.monotonic() - self._head_lost_at > HEAD_TIMEOUT_SECONDS:
            raise EngineLost(
                f"{setting('rollout')}: the head of the Ray cluster, {self._head}, hasn't been reachable for "
                f"{HEAD_TIMEOUT_SECONDS} seconds ({problem}). Check its node and the network."
            )
        return not problem

    def _check_time(self, begin: float) -> None:
        """Raise ``EngineLost`` if no actor has been ready since ``begin``, for longer than the timeout; print the progress."""
        if self._ready:
            self._next_message = 0.0
            return
        now, kind = time.monotonic(), self._worker.kind
        loading = len(self._ray.wait(list(self._processes.values()), num_returns=len(self._processes), timeout=0)[0])
        limit = WORKER_LOAD_TIMEOUT_SECONDS if loading else WORKER_READY_TIMEOUT_SECONDS
        if now - begin < limit:
            self._next_message = self._next_message or begin + PROGRESS_SECONDS
            if now >= self._next_message:
                self._next_message = now + PROGRESS_SECONDS
                state = (
                    f"{loading} of them load and compile the model"
                    if loading
                    else "the cluster has no room for them yet"
                )
                echo(f"Waiting for {kind} workers for {now - begin:.0f} s: {state}.")
            return
        loss = f" The last one was lost: {self._last_loss}" if self._last_loss else ""
        if loading:
            raise EngineLost(
                f"{setting('rollout')}: {loading} {kind} workers have loaded the model for {limit} seconds, and none is ready. "
                f"Look for the cause in Ray's logs of the workers, and use a smaller model or a faster disk.{loss}"
            )
        resources = self._ray.cluster_resources()
        raise EngineLost(
            f"{setting('rollout')}: no {kind} worker was ready within {limit} "
            f"seconds. The cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs; each "
            f"worker needs {self._gpus if self._gpus > 1 else 'one'}. Stop other programs that use them, or add nodes. "
            f"`ray status` shows what is used, except with ray://local.{loss}"
        )


def connect(address: str) -> tuple[Any, bool]:
    """Connect to Ray; return the library, and whether this call connected it, so that the caller must :func:`disconnect`.

    A cluster at ``local`` is new, listens on the loopback address, and accepts only processes that it started. If another
    cluster accepts clients without a token, this logs a warning.

    Raises:
        RolloutError: Ray isn't installed or too old, no cluster responds at ``address``, or it rejects this process.
    """
    if importlib.util.find_spec("ray") is None:
        raise RolloutError(
            f"{setting('rollout')} ray://: Ray isn't installed. Install it:\n  pip install 'ray>={MIN_RAY}'"
        )
    check_ray_version()
    import ray

    if ray.is_initialized():
        return ray, False
    found = address
    if address == "auto":
        found = os.environ.get("RAY_ADDRESS") or _recorded_address()
        if not found:
            raise RolloutError(
                f"{setting('rollout')} ray://auto: this node belongs to no Ray cluster. Start one with `ray start "
                f"--head`, join one with `ray start --address=HOST:PORT`, or use {option('rollout', 'ray://local')}."
            )
    if ":" in found:
        _check_connection(found.removeprefix("ray://"))
        _check_authentication(found)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise Ray hides all GPUs from CPU workers
    local = address == "local"
    try:
        with _private_cluster() if local else nullcontext():
            ray.init(
                address=found,
                include_dashboard=False if local else None,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        problem, fix = f"can't join the Ray cluster {found}", "has the cluster's versions of Ray and Python"
        if local:
            problem, fix = "can't start a Ray cluster on this node", "has free memory and disk space"
        raise RolloutError(
            f"{setting('rollout')}: {problem} ({first_line(error)}). Check that this node {fix}."
        ) from error
    return ray, True


def _recorded_address() -> str:
    """Return the address that ``ray start`` recorded on this node; empty if there is none.

    Raises:
        RolloutError: Another user wrote it. Ray's folder is writable for everyone, and the head of a cluster can run code here.
    """
    from ray._common.utils import get_ray_address_file

    try:
        with open(get_ray_address_file(None), encoding="utf-8") as file:
            owner = os.fstat(file.fileno()).st_uid
            if owner and owner != os.getuid():
                raise RolloutError(
                    f"{setting('rollout')} ray://auto: {file.name} was written by another user (uid {owner}). If you trust the "
                    f"cluster that it names, give its address, {option('rollout', 'ray://HOST:PORT')}."
                )
            return file.read().strip()
    except FileNotFoundError:
        return ""


def disconnect(ray: Any) -> None:
    """Leave the cluster. A later connection reads its token from the environment again."""
    ray.shutdown()
    _reread_authentication()


@contextmanager
def _private_cluster() -> Iterator[None]:
    """In this block, Ray starts a cluster that listens on the loopback address and requires a new token.

    The token exists only in the memory and the environment of the processes that start in this block. Ray itself would write it
    to ``~/.ray/auth_token``, which other users can read.
    """
    from ray._private import ray_constants

    loopback = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}  # works on Linux, too, despite its name
    private = loopback | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in private}
    clusters_enabled, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    os.environ.update(private)
    _reread_authentication()
    started = False
    try:
        yield
        started = True
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters_enabled
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        if not started:
            _reread_authentication()


def _reread_authentication() -> None:
    """Have Ray, which caches its mode of authentication and its token, read them again from the environment."""
    from ray import _raylet

    compiled: Any = _raylet  # has no type hints
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()


def _check_authentication(address: str) -> None:
    """Warn if the cluster at ``host:port`` accepts everyone; otherwise have Ray send this process's token.

    Raises:
        RolloutError: The cluster rejects this process's token; Ray itself would retry for a while.
    """
    problem = _authentication_problem(address, "disabled")
    if not problem:
        warn_once(
            f"{setting('rollout')}: the Ray cluster at {address} requires no token, so anyone who can connect to its ports can "
            "run programs on its nodes. Start it with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN on all nodes, in Ray "
            f"{MIN_RAY} or later."
        )
    elif "AuthenticationError" in problem:
        if _authentication_problem(address, "token"):
            raise RolloutError(
                f"{setting('rollout')}: the Ray cluster at {address} requires a token, and this process has none or another one. "
                "Set RAY_AUTH_TOKEN to the token with which the cluster was started, or write it to ~/.ray/auth_token."
            )
        os.environ["RAY_AUTH_MODE"] = "token"
        _reread_authentication()


def _authentication_problem(address: str, mode: str) -> str:
    """Return the error that a new process gets from the cluster's head at ``host:port``, or an empty string."""
    code = "import sys, ray; ray._raylet.GcsClient(address=sys.argv[1])"
    with suppress(subprocess.TimeoutExpired):
        probe = subprocess.run(
            [sys.executable, "-P", "-c", code, address],  # -P: no modules of the current folder
            env=os.environ | {"RAY_AUTH_MODE": mode},
            capture_output=True,
            text=True,
            timeout=CONNECT_TIMEOUT_SECONDS,
            check=False,
        )
        return probe.stderr if probe.returncode else ""
    return "timeout"


def _check_connection(address: str) -> None:
    """Raise a RolloutError if nothing listens at ``host:port``; Ray itself would wait for minutes."""
    if problem := _connection_problem(address):
        raise RolloutError(
            f"{setting('rollout')}: no Ray cluster responds at {address} ({problem}). Use the address that `ray start "
            f"--head` printed, check that this node can connect to it, or use {option('rollout', 'ray://local')}."
        )


def _connection_problem(address: str) -> str:
    """Return why ``host:port`` can't be reached; empty if something listens there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""
