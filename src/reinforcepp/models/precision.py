"""Computing in 16 bits while weights are learnt in float32.

A step of the optimiser is often smaller than the distance between two numbers of 16 bits, so the weights that are
learnt are kept in float32; the model computes with their rounded copies, as the rollout engine does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reinforcepp.config import ComputeConfig


def compute_dtype(config: ComputeConfig) -> torch.dtype:
    """What models compute in."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters; buffers stay, because rotary frequencies need their float32, and weights of 4 bits do, too."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


class LossScale:
    """Lifts losses so that gradients in float16 don't vanish, and lowers them again; with other types it is 1.

    After a gradient that isn't finite it falls to a quarter; after ``PATIENCE`` good ones in a row it is doubled.
    """

    START, PATIENCE = 2.0**13, 500

    def __init__(self, dtype: torch.dtype) -> None:
        self.narrow = dtype == torch.float16
        self.value = self.START if self.narrow else 1.0
        self.good = 0

    def lift(self, loss: Tensor) -> Tensor:
        """The loss that is to go backward."""
        return loss * self.value if self.narrow else loss

    def lower(self, parameters: Iterable[Tensor]) -> None:
        """Gradients of what :meth:`lift` gave become those of the loss."""
        for parameter in parameters if self.narrow else ():
            if parameter.grad is not None:
                parameter.grad /= self.value

    def adapt(self, norm: float) -> None:
        """To the norm of an update's gradients."""
        if not self.narrow:
            return
        self.good = self.good + 1 if math.isfinite(norm) else 0
        if self.good == 0:
            self.value = max(1.0, self.value / 4)
        elif self.good % self.PATIENCE == 0:
            self.value *= 2

    def state_dict(self) -> dict[str, float]:
        """What decides its next values."""
        return {"value": self.value, "good": self.good}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.value, self.good = state["value"], int(state["good"])


class MasterAdamW(torch.optim.AdamW):
    """AdamW, in one pass over memory, on float32 masters of parameters that are kept in a narrower type.

    Make it before ``cast_parameters``, so that the masters begin with all their digits. A parameter that is float32 is
    its own master, unless ``place`` is given: there all masters are kept, with their gradients and moments, and there
    the step is made. Gradients of several backward passes are added up in float32: ``collect`` moves them to the masters
    and is due after every pass. ``early`` moves each as soon as it is there, so that never all are held twice; not for
    data-parallel training, which first has to add them up over ranks.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        dtype: torch.dtype = torch.float32,
        *,
        early: bool = False,
        place: torch.device | None = None,
        **settings: Any,
    ) -> None:
        self.live = [p for p in parameters if p.requires_grad]
        apart = dtype != torch.float32 or place is not None
        self.masters = [_master(p, place) if apart else p for p in self.live]
        super().__init__(self.masters, fused=True, **settings)
        if apart and early:
            for live, master in zip(self.live, self.masters, strict=True):
                live.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(move_gradient, master=master)
                )

    @property
    def apart(self) -> bool:
        """Whether masters and parameters are two things."""
        return any(live is not master for live, master in zip(self.live, self.masters, strict=True))

    def take_over(self) -> None:
        """The parameters, all their own masters, have been exchanged for their shards in the optimiser's groups."""
        self.live = self.masters = [p for group in self.param_groups for p in group["params"]]

    def collect(self) -> None:
        """Add the parameters' gradients to their masters' and free them."""
        for live, master in zip(self.live, self.masters, strict=True):
            if live is not master:
                move_gradient(live, master)

    def step(self, closure: Any = None) -> Any:
        """Update the masters, then round them into the parameters."""
        result = super().step(closure)
        self.publish()
        return result

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters."""
        for live, master in zip(self.live, self.masters, strict=True):
            if live is not master:
                live.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Adam's state and the masters."""
        state: dict[str, Any] = super().state_dict()
        own = [(i, m) for i, (p, m) in enumerate(zip(self.live, self.masters, strict=True)) if p is not m]
        state["state"] = {i: dict(values) for i, values in state["state"].items()}
        for i, master in own:
            state["state"].setdefault(i, {})["master"] = master.detach()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        rest = {i: dict(values) for i, values in state_dict["state"].items()}
        for i, master in enumerate(self.masters):  # float32 parameters that were their own masters have none apart
            master.copy_(rest.get(i, {}).pop("master", self.live[i]))
        super().load_state_dict(state_dict | {"state": {i: values for i, values in rest.items() if values}})
        self.publish()


def _master(parameter: Tensor, place: torch.device | None) -> Tensor:
    return parameter.detach().to(place or parameter.device, torch.float32, copy=True).requires_grad_()


def move_gradient(live: Tensor, master: Tensor) -> None:
    """Add a parameter's gradient to that of its master, wherever that is, and free it."""
    if live.grad is None:
        return
    gradient = live.grad.to(master.device)
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient
    live.grad = None
