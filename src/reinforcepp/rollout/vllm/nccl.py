"""Weight transfer from the trainer's GPU to the GPUs of vLLM servers or Ray workers, by vLLM's NCCL weight transfer.

Written against vLLM 0.32 (``vllm/distributed/weight_transfer/nccl_engine.py``). A server must be started with
``--weight-transfer-config '{"backend": "nccl"}'``; our own engines set the same option. Trainer and engines need separate
GPUs.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from torch import Tensor

from reinforcepp.errors import first_line
from reinforcepp.rollout.engine import select_device
from reinforcepp.rollout.vllm.client import ServerUnavailable, VllmClient, response_field, run_in_daemon
from reinforcepp.rollout.weight_transfer import WeightTransfer, weights_without_tied_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKEND = "nccl"
"""vLLM's name of this weight transfer."""
CLOSE_TIMEOUT_SECONDS = 10
POOL_TIMEOUT_SECONDS = 120
"""Time in which all workers of a pool must have the weights."""


class TransferFailed(ServerUnavailable):
    """A transfer failed or timed out; its receivers can still be waiting for the rest of it."""


class NcclServerTransfer(WeightTransfer[VllmClient]):
    """A process group with each server; the trainer is rank 0."""

    def __init__(self) -> None:
        self._groups: dict[VllmClient, _ServerGroup] = {}

    def push(self, receiver: VllmClient) -> None:
        """Broadcast all weights to the workers of a server."""
        group = self._groups.pop(receiver, None)  # put back after success
        if group is None or receiver.info is not group.info:  # a server that was away can be another process
            group = _ServerGroup(receiver)
        _within(receiver.timeouts.progress, lambda: group.send(self.model))
        self._groups[receiver] = group

    def close(self) -> None:
        """Leave the groups."""
        for group in self._groups.values():
            with suppress(ServerUnavailable):  # a server that is gone doesn't take part
                _within(CLOSE_TIMEOUT_SECONDS, group.engine.shutdown)
        self._groups.clear()


class _ServerGroup:
    """The trainer and one server."""

    def __init__(self, server: VllmClient) -> None:
        self.info, self._server = server.info, server
        self.engine: Any = None

    def send(self, model: PreTrainedModel) -> None:
        select_device(model.device)
        if self.engine is None:
            world_size = 1 + response_field(self._server.get("/get_world_size"), "world_size")
            host = _own_host(self._server.url)
            self.engine = _join_as_rank_zero(host, world_size, _ServerControl(self._server), model)
        self.engine.source = _weight_source(model)
        self.engine.send_weights()


class _ServerControl:
    """vLLM's control messages during a transfer, over HTTP."""

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


class NcclPoolTransfer(WeightTransfer[Mapping[int, Any]]):
    """One process group of the trainer, as rank 0, and all workers of a Ray pool; rebuilt when workers come or go.

    Args:
        ray: The connected library.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._workers: dict[int, Any] = {}
        self._engine: Any = None

    def push(self, receiver: Mapping[int, Any], *, rebuild: bool = False) -> None:
        """Broadcast all weights to ``receiver``, Ray actors by number; ``rebuild`` if one of them isn't in the group.

        Raises:
            TransferFailed: The transfer failed; workers can still be waiting for the rest of it.
        """
        workers = dict(receiver)
        try:
            _within(POOL_TIMEOUT_SECONDS, lambda: self._send(workers, rebuild), self._ray.exceptions.RayError)
        except TransferFailed:
            self.close()
            raise

    def close(self) -> None:
        """Leave the group, even if other members are gone."""
        engine, self._engine, self._workers = self._engine, None, {}
        if engine is not None:
            with suppress(TransferFailed):
                _within(CLOSE_TIMEOUT_SECONDS, engine.shutdown)

    def _send(self, workers: dict[int, Any], rebuild: bool) -> None:
        select_device(self.model.device)
        if rebuild or workers.keys() != self._workers.keys():
            self.close()
            self._workers = workers
            control = _PoolControl(self._ray, list(workers.values()))
            host = self._ray.util.get_node_ip_address()
            self._engine = _join_as_rank_zero(host, 1 + len(workers), control, self.model)
        self._engine.source = _weight_source(self.model)
        self._engine.send_weights()


class _PoolControl:
    """vLLM's control messages during a transfer, to all actors at once."""

    def __init__(self, ray: Any, workers: list[Any]) -> None:
        self._ray, self._workers = ray, workers

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        ranks = [init_info | {"rank_offset": 1 + i} for i in range(len(self._workers))]
        self._ray.get([worker.join_transfer.remote(rank) for worker, rank in zip(self._workers, ranks, strict=True)])

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ray.get([worker.finish_transfer.remote() for worker in self._workers])

    def _call(self, method: str, *arguments: Any) -> None:
        self._ray.get([worker.transfer.remote(method, *arguments) for worker in self._workers])


def _join_as_rank_zero(host: str, world_size: int, control: Any, model: PreTrainedModel) -> Any:
    """Return the trainer's end of a process group of ``world_size`` members that meet at ``host``, an address of this node."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    info = NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=world_size, rank=0)
    return NCCLTrainerWeightTransferEngine.trainer_init(info, client=control, source=_weight_source(model))


def _weight_source(model: PreTrainedModel) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class ModelWeights(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in self]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return weights_without_tied_head(model)

    return ModelWeights()


def _own_host(url: str) -> str:
    """Return the address under which the server's node reaches this one."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port))  # sends nothing
        return str(probe.getsockname()[0])


def _within(seconds: float, work: Callable[[], None], *failures: type[Exception]) -> None:
    """Run ``work`` with a timeout, because NCCL itself waits forever for a peer that is gone.

    Raises:
        TransferFailed: The time is over, or ``work`` raised a RuntimeError or one of ``failures``.
    """
    expected: tuple[type[Exception], ...] = (RuntimeError, *failures)
    try:
        run_in_daemon(work).result(timeout=seconds)
    except TimeoutError as error:
        raise TransferFailed(f"didn't load the weights within {seconds:g} s") from error
    except expected as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps the error of another process
        raise TransferFailed(f"can't load the weights over NCCL ({first_line(cause)})") from error
