"""The rollout engine on a Ray cluster, which places and watches workers on many devices or nodes.

The trainer puts its weights once into Ray's object store. Ray copies them once to each node, where all workers read the same
memory. Between GPUs, vLLM's NCCL weight transfer broadcasts them directly, and only a worker that starts later needs the store.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from reinforcepp.rollout.pooled_engine import PooledEngine
from reinforcepp.rollout.ray.actor_pool import RayPool, connect, disconnect
from reinforcepp.rollout.ray.worker import Worker, WorkerSpec
from reinforcepp.rollout.vllm.nccl import BACKEND, NcclPoolTransfer, TransferFailed
from reinforcepp.rollout.weight_transfer import config_with_architecture
from reinforcepp.runtime.terminal import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_BROADCAST_FAILURES = 2
"""Failed broadcasts in a row after which the engine stops trying; a single one can be a worker that died meanwhile."""


class RayEngine(PooledEngine):
    """Generation by a pool of Ray workers; see :class:`~reinforcepp.rollout.engine.RolloutEngine`.

    Args:
        address: ``auto`` for the cluster that this node belongs to, ``local`` for a new one on this node, or the
            ``host:port`` of a cluster's head.
        model: The policy, whose weights the workers get.
        tokenizer: Its tokenizer.
        engine: Engine of each worker: ``auto``, ``transformers`` or ``vllm``.
        workers: Largest number of workers; 0 is as many as the cluster has GPUs for or, without GPUs, CPUs.
        tensor_parallel_size: GPUs that share the model in each worker.
        max_length: Tokens of prompt and completion together.
        batch_size: Completions that a worker generates at a time.
        reserved: GPUs or CPUs that the pool doesn't use.

    Raises:
        RolloutError: Ray isn't installed, the cluster can't be reached, or no worker can be started.
    """

    name = "ray"
    pool: RayPool

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
        super().__init__(model, tokenizer, batch_size)
        self.dtype = model.dtype
        self.ray, self._disconnect = connect(address)
        can_broadcast = model.device.type == "cuda" and importlib.util.find_spec("vllm") is not None
        self._nccl = NcclPoolTransfer(self.ray) if can_broadcast else None
        self._broadcast_failures = 0
        spec = WorkerSpec(
            config_with_architecture(model),
            model.generation_config,
            model.dtype,
            tokenizer,
            engine,
            max_length,
            batch_size,
            tensor_parallel_size,
            BACKEND if self._nccl else "",
        )
        self.pool = RayPool(self.ray, Worker, spec, workers, reserved, tensor_parallel_size)
        self.load_weights(model)

    def load_weights(self, model: PreTrainedModel) -> None:
        """Give ``model``'s weights to all workers, between GPUs by a broadcast."""
        self.pool.load(model, lambda: self._broadcast(model))

    def close(self) -> None:
        """Stop the workers; a cluster that this engine joined keeps running."""
        if self._nccl is not None:
            self._nccl.close()
        super().close()
        if self._disconnect:
            disconnect(self.ray)

    def _broadcast(self, model: PreTrainedModel) -> set[int]:
        """Broadcast the weights to the workers that support it; return their numbers, none if the broadcast failed."""
        if self._nccl is None:
            return set()
        joined = {
            number: state for number, state in self.pool.call_all("in_transfer_group").items() if state is not None
        }
        if not joined:
            return set()
        workers = {number: self.pool.actors[number] for number in joined}
        self._nccl.prepare(model)
        try:
            self._nccl.push(workers, rebuild=not all(joined.values()))
        except TransferFailed as failure:
            self._broadcast_failures += 1
            give_up = self._broadcast_failures == MAX_BROADCAST_FAILURES
            warn(
                f"The Ray pool {failure}. {'All further weights' if give_up else 'These weights'} go through Ray's object store "
                "instead of directly between GPUs.",
                stacklevel=2,
            )
            if give_up:
                self._nccl = None
            self.pool.replace(workers)  # they can be waiting for the rest of the broadcast without end
            return set()
        self._broadcast_failures = 0
        return set(workers)
