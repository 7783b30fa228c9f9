"""Float32 master weights and the loss scale, for training in 16 bits.

An optimizer step is often smaller than the spacing of 16-bit numbers. So the optimizer updates float32 master weights, and
the model computes with rounded copies, as the rollout engine does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


class LossScale:
    """Dynamic loss scale, so that float16 gradients don't underflow; 1 for other dtypes.

    A gradient that isn't finite divides the scale by 4; ``PATIENCE`` finite ones in a row double it.
    """

    START, PATIENCE = 2.0**13, 500

    def __init__(self, dtype: torch.dtype) -> None:
        self.narrow = dtype == torch.float16
        self.value = self.START if self.narrow else 1.0
        self.good = 0

    def scale(self, loss: Tensor) -> Tensor:
        """Return the scaled loss for the backward pass."""
        return loss * self.value if self.narrow else loss

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients of the scaled loss by the scale."""
        for parameter in parameters if self.narrow else ():
            if parameter.grad is not None:
                parameter.grad /= self.value

    def update(self, norm: float) -> None:
        """Update the scale from the norm of a step's gradients."""
        if not self.narrow:
            return
        self.good = self.good + 1 if math.isfinite(norm) else 0
        if self.good == 0:
            self.value = max(1.0, self.value / 4)
        elif self.good % self.PATIENCE == 0:
            self.value *= 2

    def state_dict(self) -> dict[str, float]:
        """Return the scale and the count of finite gradients."""
        return {"value": self.value, "good": self.good}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Load the state from :meth:`state_dict`."""
        self.value, self.good = state["value"], int(state["good"])


class MasterWeights:
    """Float32 master weights of parameters in a narrower dtype, and the optimizer that updates them.

    Create it before ``cast_parameters``, so that the masters have full precision. A float32 parameter is its own master,
    unless ``device`` is given: then all masters, gradients and moments are on that device, and the step runs there.

    As soon as a backward pass has computed the gradient of a parameter with a separate master, it is added to a float32 sum
    over all passes and freed. Before the optimizer step, ``collect`` gives the sums to the masters.

    Args:
        optimizer: of the model's parameters; from now on it updates their masters, and each of its steps is followed by
            ``publish``.
        dtype: that the parameters will be cast to.
        device: of the masters (offloading); by default that of the parameters.
        sum_device: of the sums; by default that of the parameters, so that gradients move to ``device`` once per step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | None = None,
        sum_device: torch.device | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.model_parameters = self._of_optimizer()
        self.group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        self.has_separate_masters = dtype != torch.float32 or device is not None
        """Whether the masters are separate tensors."""
        if self.has_separate_masters:
            for group in optimizer.param_groups:
                group["params"] = [self._replaced(parameter, device) for parameter in group["params"]]
        self.masters = self._of_optimizer()
        optimizer.register_step_post_hook(lambda *_: self.publish())
        self._sums: list[Tensor | None] = [None] * len(self.masters)
        self._sum_device = sum_device
        if self.has_separate_masters:
            for index, live in enumerate(self.model_parameters):
                live.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(self._add_gradient, index)
                )

    def use_shards(self) -> None:
        """Use the shards in the parameter groups as parameters and masters, after FSDP has replaced the parameters."""
        self.model_parameters = self.masters = self._of_optimizer()

    def _add_gradient(self, index: int, live: Tensor) -> None:
        """Add a parameter's gradient to its sum, and free it."""
        self._sums[index] = added_gradient(self._sums[index], live, self._sum_device)

    @torch.no_grad()
    def collect(self, sum_over_ranks: Callable[[Sequence[Tensor]], None] | None = None) -> None:
        """Give the sums of the gradients since the last call to the masters.

        Args:
            sum_over_ranks: adds tensors up over ranks in place, for data-parallel training. It is called on every rank with
                tensors of the same shapes.
        """
        if not self.has_separate_masters:
            return
        if sum_over_ranks is not None:
            self._sum_over_ranks(sum_over_ranks)
        for index, (total, master) in enumerate(zip(self._sums, self.masters, strict=True)):
            if total is not None:
                master.grad = total if total.device == master.device else in_pinned_memory(total)
                self._sums[index] = None
        if self.masters and self.masters[0].device != self.model_parameters[0].device:
            wait_for_copies(self.model_parameters[0].device)

    def _sum_over_ranks(self, sum_over_ranks: Callable[[Sequence[Tensor]], None]) -> None:
        """Add the sums up over ranks. Only a parameter without a gradient on any rank has none, as with a single rank."""
        has_gradient = torch.tensor([float(total is not None) for total in self._sums])
        sum_over_ranks([has_gradient])
        for index, somewhere in enumerate(has_gradient.tolist()):
            if somewhere and self._sums[index] is None:
                live = self.model_parameters[index]
                self._sums[index] = torch.zeros_like(live, dtype=torch.float32, device=self._sum_device)
        sum_over_ranks([total for total in self._sums if total is not None])

    def discard(self) -> None:
        """Discard the gradients that ``collect`` would give to the masters."""
        self._sums = [None] * len(self.masters)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the parameters, rounded to their dtype."""
        for live, master in zip(self.model_parameters, self.masters, strict=True):
            if live.device != master.device:
                live.copy_(in_pinned_memory(master, live.dtype), non_blocking=True)
            elif live is not master:
                live.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state and the master weights."""
        state: dict[str, Any] = self.optimizer.state_dict()
        separate = [
            (i, m) for i, (p, m) in enumerate(zip(self.model_parameters, self.masters, strict=True)) if p is not m
        ]
        state["state"] = {i: dict(values) for i, values in state["state"].items()}
        for i, master in separate:
            state["state"].setdefault(i, {})["master"] = master.detach()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state from :meth:`state_dict`, and discard gradients."""
        self.discard()
        rest = {i: dict(values) for i, values in state_dict["state"].items()}
        for i, master in enumerate(self.masters):  # a float32 parameter that was its own master has none
            master.copy_(rest.get(i, {}).pop("master", self.model_parameters[i]))
        self.optimizer.load_state_dict(state_dict | {"state": {i: values for i, values in rest.items() if values}})
        self.publish()

    def _of_optimizer(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _replaced(self, parameter: Tensor, device: torch.device | None) -> Tensor:
        """Return a new master of ``parameter``, to which the optimizer's state has moved; Adagrad's exists from the start."""
        master = parameter.detach().to(device or parameter.device, torch.float32, copy=True).requires_grad_()
        if (state := self.optimizer.state.pop(parameter, None)) is not None:
            self.optimizer.state[master] = {
                name: value.to(master.device) if isinstance(value, Tensor) else value for name, value in state.items()
            }
        return master


SUMS_SHARE = 0.25
"""Offloading leaves the float32 sums of gradients on the GPU if they need at most this share of its memory."""


def sums_fit(parameters: int, memory: float) -> bool:
    """Return whether the gradients of an offloaded optimizer can be summed on a GPU with ``memory`` bytes.

    Otherwise every gradient of every pass moves to CPU memory and is added there, which gives the same sums and takes longer.
    """
    return torch.float32.itemsize * parameters <= SUMS_SHARE * memory


def added_gradient(total: Tensor | None, live: Tensor, device: torch.device | None = None) -> Tensor:
    """Return the float32 sum of ``total`` and a parameter's gradient, which is freed.

    Args:
        total: the sum of earlier passes, updated in place; None before the first one.
        live: the parameter.
        device: of the sum; by default that of the parameter.
    """
    gradient = live.grad
    assert gradient is not None
    live.grad = None
    if total is None:
        gradient = gradient.float()
    if device not in (None, gradient.device):
        gradient = in_pinned_memory(gradient)
        wait_for_copies(live.device)
    if total is None:
        return gradient
    total += gradient
    return total


def in_pinned_memory(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a copy in CPU memory that a GPU reads and writes by itself; see :func:`wait_for_copies`.

    torch keeps freed pinned memory for the next copies, so only the first optimizer step allocates it.
    """
    copied = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, pin_memory=torch.cuda.is_available())
    return copied.copy_(tensor, non_blocking=True)


def wait_for_copies(device: torch.device) -> None:
    """Wait until copies from a GPU to CPU memory are complete."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
