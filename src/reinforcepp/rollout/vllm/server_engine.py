"""The rollout engine for ``vllm serve``: one server or several, which the user starts and can stop at any time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reinforcepp.rollout.pooled_engine import PooledEngine
from reinforcepp.rollout.vllm.client import ServerRequirements, Timeouts
from reinforcepp.rollout.vllm.server_pool import ServerPool
from reinforcepp.rollout.weight_sync_check import NEW_TOKENS, PROBE_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class VllmServerEngine(PooledEngine):
    """Generation by vLLM servers; see :class:`~reinforcepp.rollout.engine.RolloutEngine`.

    Args:
        addresses: The servers' addresses, ``http://host:port``.
        model: The policy, whose weights the servers get.
        tokenizer: Its tokenizer.
        max_length: Tokens of prompt and completion together.
        batch_size: Completions that each server generates at a time.
        folder: A folder that the servers see under the same path.
        timeouts: Timeouts for each server.

    Raises:
        RolloutError: No server can be reached, or one can't be used for this training.
    """

    name = "vllm"
    pool: ServerPool

    def __init__(
        self,
        addresses: Sequence[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_size: int = 64,
        folder: Path,
        timeouts: Timeouts | None = None,
    ) -> None:
        super().__init__(model, tokenizer, batch_size)
        longest = max(max_length, PROBE_TOKENS + NEW_TOKENS)  # the prompts of the weight-sync check must fit too
        requirements = ServerRequirements(
            model=model.config.name_or_path or "MODEL",
            max_length=min(longest, self.context or longest),
            vocab_size=model.get_input_embeddings().num_embeddings,
            eos_ids=self.eos_ids,
        )
        self.pool = ServerPool(addresses, requirements, tokenizer, batch_size, folder, timeouts or Timeouts())
        try:
            self.pool.load(model)
        except BaseException:
            self.pool.close()
            raise

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype of the servers."""
        dtypes = [client.info.dtype for client in self.pool.clients if client.info is not None]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def load_weights(self, model: PreTrainedModel) -> None:
        """Give ``model``'s weights to all servers that respond; the others get them when they are back."""
        self.pool.load(model)
