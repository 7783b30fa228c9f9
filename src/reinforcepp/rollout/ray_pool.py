"""Rollouts by engines on many devices or machines, which Ray places and watches; ray is only imported here.

The trainer puts its weights once into Ray's object store. Ray brings them once to each machine, where every worker reads the
same memory. What is sampled depends on seed, prompt and sample number alone, so it doesn't matter who answers what, or how often
something had to be done again because a worker died.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinforcepp.adapters import base_model, full_weights
from reinforcepp.errors import RolloutError
from reinforcepp.models import context_length, empty_model, eos_ids
from reinforcepp.processes import started
from reinforcepp.rollout.choose import choose_engine, start_engine
from reinforcepp.rollout.engine import check_prompts, completed
from reinforcepp.rollout.share_out import Answered, Joined, Lost, Tally, share_out
from reinforcepp.rollout.weights import named_config
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Values = tuple[str, Any]
"""A tensor's type, and its values in an array that may share memory with others."""
CONNECT_SECONDS = 10
START_SECONDS = 180
"""Within this time the first worker has to be ready."""
LOOK_SECONDS = 1.0
"""How often the cluster is looked at for room for more workers while answers are waited for."""


@dataclass(frozen=True)
class Recipe:
    """What a worker starts from; weights come apart."""

    config: Any
    generation_config: Any
    dtype: torch.dtype
    tokenizer: Any
    engine: str
    max_length: int
    batch_size: int


@dataclass(frozen=True)
class Packed:
    """Weights, tied ones under both names, and the buffers that aren't saved with them, such as rotary frequencies."""

    weights: Mapping[str, Values]
    buffers: Mapping[str, Values]


class Worker:
    """What runs in each of Ray's processes: an engine of its own, and the weights that all on its machine share."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.engine: Any = None
        self.model: Any = None

    def load(self, packed: Packed) -> str:
        """Generate with these weights from now on; returns the engine's name."""
        recipe = self.recipe
        if self.model is None:
            self.model = empty_model(recipe.config, recipe.dtype)
            self.model.generation_config = recipe.generation_config
        place = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.load_state_dict({name: as_tensor(v).to(place) for name, v in packed.weights.items()}, assign=True)
        self.model.tie_weights()
        for name, values in packed.buffers.items():
            owner, _, own = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[own] = as_tensor(values).to(place)
        if self.engine is None:
            choice = choose_engine(recipe.engine, recipe.config, recipe.dtype)
            self.engine = start_engine(
                choice, self.model, recipe.tokenizer, max_length=recipe.max_length, batch_size=recipe.batch_size
            )
        else:
            self.engine.load_weights(self.model)
        return str(self.engine.name)

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """The completions of each prompt."""
        completions = self.engine.generate(prompts, sampling)
        number = sampling.num_samples
        return [completions[i : i + number] for i in range(0, len(completions), number)]


