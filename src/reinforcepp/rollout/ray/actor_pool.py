"""A Ray cluster, and the actors that work in it; ray is only imported here."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from reinforcepp.errors import EngineLost, RolloutError, first_line
from reinforcepp.rollout.dispatch import Answered, Joined, Lost
from reinforcepp.rollout.ray.worker import Packed
from reinforcepp.types import Completion, Prompt, Sampling

CONNECT_SECONDS = 10
START_SECONDS = 180
"""Within this time the first worker has to be ready."""
PATIENCE_SECONDS = 10
"""So long those who have the weights wait for those who don't."""
LOOK_SECONDS = 1.0
"""How often the cluster is looked at for room for more workers while answers are waited for."""
HEAD_SECONDS = 30
"""So long the cluster's head may be out of reach; after 60 Ray itself ends processes, without a checkpoint."""


@dataclass(frozen=True)
class Later:
    """What Ray's object store has, fetched by whoever calls it."""

    held: tuple[Any]
    """Ray would fetch it at once if it weren't inside of something."""

    def __call__(self) -> Any:
        """It itself."""
        import ray

        return ray.get(self.held[0])


class RayCrew:
    """Ray's actors as :func:`~reinforcepp.rollout.dispatch.share_out` needs them.

    An actor that dies is replaced; where the cluster grows, more are started. Who hasn't got the present weights is not ready.

    Args:
        ray: the library, connected.
        worker: of what class the actors are. They take a recipe, ``load`` packed weights, and ``answer`` a list, given what
            else is asked, with one answer for each; ``kind`` is what they are called.
        recipe: for each of them.
        workers: how many, at most; 0 is as many as there is room for.
        reserved: GPUs or CPUs that are left to others.
        gpus: of each; where it is one and the cluster has none, a CPU.
    """

    def __init__(
        self, ray: Any, worker: type[Any], recipe: Any, workers: int, reserved: int = 0, gpus: int = 1
    ) -> None:
        self._ray, self._worker, self._most, self._reserved, self._gpus = ray, worker, workers, reserved, gpus
        self._recipe = ray.put(recipe)
        self._weights: Any = None
        self._version = 0
        self.actors: dict[int, Any] = {}
        self._ready: dict[int, None] = {}
        self._tasks: dict[Any, tuple[int, int]] = {}
        """What is under way: whose it is, and the version of the weights that are loaded, 0 for a piece."""
        self._numbers = iter(range(1 << 62))
        self._looked = 0.0
        self._head = ray.get_runtime_context().gcs_address
        self._head_gone: float | None = None
        """Since when the head can't be reached."""
        self._reason = ""
        """Why the last worker was lost."""
        self._prompts: Sequence[Any] = ()
        self._sampling: Any = None

    def load(self, packed: Packed, otherwise: Callable[[Later], set[int]] = lambda later: set()) -> None:
        """Hand weights out, and wait until whoever is there has them; who takes long comes in later.

        Args:
            packed: the weights.
            otherwise: gives them to some of those who are ready in another way, and their numbers back.

        Raises:
            RolloutError: nobody is ready in time.
        """
        self._weights = self._ray.put(packed)
        self._version += 1
        have = otherwise(Later((self._weights,)))
        for number in set(self._ready) - have:
            self._start_loading(number)
        begin = time.monotonic()
        while not self._ready or (self._loading and time.monotonic() - begin < PATIENCE_SECONDS):
            self._next()
            self._check_time(begin)

    def told(self, question: str, *given: Any) -> dict[int, Any]:
        """What those who are ready say, by a method of theirs; who has died meanwhile is replaced."""
        asked = {number: getattr(self.actors[number], question).remote(*given) for number in self._ready}
        answers = {number: self._result(number, task) for number, task in asked.items()}
        return {number: answer for number, answer in answers.items() if not isinstance(answer, Lost)}

    def replace(self, numbers: Iterable[int]) -> None:
        """Stop these workers; others are started."""
        self._stop(numbers)
        self._grow()

    def ask(self, prompts: Sequence[Any], sampling: Any) -> None:
        """What is asked from now on, and how."""
        self._prompts, self._sampling = prompts, self._ray.put(sampling)

    def each(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """All answers of each worker; of those that die meanwhile, none."""
        answers: list[Completion] = []
        while not answers:
            for own in self.told("answer", list(prompts), sampling).values():
                answers += [completion for of_prompt in own for completion in of_prompt]
            if not self._ready:
                self.wait()
        return answers

    def ready(self) -> list[int]:
        """See :class:`~reinforcepp.rollout.dispatch.Crew`."""
        return list(self._ready)

    def give(self, worker: int, places: Sequence[int]) -> None:
        """See :class:`~reinforcepp.rollout.dispatch.Crew`."""
        prompts = [self._prompts[place] for place in places]
        self._tasks[self.actors[worker].answer.remote(prompts, self._sampling)] = worker, 0

    def wait(self) -> Any:
        """See :class:`~reinforcepp.rollout.dispatch.Crew`.

        Raises:
            RolloutError: there is no worker for long, or one has refused what it was asked.
        """
        begin = time.monotonic()
        while (event := self._next()) is None:
            self._check_time(begin)
        return event

    def close(self) -> None:
        """Stop all workers."""
        self._stop(self.actors)

    # --- inside ---

    def _next(self) -> Any:
        """What happens within ``LOOK_SECONDS``; None if nothing does."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._grow()
        if not self._tasks:
            time.sleep(LOOK_SECONDS)
            return None
        done, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=LOOK_SECONDS)
        if not done:
            return None
        number, version = self._tasks.pop(done[0])
        result = self._result(number, done[0])
        if isinstance(result, Lost):
            return result
        if version == 0:
            return Answered(number, result)
        if version < self._version:  # there have been others since
            self._start_loading(number)
            return None
        self._ready[number] = None
        return Joined(number)

    def _result(self, number: int, task: Any) -> Any:
        """What a worker's task gave, or that it is lost; then another one is started."""
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        try:
            return self._ray.get(task)
        except (RayActorError, OutOfMemoryError) as error:
            self._reason = first_line(error)
            self._forget(number)
            self._grow()
            return Lost(number, self._reason)
        except RayTaskError as error:
            raise RolloutError(f"A {self._worker.kind} worker failed: {first_line(error.cause)}") from error

    @property
    def _loading(self) -> bool:
        return any(version for _, version in self._tasks.values())

    def _start_loading(self, number: int) -> None:
        self._ready.pop(number, None)
        self._tasks[self.actors[number].load.remote(self._weights)] = number, self._version

    def _stop(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            self._ray.kill(self.actors[number])
            self._forget(number)

    def _forget(self, number: int) -> None:
        del self.actors[number]
        self._ready.pop(number, None)
        self._tasks = {task: of for task, of in self._tasks.items() if of[0] != number}

    def _grow(self) -> None:
        """Start as many workers as there is room for."""
        head_answers, self._looked = self._head_answers(), time.monotonic()
        if not head_answers:  # what Ray would ask it waits without end
            return
        resources = self._ray.cluster_resources()
        needs = {"num_gpus": self._gpus} if resources.get("GPU") or self._gpus > 1 else {"num_cpus": 1}
        free = int(resources.get("GPU") or resources.get("CPU", 0)) - self._reserved
        room = max(1, free // self._gpus)
        for _ in range(len(self.actors), min(self._most or room, room)):
            number = next(self._numbers)
            self.actors[number] = self._ray.remote(self._worker).options(**needs).remote(self._recipe)
            self._start_loading(number)

    def _head_answers(self) -> bool:
        """Whether the cluster's head can be reached; raises EngineLost if it can't for long."""
        begin, reason = time.monotonic(), _silence_of(self._head)
        self._head_gone = (self._head_gone or begin) if reason else None
        if self._head_gone is not None and time.monotonic() - self._head_gone > HEAD_SECONDS:
            raise EngineLost(
                f"The head of the Ray cluster, {self._head}, can't be reached any more, for {HEAD_SECONDS} seconds ({reason}): "
                "look at its machine and at the network."
            )
        return not reason

    def _check_time(self, begin: float) -> None:
        """Raises a RolloutError if there has been nobody since ``begin``, which is too long ago."""
        if self._ready or time.monotonic() - begin < START_SECONDS:
            return
        resources = self._ray.cluster_resources()
        lost = f" The last one was lost with: {self._reason}" if self._reason else ""
        raise EngineLost(
            f"No {self._worker.kind} worker was ready within {START_SECONDS} seconds; the cluster has "
            f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs, of which each worker needs "
            f"{self._gpus if self._gpus > 1 else 'one'}: look at `ray status`.{lost}"
        )


def connect(address: str) -> tuple[Any, bool]:
    """Ray, connected, and whether its cluster is this process's own.

    Raises:
        RolloutError: it isn't installed, or there is nobody at ``address``.
    """
    if importlib.util.find_spec("ray") is None:
        raise RolloutError("rollout ray:// needs Ray, which isn't installed: pip install 'ray>=2.50'")
    import ray
    from ray._private.services import find_bootstrap_address

    if ray.is_initialized():
        return ray, False
    found = address
    if address == "auto":
        found = os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None) or ""
        if not found:
            raise RolloutError(
                "This machine belongs to no Ray cluster: start one with `ray start --head`, join one with `ray start "
                "--address=HOST:PORT`, or use --rollout ray://local."
            )
    if ":" in found:
        _look_for(found.removeprefix("ray://"))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without a GPU see what there is
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RolloutError(
            f"The Ray cluster {found} can't be joined ({first_line(error)}): look at `ray status`, and whether this machine has "
            "the versions of Ray and Python that the cluster has."
        ) from error
    return ray, True


def _look_for(address: str) -> None:
    """Raises a RolloutError if nobody listens at ``host:port``, for which Ray itself would wait for minutes."""
    if reason := _silence_of(address):
        raise RolloutError(
            f"No Ray cluster answers at {address} ({reason}): give the address that `ray start --head` told, "
            "look whether this machine may connect to it, or use --rollout ray://local."
        )


def _silence_of(address: str) -> str:
    """Why nobody can be reached at ``host:port``; empty if somebody listens there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""
