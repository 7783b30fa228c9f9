"""PPO's critic: a second model, as large as the policy, that estimates the value of each token's context."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reinforcepp.algorithm.critic import value_loss
from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.models.logprobs import response_states
from reinforcepp.models.lora import with_adapter
from reinforcepp.training.batches import UpdateBatch
from reinforcepp.training.learner import Learner
from reinforcepp.training.passes import Passes, row_index
from reinforcepp.types import Completion, RolloutBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Critic(Learner):
    """The policy's layers with one output instead of the vocabulary; its head starts at 0, so the first values are 0."""

    def __init__(self, policy: PreTrainedModel, ranks: Ranks, config: ReinforceConfig, *, steps: int) -> None:
        model = copy.deepcopy(policy)
        width = model.get_output_embeddings().weight.shape[1]
        model.set_output_embeddings(nn.Linear(width, 1, bias=False))
        model.config.tie_word_embeddings = False
        nn.init.zeros_(model.get_output_embeddings().weight)
        if config.use_peft:
            model = with_adapter(model, config, seed=config.seed, heads=[model.get_output_embeddings()])
        rate = config.critic_learning_rate or config.peak_learning_rate
        self._value_clip = config.value_clip
        super().__init__(model, ranks, config, learning_rate=rate, steps=steps)

    def batch_values(self, batch: RolloutBatch, passes: Passes, pad_id: int) -> Tensor:
        """Return the value before each token of a batch. -> (B, T)"""
        values_BT = torch.zeros_like(batch.mask_BT)

        def evaluate(rows: list[int]) -> None:
            values_RT = self.values(batch.completions, rows, values_BT.shape[1], pad_id, packed=passes.packed)
            values_BT[row_index(rows, values_BT)] = values_RT

        passes.score(batch.completions, evaluate)
        return values_BT

    def accumulate(
        self,
        batch: UpdateBatch,
        rows: list[int],
        tokens: Tensor | float,
        pad_id: int,
        weight: float,
        *,
        last: bool,
        packed: bool = False,
    ) -> Tensor:
        """Accumulate the gradients of :meth:`loss` times ``weight``; return the loss. See :meth:`learning` for ``last``."""
        with self.learning(last=last):
            loss = self.loss(batch, rows, tokens, pad_id, packed=packed)
            self.backward(loss * weight)
        return loss.detach()

    def loss(
        self, batch: UpdateBatch, rows: list[int], tokens: Tensor | float, pad_id: int, *, packed: bool = False
    ) -> Tensor:
        """Return a micro-batch's share of the value loss, a mean over ``tokens``."""
        assert batch.values_BT is not None
        rows_B = row_index(rows, batch.values_BT)
        return value_loss(
            self.values(batch.rollout.completions, rows, batch.values_BT.shape[1], pad_id, packed=packed),
            batch.values_BT[rows_B],
            batch.returns_BT[rows_B],
            batch.rollout.mask_BT[rows_B],
            clip=self._value_clip,
            denominator=tokens,
        )

    def values(
        self, completions: Sequence[Completion], rows: Sequence[int], width: int, pad_id: int, *, packed: bool = False
    ) -> Tensor:
        """Return the value before each response token, padded to ``width`` columns. -> (rows, width)"""
        model = self.model if torch.is_grad_enabled() else self.scoring
        prompts, responses = [completions[i].prompt.ids for i in rows], [completions[i].ids for i in rows]
        values_N1, tokens = response_states(model, prompts, responses, pad_id=pad_id, padding_free=packed)
        return tokens.by_row(values_N1.squeeze(-1).float(), width)
