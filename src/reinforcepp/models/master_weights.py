"""Float32 master weights and the loss scale, for training in 16 bits.

An optimizer step is often smaller than the spacing of 16-bit numbers. So the optimizer updates float32 master weights, and
the model computes with rounded copies, as the rollout engine does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
    unless ``device`` is given: then all masters, gradients and moments are on that device, and the step runs there. Gradients
    of several backward passes are accumulated in float32: call ``collect`` after every pass to move them to the masters.

    Args:
        optimizer: of the model's parameters; from now on it updates their masters, and each of its steps is followed by
            ``publish``.
        dtype: that the parameters will be cast to.
        early: move each gradient as soon as it is computed, which saves memory; not for data-parallel training, which must
            reduce gradients over ranks first.
        device: of the masters (offloading); by default that of the parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype = torch.float32,
        *,
        early: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.model_parameters = self._of_optimizer()
        self.group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        if dtype != torch.float32 or device is not None:
            for group in optimizer.param_groups:
                group["params"] = [self._replaced(parameter, device) for parameter in group["params"]]
        self.masters = self._of_optimizer()
        optimizer.register_step_post_hook(lambda *_: self.publish())
        if self.has_separate_masters and early:
            for live, master in zip(self.model_parameters, self.masters, strict=True):
                live.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(move_gradient, master=master)
                )

    @property
    def has_separate_masters(self) -> bool:
        """Whether any master is a separate tensor."""
        return any(live is not master for live, master in zip(self.model_parameters, self.masters, strict=True))

    def use_shards(self) -> None:
        """Use the shards in the parameter groups as parameters and masters, after FSDP has replaced the parameters."""
        self.model_parameters = self.masters = self._of_optimizer()

    def collect(self) -> None:
        """Add the parameters' gradients to those of the masters and free them."""
        for live, master in zip(self.model_parameters, self.masters, strict=True):
            if live is not master:
                move_gradient(live, master)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the parameters, rounded to their dtype."""
        for live, master in zip(self.model_parameters, self.masters, strict=True):
            if live is not master:
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
        """Load the state from :meth:`state_dict`."""
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


def move_gradient(live: Tensor, master: Tensor) -> None:
    """Add a parameter's gradient to that of its master, on the master's device, and free it."""
    if live.grad is None:
        return
    gradient = live.grad.to(master.device)
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient
    live.grad = None
