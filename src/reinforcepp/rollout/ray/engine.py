"""Rollouts by engines on many devices or machines, which Ray places and watches.

The trainer puts its weights once into Ray's object store. Ray brings them once to each machine, where every worker reads the
same memory; between GPUs vLLM's own weight transfer takes them straight there. What is sampled depends on seed, prompt and
sample number alone, so it doesn't matter who answers what, or how often something had to be done again because a worker died.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from reinforcepp.models.loading import context_length, eos_token_ids
from reinforcepp.rollout.dispatch import Tally, share_out
from reinforcepp.rollout.engine import check_prompts, grown
from reinforcepp.rollout.ray.actor_pool import Later, RayCrew, connect
from reinforcepp.rollout.ray.worker import Recipe, Worker, pack
from reinforcepp.rollout.vllm.client import Fault
from reinforcepp.rollout.vllm.nccl import BACKEND, ToPool
from reinforcepp.rollout.weights import named_config
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRIES = 2
"""So many transfers one after the other may fail: one does where a worker dies in the middle of it."""


class RayEngine:
    """Rollouts by a pool of workers; see :class:`~reinforcepp.rollout.engine.RolloutEngine`.

    Args:
        address: ``auto`` for the cluster that this machine belongs to, ``local`` for one of this process's own, or the
            ``host:port`` of a cluster's head.
        model: whose weights are handed out.
        tokenizer: its tokenizer.
        engine: of each worker: ``auto``, ``transformers`` or ``vllm``.
        workers: how many, at most; 0 is as many as the cluster has GPUs for, or, without any, CPUs.
        tensor_parallel_size: GPUs that share the model in each of them.
        max_length: prompt and completion together, in tokens.
        batch_size: completions that a worker generates at a time.
        reserved: GPUs or CPUs that are left to others.

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
        tensor_parallel_size: int = 1,
        max_length: int,
        batch_size: int = 64,
        reserved: int = 0,
    ) -> None:
        self.tokenizer, self.dtype = tokenizer, model.dtype
        self.context = context_length(model.config)
        self.eos_ids = eos_token_ids(model, tokenizer)
        self.batch_size = batch_size
        self.tallies: list[Tally] = []
        self.ray, self._own = connect(address)
        straight = model.device.type == "cuda" and importlib.util.find_spec("vllm") is not None
        self._to_gpus = ToPool(self.ray) if straight else None
        self._failed = 0
        recipe = Recipe(
            named_config(model),
            model.generation_config,
            model.dtype,
            tokenizer,
            engine,
            max_length,
            batch_size,
            tensor_parallel_size,
            BACKEND if self._to_gpus else "",
        )
        self.crew = RayCrew(self.ray, Worker, recipe, workers, reserved, tensor_parallel_size)
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
        yield from grown(self.tokenizer, self.eos_ids, whole)

    def load_weights(self, model: PreTrainedModel) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""
        self.crew.load(pack(model), lambda later: self._transfer(model, later))

    def close(self) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; a cluster of others goes on."""
        if self._to_gpus is not None:
            self._to_gpus.close()
        self.crew.close()
        if self._own:
            self.ray.shutdown()

    def _transfer(self, model: PreTrainedModel, later: Later) -> set[int]:
        """Give the weights to those who take them from GPU to GPU; gives their numbers, none if it can't be done."""
        if self._to_gpus is None:
            return set()
        joined = {number: of for number, of in self.crew.told("in_group").items() if of is not None}
        if not joined:
            return set()
        workers = {number: self.crew.actors[number] for number in joined}
        try:
            self._to_gpus.send(model, workers, later, anew=not all(joined.values()))
            self._failed = 0
        except Fault as fault:
            self._failed += 1
            which = "from now on weights" if self._failed == TRIES else "these weights"
            warnings.warn(
                f"The pool {fault}: {which} go through Ray's object store, not straight from GPU to GPU.", stacklevel=2
            )
            if self._failed == TRIES:
                self._to_gpus = None
            self.crew.replace(workers)  # they may wait for the others without end
            return set()
        return set(workers)
