"""A model and its optimiser as Accelerate runs them: alone, copied to all ranks (DDP) or in parts (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from reinforcepp.distributed.shards import sharded_like, whole
from reinforcepp.models.precision import MasterAdamW

if TYPE_CHECKING:
    from accelerate import Accelerator


class Engine(Protocol):
    """Gradients and steps of one model; every rank has to do the same."""

    model: Any
    """What the passes that learn go through."""

    def apart(self) -> AbstractContextManager[Any]:
        """Around a pass that isn't the last one before a step: gradients may stay with this rank."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a loss whose denominator is global: ranks add up instead of averaging."""

    def clip(self, limit: float) -> float:
        """Scale gradients down to norm ``limit``, at the latest in the step; returns the norm before."""

    def step(self) -> None:
        """Update the weights, and forget the gradients."""

    def drop(self) -> None:
        """Forget the gradients."""

    def weight(self, parameter: Tensor) -> Tensor:
        """All of a parameter that is trained."""

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """All of its gradient."""

    def state(self, *, masters: bool) -> dict[str, Any]:
        """The optimiser's state dict, of which each rank's may hold a part; with the float32 weights if they are ``masters``."""

    def load_state(self, state: dict[str, Any], weights: Iterable[Tensor]) -> None:
        """Take over what :meth:`state` gave on any number of ranks, and the model's ``weights``."""


class AccelerateEngine:
    """See :class:`Engine`.

    Args:
        accelerator: Accelerate's.
        model: as it has prepared it.
        optimizer: as it has prepared it.
        adam: what it has prepared.
    """

    def __init__(self, accelerator: Accelerator, model: Any, optimizer: Any, adam: MasterAdamW) -> None:
        self.model, self._accelerator, self._optimizer, self._adam = model, accelerator, optimizer, adam
        self._sharded = bool(accelerator.is_fsdp2)

    def apart(self) -> AbstractContextManager[Any]:
        """See :class:`Engine`."""
        return nullcontext() if self._sharded else self._accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """See :class:`Engine`."""
        self._accelerator.backward(loss * self._accelerator.num_processes)

    def clip(self, limit: float) -> float:
        """See :class:`Engine`."""
        return float(whole(self._accelerator.clip_grad_norm_(self._adam.masters, limit)))

    def step(self) -> None:
        """See :class:`Engine`."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def drop(self) -> None:
        """See :class:`Engine`."""
        self.model.zero_grad()
        self._optimizer.zero_grad()

    def weight(self, parameter: Tensor) -> Tensor:
        """See :class:`Engine`."""
        return whole(parameter)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """See :class:`Engine`."""
        return None if parameter.grad is None else whole(parameter.grad)

    def state(self, *, masters: bool) -> dict[str, Any]:
        """See :class:`Engine`."""
        state: dict[str, Any] = self._optimizer.state_dict()
        if self._sharded and masters:
            held = {index: {"master": master} for index, master in enumerate(self._adam.masters)}
            state["state"] = {index: {**own, **held[index]} for index, own in state["state"].items()}
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Any], weights: Iterable[Tensor]) -> None:
        """See :class:`Engine`."""
        if self._sharded:
            for shard, full in zip(self.model.parameters(), weights, strict=True):
                shard.copy_(sharded_like(full.to(shard.dtype), shard))
            state = state | {"state": self._shards_of(state["state"])}
        self._optimizer.load_state_dict(state)

    def _shards_of(self, states: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """This rank's part of an optimiser's state; the weights with all digits that are in it become the masters."""
        masters = self._adam.masters
        for index, values in states.items():
            if "master" in values:
                masters[index].copy_(sharded_like(values["master"], masters[index]))
        return {
            index: {n: sharded_like(v, masters[index]) for n, v in values.items() if n != "master"}
            for index, values in states.items()
        }
