"""A model, its optimiser and its schedule, as the policy and a critic each have them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import get_scheduler

from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed import Ranks
from reinforcepp.errors import TrainingDiverged
from reinforcepp.precision import MasterAdamW, cast_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        model.eval().requires_grad_(True).to(ranks.device)
        dtype = compute_dtype(config)
        self._masters = MasterAdamW(
            model.parameters(),
            dtype,
            early=ranks.count == 1,
            lr=learning_rate,
            weight_decay=config.weight_decay,
        )
        cast_parameters(model, dtype)
        self._ranks = ranks
        self._max_grad_norm = config.max_grad_norm
        self.model, self.optimizer = ranks.prepare(model, self._masters)
        self.plain = ranks.unwrap(self.model)
        self.scheduler = get_scheduler(
            config.lr_scheduler_type,
            self._masters,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=steps,
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the loss."""
        self._ranks.backward(loss)
        self._masters.collect()

    def step(self, place: str) -> dict[str, float]:
        """Clip the gradients, update the weights; returns ``grad_norm`` and ``learning_rate``; errors name ``place``.

        Raises:
            TrainingDiverged: the gradient isn't finite; the weights are left as they are.
        """
        norm = self._ranks.clip_gradients(self._masters.masters, self._max_grad_norm)
        rate = self.scheduler.get_last_lr()[0]
        if not math.isfinite(norm):
            raise TrainingDiverged(
                f"The gradient of {place} is {norm}: the weights were left as they are. Lower learning_rate ({rate:g} now) "
                "and start again or resume from a checkpoint."
            )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return {"grad_norm": norm, "learning_rate": rate}

    def drop_gradients(self) -> None:
        """Forget what ``backward`` has gathered."""
        self.model.zero_grad()
        self.optimizer.zero_grad()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """State dicts of model, optimiser and schedule."""
        return self.plain.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()

    def load_state(self, model: dict[str, Tensor], optimizer: dict[str, Any], scheduler: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self.plain.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(scheduler)


def compute_dtype(config: ReinforceConfig) -> torch.dtype:
    """What models compute in."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
