"""One remote engine for all data-parallel ranks: rank 0 owns it and passes prompts and completions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from reinforcepp.distributed.rank_zero import RankZero
from reinforcepp.models.loading import eos_token_ids
from reinforcepp.rollout.engine import RolloutEngine, partial_completions
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SharedEngine:
    """The engine of rank 0, for all ranks; see :class:`~reinforcepp.rollout.engine.RolloutEngine`.

    All ranks call its methods in the same order, also if they have no prompts.

    Args:
        rank_zero: Runs work on rank 0 for all ranks.
        start: Returns the engine; called on rank 0.
        model: The policy, with the same weights on all ranks.
        tokenizer: Its tokenizer.

    Raises:
        ReinforceError: On all ranks, the error of ``start``.
    """

    shares_trainer_forward = False

    def __init__(
        self,
        rank_zero: RankZero,
        start: Callable[[], RolloutEngine],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._rank_zero, self._tokenizer, self._eos_ids = rank_zero, tokenizer, eos_token_ids(model, tokenizer)
        self.local: Any = None
        """The engine on rank 0; None on other ranks."""

        def start_local() -> tuple[str, Any]:
            self.local = start()
            return self.local.name, self.local.dtype

        self.name, self.dtype = rank_zero.run(start_local)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Return the completions of this rank's ``prompts``."""

        def generate_for_all(prompts_per_rank: Sequence[Sequence[Prompt]]) -> list[list[Completion]]:
            everything = [prompt for rank_prompts in prompts_per_rank for prompt in rank_prompts]
            completions = iter(self.local.generate(everything, sampling))
            return [
                list(islice(completions, len(rank_prompts) * sampling.num_samples)) for rank_prompts in prompts_per_rank
            ]

        return self._rank_zero.map(list(prompts), generate_for_all)

    def generate_everywhere(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Return every worker's or server's completions of rank 0's ``prompts``."""
        completions: list[Completion] = self._rank_zero.run(lambda: self.local.generate_everywhere(prompts, sampling))
        return completions

    def any_rank(self, active: bool) -> bool:
        """Return whether ``active`` is true on any rank, so that all ranks call :meth:`generate` equally often."""
        return self._rank_zero.map(active, lambda flags: [any(flags)] * len(flags))

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """Yield the growing completion of ``prompt``; nothing arrives before its end."""
        (completion,) = self.generate([prompt], sampling)
        yield from partial_completions(self._tokenizer, self._eos_ids, completion)

    def load_weights(self, model: PreTrainedModel) -> None:
        """Generate with rank 0's ``model``."""

        def load() -> Any:
            self.local.load_weights(model)
            return self.local.dtype  # it can change when servers come and go

        self.dtype = self._rank_zero.run(load)

    def close(self) -> None:
        """Close the engine on rank 0, without waiting for the other ranks."""
        if self.local is not None:
            self.local.close()
