"""A reference policy that follows the policy (TR-DPO, Gorbatovski et al., 2024), as TRL's ``sync_ref_model``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reinforcepp.config import ReinforceConfig
from reinforcepp.errors import ConfigError
from reinforcepp.models.lora import has_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MovingReference:
    """Updates the reference policy: reference = alpha * policy + (1 - alpha) * reference.

    TRL counts optimizer steps. An update that is due in the middle of a training step follows at its end, because all of a
    rollout batch is scored by one reference.

    Args:
        reference: changed in place.
        policy: with the current weights.
        config: the settings.
    """

    def __init__(self, reference: PreTrainedModel, policy: PreTrainedModel, config: ReinforceConfig) -> None:
        if has_adapter(policy):
            raise ConfigError(
                "sync_ref_model: the given model has an adapter, which is disabled for the reference policy. Omit "
                "sync_ref_model, or train all weights."
            )
        self._pairs = {
            name: (old, new)
            for (name, old), new in zip(reference.named_parameters(), policy.parameters(), strict=True)
            if old is not new  # frozen weights are shared
        }
        self._alpha, self._every = config.ref_model_mixup_alpha, config.ref_model_sync_steps
        self._updates = config.updates_per_step

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Update the reference if that is due after ``step`` training steps."""
        if step * self._updates // self._every == (step - 1) * self._updates // self._every:
            return
        for old, new in self._pairs.values():
            old.mul_(1 - self._alpha).add_(new, alpha=self._alpha)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the reference's weights in CPU memory."""
        return {name: old.detach().cpu().clone() for name, (old, _) in self._pairs.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the weights that :meth:`state` returned."""
        for name, (old, _) in self._pairs.items():
            old.copy_(state[name])
