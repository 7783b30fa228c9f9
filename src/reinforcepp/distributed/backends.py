"""The training backend interface, and its implementation by Accelerate: one process, DDP, or FSDP2."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from reinforcepp.distributed.shards import full_tensor, shard_like
from reinforcepp.models.master_weights import MasterWeights

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingBackend(Protocol):
    """Runs forward passes, gradients, and optimizer steps of one model. Every rank must make the same calls."""

    model: Any
    """The module that training forward passes call."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """Return a context for passes before the last one of an optimizer step; gradients can stay on this rank."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. The loss has a global denominator, so ranks sum gradients instead of averaging them."""

    def clip(self, limit: float) -> float:
        """Clip gradients to norm ``limit``, at the latest in :meth:`step`; returns the norm before clipping."""

    def step(self) -> None:
        """Update the weights and clear the gradients."""

    def discard_gradients(self) -> None:
        """Clear the gradients without an update."""

    def full_weight(self, parameter: Tensor) -> Tensor:
        """Return all of a trained parameter, gathered if it is sharded."""

    def full_gradient(self, parameter: Tensor) -> Tensor | None:
        """Return all of a parameter's gradient, gathered if it is sharded."""

    def state_dict(self, *, masters: bool) -> dict[str, Any]:
        """Return the optimizer's state dict; a sharded backend returns this rank's part.

        Args:
            masters: include the float32 master weights.
        """

    def load_state(self, state: dict[str, Any], weights: Iterable[Tensor]) -> None:
        """Load a state that :meth:`state_dict` returned on any number of ranks, and the model's ``weights``."""


class AccelerateBackend(TrainingBackend):
    """A :class:`TrainingBackend` for a single process, DDP, and FSDP2.

    Args:
        accelerator: the Accelerator that prepared the model.
        model: the prepared model.
        optimizer: the prepared optimizer.
        masters: the optimizer's parameters, and the optimizer before it was prepared.
    """

    def __init__(self, accelerator: Accelerator, model: Any, optimizer: Any, masters: MasterWeights) -> None:
        self.model, self._accelerator, self._optimizer, self._masters = model, accelerator, optimizer, masters
        self._sharded = bool(accelerator.is_fsdp2)
        # DDP and FSDP2 average gradients over ranks. Masters are summed.
        self._ranks_in_mean = 1 if masters.has_separate_masters else accelerator.num_processes

    @override
    def no_sync(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._sharded else self._accelerator.no_sync(self.model)

    @override
    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss * self._ranks_in_mean)

    @override
    def clip(self, limit: float) -> float:
        # Accelerate compares the list with the sharded model's parameters, so it must have their order.
        shards = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        parameters = shards if self._sharded else self._masters.masters
        return float(full_tensor(self._accelerator.clip_grad_norm_(parameters, limit)))

    @override
    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    @override
    def discard_gradients(self) -> None:
        self.model.zero_grad()
        self._optimizer.zero_grad()

    @override
    def full_weight(self, parameter: Tensor) -> Tensor:
        return full_tensor(parameter)

    @override
    def full_gradient(self, parameter: Tensor) -> Tensor | None:
        return None if parameter.grad is None else full_tensor(parameter.grad)

    @override
    def state_dict(self, *, masters: bool) -> dict[str, Any]:
        state: dict[str, Any] = self._masters.state_dict()
        if self._sharded and masters:
            values_of = state["state"]
            state["state"] = {i: {**values, "master": self._masters.masters[i]} for i, values in values_of.items()}
        return state

    @override
    @torch.no_grad()
    def load_state(self, state: dict[str, Any], weights: Iterable[Tensor]) -> None:
        self.discard_gradients()  # of a step that a signal stopped
        if self._sharded:
            for shard, full in zip(self.model.parameters(), weights, strict=True):
                shard.copy_(shard_like(full.to(shard.dtype), shard))
            state = state | {"state": self._shard_state(state["state"])}
        self._masters.load_state_dict(state)

    def _shard_state(self, states: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """Return this rank's shards of an optimizer state; float32 weights in the state are copied to the masters."""
        masters = self._masters.masters
        for index, values in states.items():
            if "master" in values:
                masters[index].copy_(shard_like(values["master"], masters[index]))
        return {
            index: {n: shard_like(v, masters[index]) for n, v in values.items() if n != "master"}
            for index, values in states.items()
        }
