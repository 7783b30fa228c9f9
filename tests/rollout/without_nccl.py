"""vLLM's NCCL weight transfer without a GPU: tensors go through the group's TCP store, one by one."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from reinforcepp.rollout.ray.worker import Worker, WorkerSpec
from reinforcepp.rollout.vllm.nccl import BACKEND


class OverStore:
    """Replaces vLLM's PyNcclCommunicator."""

    def __init__(self, group: Any, device: Any) -> None:
        self.group = group
        assert group.all_gather_obj(group.rank) == list(range(group.world_size))  # like the members of an NCCL group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        tensor.copy_(self.group.broadcast_obj(tensor, src))

    def destroy(self) -> None:
        self.group = None


def stand_in(put: Any = setattr) -> None:
    """Replace NCCL; ``put`` is ``setattr`` or ``monkeypatch.setattr``."""
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import nccl_engine

    put(pynccl, "PyNcclCommunicator", OverStore)
    plain = partial(nccl_engine.NCCLTrainerInitInfo, packed=False)  # packing needs CUDA streams
    put(nccl_engine, "NCCLTrainerInitInfo", plain)
    put(torch.accelerator, "current_device_index", lambda: 0)
    put(torch.accelerator, "synchronize", lambda: None)
    put(torch.cuda, "current_stream", lambda: None)


class Taker(Worker):
    """A worker that joins the transfer without a GPU."""

    def __init__(self, spec: WorkerSpec) -> None:
        stand_in()
        super().__init__(replace(spec, weight_transfer=BACKEND))

    def in_transfer_group(self) -> bool:
        return bool(self.engine._in_transfer_group)

    def fail_once(self) -> None:
        """Have the engine fail in the next batch, so that it restarts."""
        llm = self.engine._llm

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("failed in the middle of a batch")

        llm.generate = fail
