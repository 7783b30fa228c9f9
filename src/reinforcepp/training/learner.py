"""A model, its optimiser and its schedule, as the policy and a critic each have them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError, TrainingDiverged
from reinforcepp.models.lora import base_model, has_adapter, is_4bit, load_trainable_weights, trainable_weights
from reinforcepp.models.precision import LossScale, MasterAdamW, cast_parameters, compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAIN_MEMORY = torch.device("cpu")
PROBES = 8
SURELY_SEEN = 1e-6
"""Steps of smaller learning rates may be less than float32's distance between two numbers near 1."""


class Learner:
    """Takes gradients and steps; weights are learnt in float32 whatever the model computes in.

    Args:
        model: trained in place, in evaluation mode throughout: dropout would make the policy ratio differ from 1.
        ranks: where it computes, and with whom.
        config: AdamW's settings, schedule and precision.
        learning_rate: its peak.
        steps: optimiser steps in the whole run.
    """

    def __init__(
        self, model: PreTrainedModel, ranks: Ranks, config: ReinforceConfig, *, learning_rate: float, steps: int
    ) -> None:
        if ranks.sharded and config.offload_optimizer:
            raise ConfigError(
                "offload_optimizer is for whole weights: leave it out where processes share them (FSDP2, DeepSpeed)."
            )
        model.eval()
        if not is_4bit(model):  # else it is there already, and may not be moved
            model.to(ranks.device)
        if not has_adapter(model):  # else the adapter alone is trained
            model.requires_grad_(True)
        dtype = compute_dtype(config)
        self.plain = model
        """All weights, in what the model computes in, for whatever doesn't learn; see :meth:`refresh`."""
        if ranks.sharded:
            model = copy.deepcopy(model)
        self._switches = switches(model, checkpointing=config.gradient_checkpointing)
        self._scale = LossScale(dtype)
        self._dtype = dtype
        self._masters = MasterAdamW(
            model.parameters(),
            torch.float32 if ranks.sharded else dtype,
            early=ranks.count == 1,
            place=MAIN_MEMORY if config.offload_optimizer and ranks.device != MAIN_MEMORY else None,
            lr=learning_rate,
            weight_decay=config.weight_decay,
        )
        self._ranks = ranks
        self._max_grad_norm = config.max_grad_norm
        if not ranks.sharded:  # parts begin with all digits
            cast_parameters(model, dtype)
        self.backend = ranks.prepare(model, self._masters, dtype, self.plain.parameters())
        cast_parameters(self.plain, dtype)
        self.model = self.backend.model
        if config.torch_compile:  # not the plain model: generation has ways of its own that a compiler doesn't know
            self.model = torch.compile(self.model)
        course = partial(share_of_peak, kind=config.lr_scheduler_type, warmup=config.warmup_steps, steps=steps)
        self.scheduler = LambdaLR(self._masters, course)

    @property
    def scoring(self) -> Any:
        """The model for passes that don't learn, of which other ranks may make more or fewer."""
        return self.model if self._ranks.count == 1 and not self._ranks.sharded else self.plain

    @contextmanager
    def learning(self, *, last: bool = True) -> Iterator[None]:
        """Around a forward pass and the backward pass that follows it, which may do the first again.

        Ranks add their gradients up in the ``last`` pass before an optimiser step. Masters take the gradients of every
        pass, so with them each pass is a last one.
        """
        for part in self._switches:
            part.training = True
        try:
            with nullcontext() if last or self._masters.apart else self.backend.no_sync():
                yield
        finally:
            for part in self._switches:
                part.training = False

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the loss."""
        self.backend.backward(self._scale.lift(loss))
        self._masters.collect()

    def clip(self) -> float:
        """Scale the gathered gradients down to ``max_grad_norm``; returns their norm before."""
        self._scale.lower(self._masters.masters)
        norm = self.backend.clip(self._max_grad_norm)
        self._scale.adapt(norm)
        return norm

    def step(self, norm: float) -> dict[str, float]:
        """Update the weights with gradients whose ``norm`` is known to be finite; returns it and the learning rate.

        Raises:
            TrainingDiverged: the weights did not change, though they should have.
        """
        rate = float(self.scheduler.get_last_lr()[0])
        probes = self._probes() if rate >= SURELY_SEEN and norm > 0 else []
        self.backend.step()
        if probes and all(torch.equal(self.backend.full_weight(weight), before) for weight, before in probes):
            raise TrainingDiverged(
                f"The optimiser step changed no weight, at learning rate {rate:g} and gradient norm {norm:.3g}: the optimiser "
                "holds other parameters than the model, or the gradients don't reach it."
            )
        self.scheduler.step()
        return {"grad_norm": norm, "learning_rate": rate}

    def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate, now and for the rest of the schedule."""
        self.scheduler.base_lrs = [rate * factor for rate in self.scheduler.base_lrs]
        self.scheduler._last_lr = [rate * factor for rate in self.scheduler.get_last_lr()]
        for group in self._masters.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor

    def drop_gradients(self) -> None:
        """Forget what ``backward`` has gathered."""
        self.backend.discard_gradients()

    def _probes(self) -> list[tuple[Tensor, Tensor]]:
        """Some of the smallest weights that have a gradient, each with a copy."""
        sizes = [p.numel() for p in self.plain.parameters() if p.requires_grad]
        small = [master for _, master in sorted(zip(sizes, self._masters.masters, strict=True), key=itemgetter(0))]
        moved = (p for p in small if (gradient := self.backend.full_gradient(p)) is not None and bool(gradient.any()))
        return [(p, self.backend.full_weight(p).detach().clone()) for p in islice(moved, PROBES)]

    @torch.no_grad()
    def refresh(self) -> None:
        """After optimiser steps, bring ``plain`` up to date where it is a copy: one weight at a time on every rank."""
        if self._ranks.sharded:
            for shard, copied in zip(self.backend.model.parameters(), self.plain.parameters(), strict=True):
                if copied.requires_grad:
                    copied.copy_(self.backend.full_weight(shard))

    @torch.no_grad()
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """State dicts of what is trained of the model, of optimiser and schedule; sharded, each rank's has its own parts."""
        course = {**self.scheduler.state_dict(), "loss_scale": self._scale.state_dict()}
        return trainable_weights(self.plain), self.backend.state_dict(masters=self._dtype != torch.float32), course

    def cut(self, index: int, shape: torch.Size) -> Tensor | None:
        """What an optimiser's tensor of the parameter ``index`` is to be cut like; None if it is whole."""
        master = self._masters.masters[index]
        return master if isinstance(master, DTensor) and master.shape == shape else None

    @torch.no_grad()
    def load_state(self, model: dict[str, Tensor], optimizer: dict[str, Any], scheduler: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave, also on another number of ranks."""
        load_trainable_weights(self.plain, model)
        self.backend.load_state(optimizer, self.plain.parameters())
        self._scale.load_state_dict(scheduler["loss_scale"])
        self.scheduler.load_state_dict({name: value for name, value in scheduler.items() if name != "loss_scale"})


def share_of_peak(step: int, *, kind: str, warmup: int, steps: int) -> float:
    """Return the factor on the peak learning rate at optimizer step ``step`` of ``steps``, counted from 0.

    step / warmup during the warmup; then, with t the finished share of the remaining steps, 1 (``constant``),
    1 - t (``linear``) or (1 + cos πt) / 2 (``cosine``).
    """
    if step < warmup:
        return step / warmup
    done = min((step - warmup) / max(1, steps - warmup), 1.0)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind]


def switches(model: PreTrainedModel, *, checkpointing: bool) -> list[nn.Module]:
    """The parts of ``model`` that do something else while learning, and whose own ``training`` says so.

    The model as a whole stays in evaluation mode, because its dropout would make the policy ratio differ from 1. Its
    layers look at their own flag to decide whether to keep their activations or to compute them again, and an adapter's
    dropout, where it is asked for, at its own.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    parts: list[nn.Module] = []
    if checkpointing:
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
        parts += [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
        if not parts:
            raise ConfigError(
                f"gradient_checkpointing: the layers of a {model.config.model_type} model can't be computed again; leave it out."
            )
    for part in model.modules():
        dropouts = [p for p in getattr(part, "lora_dropout", {}).values() if isinstance(p, nn.Dropout)]
        parts += [part, *dropouts] if dropouts else []
    return parts