class RayEngine:
    """Rollouts by a pool of workers; see :class:`~reinforcepp.rollout.engine.RolloutEngine`.

    Args:
        address: ``auto`` for the cluster that this machine belongs to, ``local`` for one of this process's own, or the
            ``host:port`` of a cluster's head.
        model: whose weights are handed out.
        tokenizer: its tokenizer.
        engine: of each worker: ``auto``, ``transformers`` or ``vllm``.
        workers: how many, at most; 0 is as many as the cluster has GPUs, or, without any, CPUs.
        max_length: prompt and completion together, in tokens.
        batch_size: completions that a worker generates at a time.

    Raises:
        RolloutError: Ray isn't installed, the cluster can't be reached, or no worker can be started.
    """

    name = "ray"
    shares_trainer_forward = False

    def __init__(
        self,
        address: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        engine: str = "auto",
        workers: int = 0,
        max_length: int,
        batch_size: int = 64,
    ) -> None:
        self.tokenizer, self.dtype = tokenizer, model.dtype
        self.context = context_length(model.config)
        self.eos_ids = eos_ids(model, tokenizer)
        self.batch_size = batch_size
        self.tallies: list[Tally] = []
        self.ray, self._own = connect(address)
        recipe = Recipe(
            named_config(model), model.generation_config, model.dtype, tokenizer, engine, max_length, batch_size
        )
        self.crew = RayCrew(self.ray, recipe, workers)
        self.load_weights(model)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""
        check_prompts(prompts, sampling.max_new_tokens, self.context)
        if not prompts:
            return []
        self.crew.ask(prompts, sampling)
        most = max(1, self.batch_size // sampling.num_samples)
        answers: list[list[Completion]]
        answers, tally = share_out(self.crew, len(prompts), most)
        self.tallies.append(tally)
        return [completion for of_prompt in answers for completion in of_prompt]

    def generate_everywhere(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """What each of the workers answers to all ``prompts``, one after the other: what a check of them all looks at."""
        return self.crew.each(prompts, sampling)

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; it comes when it is whole, and then bit by bit."""
        (whole,) = self.generate([prompt], sampling)
        for length in range(1, len(whole.ids) + 1):
            yield completed(self.tokenizer, self.eos_ids, prompt, whole.ids[:length], whole.logprobs[:length])

    def load_weights(self, model: PreTrainedModel) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""
        self.crew.load(pack(model))

    def close(self) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; a cluster of others goes on."""
        self.crew.close()
        if self._own:
            self.ray.shutdown()


class RayCrew:
    """Ray's actors as :func:`~reinforcepp.rollout.share_out.share_out` needs them.

    An actor that dies is replaced; where the cluster grows, more are started.
    """

    def __init__(self, ray: Any, recipe: Recipe, workers: int) -> None:
        self._ray, self._most = ray, workers
        self._recipe = ray.put(recipe)
        self._weights: Any = None
        self._actors: dict[int, Any] = {}
        self._ready: dict[int, None] = {}
        self._tasks: dict[Any, tuple[int, str]] = {}
        self._numbers = iter(range(1 << 62))
        self._looked = 0.0
        self._prompts: Sequence[Prompt] = ()
        self._sampling: Any = None

    def load(self, packed: Packed) -> None:
        """Hand weights out, and wait until whoever is there has them."""
        self._weights = self._ray.put(packed)
        for number in list(self._ready):
            self._start_loading(number)
        self._grow()
        begin = time.monotonic()
        while self._loading or not self._ready:
            event = self.wait(begin + START_SECONDS)
            if isinstance(event, Lost) and not self._actors:
                raise RolloutError(f"No rollout worker could be started: {event.reason}")

    def ask(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """What is asked from now on."""
        self._prompts, self._sampling = prompts, self._ray.put(sampling)

    def each(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """All answers of each worker."""
        asked = [self._actors[number].answer.remote(list(prompts), sampling) for number in self._ready]
        answers: list[list[list[Completion]]] = self._ray.get(asked)
        return [completion for of_worker in answers for of_prompt in of_worker for completion in of_prompt]

    def ready(self) -> list[int]:
        """See :class:`~reinforcepp.rollout.share_out.Crew`."""
        return list(self._ready)

    def give(self, worker: int, places: Sequence[int]) -> None:
        """See :class:`~reinforcepp.rollout.share_out.Crew`."""
        prompts = [self._prompts[place] for place in places]
        self._tasks[self._actors[worker].answer.remote(prompts, self._sampling)] = worker, "answer"

    def wait(self, until: float | None = None) -> Any:
        """See :class:`~reinforcepp.rollout.share_out.Crew`.

        Raises:
            RolloutError: at the time ``until`` there still is no worker, or one has refused what it was asked.
        """
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        while True:
            if time.monotonic() - self._looked > LOOK_SECONDS:
                self._grow()
            done, _ = (
                self._ray.wait(list(self._tasks), num_returns=1, timeout=LOOK_SECONDS) if self._tasks else ([], [])
            )
            if not done:
                limit = until if until is not None else self._looked + START_SECONDS
                if not self._ready and time.monotonic() > limit:
                    raise RolloutError(self._too_small())
                if not self._tasks:
                    time.sleep(LOOK_SECONDS)
                continue
            number, kind = self._tasks.pop(done[0])
            try:
                result = self._ray.get(done[0])
            except (RayActorError, OutOfMemoryError) as error:
                self._forget(number)
                self._grow()
                return Lost(number, _first_line(error))
            except RayTaskError as error:
                raise RolloutError(f"A rollout worker failed: {_first_line(error.cause)}") from error
            if kind == "answer":
                return Answered(number, result)
            self._ready[number] = None
            return Joined(number)

    def close(self) -> None:
        """Stop all workers."""
        for number in list(self._actors):
            self._ray.kill(self._actors[number])
            self._forget(number)

    # --- inside ---

    @property
    def _loading(self) -> bool:
        return any(kind == "load" for _, kind in self._tasks.values())

    def _start_loading(self, number: int) -> None:
        self._ready.pop(number, None)
        self._tasks[self._actors[number].load.remote(self._weights)] = number, "load"

    def _forget(self, number: int) -> None:
        del self._actors[number]
        self._ready.pop(number, None)
        self._tasks = {task: of for task, of in self._tasks.items() if of[0] != number}

    def _grow(self) -> None:
        """Start as many workers as there is room for."""
        self._looked = time.monotonic()
        resources = self._ray.cluster_resources()
        needs = {"num_gpus": 1} if resources.get("GPU") else {"num_cpus": 1}
        room = int(resources.get("GPU") or resources.get("CPU", 0))
        for _ in range(len(self._actors), min(self._most or room, room)):
            number = next(self._numbers)
            self._actors[number] = self._ray.remote(Worker).options(**needs).remote(self._recipe)
            self._start_loading(number)

    def _too_small(self) -> str:
        resources = self._ray.cluster_resources()
        return (
            f"No rollout worker was ready within {START_SECONDS} seconds; the cluster has {resources.get('CPU', 0):g} CPUs and "
            f"{resources.get('GPU', 0):g} GPUs, of which each worker needs one: look at `ray status`."
        )


def connect(address: str) -> tuple[Any, bool]:
    """Ray, connected, and whether its cluster is this process's own.

    Raises:
        RolloutError: It isn't installed, there is nobody at ``address``, or several processes train together.
    """
    if started() > 1:
        raise RolloutError(
            f"A Ray pool serves a training of one process, and the launcher has started {started()}: leave the launcher out, "
            "or use --rollout auto."
        )
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
            f"The Ray cluster {found} can't be joined ({_first_line(error)}): look at `ray status`, and whether this machine has "
            "the versions of Ray and Python that the cluster has."
        ) from error
    return ray, True


def _look_for(address: str) -> None:
    """Raises a RolloutError if nobody listens at ``host:port``, for which Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise RolloutError(
            f"No Ray cluster answers at {address} ({error.strerror or error}): give the address that `ray start --head` told, "
            "look whether this machine may connect to it, or use --rollout ray://local."
        ) from error


# --- tensors in the object store ------------------------------------------------------------------------------------


def pack(model: PreTrainedModel) -> Packed:
    """What workers need of ``model``; memory that two weights share is one array."""
    arrays: dict[int, Values] = {}

    def shared(weight: Tensor) -> Values:
        values = as_array(weight)
        return arrays.setdefault(values[1].ctypes.data, values)  # which is kept, so its address is nobody else's

    weights = {name: shared(weight) for name, weight in full_weights(model)}
    return Packed(weights, {name: as_array(buffer) for name, buffer in base_model(model).named_buffers()})


def as_array(weight: Tensor) -> Values:
    """A tensor as NumPy holds it, which knows no bfloat16, and its type."""
    plain = weight.detach().cpu().contiguous()
    narrow = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain
    return str(plain.dtype).removeprefix("torch."), narrow.numpy()


def as_tensor(values: Values) -> Tensor:
    """What :func:`as_array` was given; the memory is shared."""
    dtype, array = values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this memory can't be written to: nobody does
        return torch.from_numpy(array).view(getattr(torch, dtype))


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:200]
