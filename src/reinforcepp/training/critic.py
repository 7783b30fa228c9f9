"""PPO's critic: a second model, as large as the policy, that learns which value each token's context has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.models.logprobs import response_states
from reinforcepp.models.lora import with_adapter
from reinforcepp.training.learner import Learner
from reinforcepp.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Critic(Learner):
    """The policy's layers with one output instead of the vocabulary; it begins at 0, so the first values are 0."""

    def __init__(self, policy: PreTrainedModel, ranks: Ranks, config: ReinforceConfig, *, steps: int) -> None:
        model = copy.deepcopy(policy)
        width = model.get_output_embeddings().weight.shape[1]
        model.set_output_embeddings(nn.Linear(width, 1, bias=False))
        model.config.tie_word_embeddings = False
        nn.init.zeros_(model.get_output_embeddings().weight)
        if config.use_peft:
            model = with_adapter(model, config, seed=config.seed, head=model.get_output_embeddings())
        rate = config.critic_learning_rate or config.learning_rate
        super().__init__(model, ranks, config, learning_rate=rate, steps=steps)

    def values(self, completions: Sequence[Completion], rows: Sequence[int], width: int, pad_id: int) -> Tensor:
        """The value before each response token, padded to ``width`` columns. -> (rows, width)"""
        model = self.model if torch.is_grad_enabled() else self.scoring
        values_BT1, _, mask_BT = response_states(
            model, [completions[i].prompt.ids for i in rows], [completions[i].ids for i in rows], pad_id=pad_id
        )
        values_BT = torch.where(mask_BT, values_BT1.squeeze(-1).float(), 0.0)
        return nn.functional.pad(values_BT, (0, width - values_BT.shape[1]))
