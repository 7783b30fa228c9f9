"""Weights from the trainer's GPU to those of a vLLM server, by vLLM's own NCCL weight transfer.

Written against vLLM 0.32 (``vllm/distributed/weight_transfer/nccl_engine.py``): for a server that was started with
``--weight-transfer-config '{"backend": "nccl"}'``. Trainer and server need GPUs of their own.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from reinforcepp.rollout.vllm_client import Fault, VllmClient
from reinforcepp.rollout.vllm_weights import weights_for_vllm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLOSE_SECONDS = 10


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
        torch.cuda.set_device(model.device)  # this thread's; the transfer takes the present one
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        if self.engine is None:
            world = 1 + self._server.get("/get_world_size")["world_size"]
            host, port = _own_address(self._server.url)
            told = NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=world, rank=0)
            self.engine = NCCLTrainerWeightTransferEngine.trainer_init(
                told, client=_Control(self._server), source=_source(model)
            )
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


def _source(model: PreTrainedModel) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in self]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return weights_for_vllm(model)

    return Source()


def _own_address(url: str) -> tuple[str, int]:
    """Where the server's machine finds this one, and a port that is free."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port))  # sends nothing
        host = probe.getsockname()[0]
    with socket.socket() as free:
        free.bind((host, 0))
        return host, free.getsockname()[1]


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do ``work``; NCCL itself would wait for ever for a peer that is gone."""
    future: Future[None] = Future()

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
    except RuntimeError as error:  # NCCL's own
        raise Fault(f"can't take over the weights by NCCL ({error})") from error
