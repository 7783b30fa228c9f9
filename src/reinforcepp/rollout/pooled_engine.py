"""The common part of the engines whose completions come from a pool of workers: Ray actors or vLLM servers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from reinforcepp.models.loading import context_length, eos_token_ids
from reinforcepp.rollout.dispatch import DispatchStats, WorkerPool, dispatch, dispatch_to_all
from reinforcepp.rollout.engine import check_prompts, partial_completions
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PromptPool(WorkerPool[Any, Prompt, list[Completion]], Protocol):
    """A worker pool whose items are prompts."""

    def begin(self, sampling: Sampling) -> None:
        """Set how the next prompts are sampled, and drop results of an interrupted call."""

    def close(self) -> None:
        """Release the workers."""


class PooledEngine:
    """Generation by a pool; see :class:`~reinforcepp.rollout.engine.RolloutEngine`.

    A completion depends on seed, prompt and sample index alone, so it doesn't matter which worker generates it.

    Args:
        model: The policy; only its configuration is used here.
        tokenizer: Its tokenizer.
        batch_size: Completions that a worker generates at a time.
    """

    shares_trainer_forward = False
    pool: PromptPool

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.context = context_length(model.config)
        self.eos_ids = eos_token_ids(model, tokenizer)
        self.dispatches: list[DispatchStats] = []
        """Statistics of every call of ``generate``."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Return ``sampling.num_samples`` completions per prompt; each prompt is processed once, even if workers are lost."""
        check_prompts(prompts, sampling, self.context)
        if not prompts:
            return []
        self.pool.begin(sampling)
        chunk_size = max(1, self.batch_size // sampling.num_samples)
        per_prompt, stats = dispatch(self.pool, prompts, chunk_size)
        self.dispatches.append(stats)
        return [completion for completions in per_prompt for completion in completions]

    def generate_everywhere(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Return every worker's completions of all ``prompts``, for a check that compares the workers with the trainer."""
        self.pool.begin(sampling)
        return [
            completion
            for per_prompt in dispatch_to_all(self.pool, prompts)
            for completions in per_prompt
            for completion in completions
        ]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """Yield the growing completion of ``prompt``; the workers return it whole, so nothing arrives before its end."""
        (completion,) = self.generate([prompt], sampling)
        yield from partial_completions(self.tokenizer, self.eos_ids, completion)

    def close(self) -> None:
        """Release the workers."""
        self.pool.close()
