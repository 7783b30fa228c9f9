"""Weights from the trainer's GPU to those of vLLM's, of a server or of a pool, by vLLM's own NCCL weight transfer.

Written against vLLM 0.32 (``vllm/distributed/weight_transfer/nccl_engine.py``): for a server that was started with
``--weight-transfer-config '{"backend": "nccl"}'``, and for engines of our own with that setting. Trainer and engines need
GPUs of their own.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from reinforcepp.errors import first_line
from reinforcepp.models.lora import full_weights
from reinforcepp.rollout.vllm.client import Fault, VllmClient
from reinforcepp.rollout.vllm.compat import without_tied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKEND = "nccl"
"""Of vLLM's weight transfer."""
CLOSE_SECONDS = 10
POOL_SECONDS = 120
"""Within this time all workers of a pool have to have the weights."""


class ByNccl:
    """A process group with each server, the trainer as its rank 0."""

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None
        self._groups: dict[VllmClient, Any] = {}

    def prepare(self, model: PreTrainedModel) -> None:
        """Nothing is copied."""
        self._model = model

    def send(self, server: VllmClient) -> None:
        """Broadcast all weights to ``server``'s workers."""
        group = self._groups.pop(server, None)  # put back when it has worked
        if group is None or server.facts is not group.facts:  # it was away, and may be another process
            group = _Group(server)
        _within(server.patience.work, lambda: group.send(self._model))
        self._groups[server] = group

    def close(self) -> None:
        """Leave the groups."""
        for group in self._groups.values():
            with suppress(Fault):  # who is gone doesn't take part
                _within(CLOSE_SECONDS, group.engine.shutdown)
        self._groups.clear()


class _Group:
    """The trainer and one server."""

    def __init__(self, server: VllmClient) -> None:
        self.facts, self._server = server.facts, server
        self.engine: Any = None

    def send(self, model: Any) -> None:
        _take_device(model)
        if self.engine is None:
            world = 1 + self._server.get("/get_world_size")["world_size"]
            self.engine = _trainers_end(_own_host(self._server.url), world, _Control(self._server), model)
        self.engine.source = _source(model)
        self.engine.send_weights()


class _Control:
    """vLLM's protocol for what is said beside the transfer, over our connection."""

    def __init__(self, server: VllmClient) -> None:
        self._server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._server.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._server.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._server.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._server.post("/finish_weight_update", {"weight_version": weight_version})


class ToPool:
    """One process group of the trainer, as its rank 0, and all workers of a Ray pool; made anew where others are there.

    Args:
        ray: the library, connected.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._workers: dict[int, Any] = {}
        self._engine: Any = None

    def send(self, model: PreTrainedModel, workers: Mapping[int, Any], later: Any, *, anew: bool = False) -> None:
        """Broadcast all weights to ``workers``, Ray's actors by number.

        Args:
            model: on a GPU.
            workers: each with an engine whose weight transfer is :data:`BACKEND`.
            later: for workers whose engine has to start again, what gets them the weights then.
            anew: someone hasn't joined, or not again.

        Raises:
            Fault: it hasn't worked; who was to take part may still wait for the rest.
        """
        try:
            _within(POOL_SECONDS, lambda: self._send(model, dict(workers), later, anew), self._ray.exceptions.RayError)
        except Fault:
            self.close()
            raise

    def close(self) -> None:
        """Leave the group, also where others of it are gone."""
        engine, self._engine, self._workers = self._engine, None, {}
        if engine is not None:
            with suppress(Fault):
                _within(CLOSE_SECONDS, engine.shutdown)

    def _send(self, model: PreTrainedModel, workers: dict[int, Any], later: Any, anew: bool) -> None:
        _take_device(model)
        if anew or workers.keys() != self._workers.keys():
            self.close()
            self._workers = workers
            control = _PoolControl(self._ray, list(workers.values()), later)
            self._engine = _trainers_end(self._ray.util.get_node_ip_address(), 1 + len(workers), control, model)
        self._engine.client.later = later
        self._engine.source = _source(model)
        self._engine.send_weights()


class _PoolControl:
    """vLLM's protocol for what is said beside the transfer, to all actors at once."""

    def __init__(self, ray: Any, workers: list[Any], later: Any) -> None:
        self._ray, self._workers, self.later = ray, workers, later

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        ranks = [init_info | {"rank_offset": 1 + i} for i in range(len(self._workers))]
        self._ray.get([worker.join.remote(info) for worker, info in zip(self._workers, ranks, strict=True)])

    def start_weight_update(self) -> None:
        self._ask("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._ask("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ray.get([worker.took_over.remote(self.later) for worker in self._workers])

    def _ask(self, *step: Any) -> None:
        self._ray.get([worker.transfer.remote(*step) for worker in self._workers])


def _trainers_end(host: str, world: int, control: Any, model: PreTrainedModel) -> Any:
    """The trainer's end of a process group of ``world`` members that meet at ``host``, this machine."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    told = NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=world, rank=0)
    return NCCLTrainerWeightTransferEngine.trainer_init(told, client=control, source=_source(model))


def _source(model: PreTrainedModel) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in self]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(without_tied(model.config, full_weights(model)))

    return Source()


def _take_device(model: PreTrainedModel) -> None:
    """The transfer takes the thread's present device."""
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)


def _own_host(url: str) -> str:
    """Where the server's machine finds this one."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port))  # sends nothing
        return str(probe.getsockname()[0])


def _within(seconds: float, work: Callable[[], None], *lost: type[Exception]) -> None:
    """Do ``work``; NCCL itself would wait for ever for a peer that is gone. What it raises, or ``lost``, is a Fault."""
    future: Future[None] = Future()
    expected: tuple[type[Exception], ...] = (RuntimeError, *lost)

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:  # raised again below
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        future.result(timeout=seconds)
    except TimeoutError as error:
        raise Fault(f"hasn't taken over the weights within {seconds:g} s") from error
    except expected as error:
        cause = getattr(error, "cause", None) or error  # Ray names what was wrong in another process
        raise Fault(f"can't take over the weights by NCCL ({first_line(cause)})") from error
