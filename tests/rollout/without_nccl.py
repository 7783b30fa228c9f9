"""vLLM's own NCCL weight transfer where there is no GPU: tensors go through the group's TCP store, one by one."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from reinforcepp.models.loading import weights_hash
from reinforcepp.rollout.ray.worker import Recipe, Worker
from reinforcepp.rollout.vllm.nccl import BACKEND


class OverStore:
    """In place of vLLM's PyNcclCommunicator."""

    def __init__(self, group: Any, device: Any) -> None:
        self.group = group
        assert group.all_gather_obj(group.rank) == list(range(group.world_size))  # as NCCL's members meet

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        tensor.copy_(self.group.broadcast_obj(tensor, src))

    def destroy(self) -> None:
        self.group = None


def stand_in(put: Any = setattr) -> None:
    """``put`` is setattr, or what undoes it when a test ends."""
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import nccl_engine

    put(pynccl, "PyNcclCommunicator", OverStore)
    plain = partial(nccl_engine.NCCLTrainerInitInfo, packed=False)  # or streams of a GPU are needed
    put(nccl_engine, "NCCLTrainerInitInfo", plain)
    put(torch.accelerator, "current_device_index", lambda: 0)
    put(torch.accelerator, "synchronize", lambda: None)
    put(torch.cuda, "current_stream", lambda: None)


class Taker(Worker):
    """A worker that takes part without a GPU."""

    def __init__(self, recipe: Recipe) -> None:
        stand_in()
        super().__init__(replace(recipe, weight_transfer=BACKEND))

    def in_group(self) -> bool:
        return bool(self.engine._in_group)

    def kept(self) -> str:
        """Of the weights that it would start again with."""
        return weights_hash(self.engine._latest())
