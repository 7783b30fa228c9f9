"""The engine of a training: each process has its own, or, where it is a pool or servers, the first one has it for all."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.rank_zero import RankZero
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.models.loading import eos_token_ids
from reinforcepp.rollout.engine import RolloutEngine, grown
from reinforcepp.rollout.factory import start_engine
from reinforcepp.rollout.selection import EngineChoice
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def start_for_all(
    choice: EngineChoice,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ReinforceConfig,
    ranks: Ranks,
    reserved: int,
    folder: Path,
) -> RolloutEngine:
    """The chosen engine with ``model``'s weights, as ``config`` says; all processes call this.

    Args:
        choice: which.
        model: whose weights it gets, the same in all processes.
        tokenizer: its tokenizer.
        config: the training's settings.
        ranks: the processes.
        reserved: GPUs or CPUs of a pool that are left to others.
        folder: where servers find the weights.
    """
    start = partial(
        start_engine,
        choice,
        model,
        tokenizer,
        max_length=config.max_prompt_length + config.max_new_tokens,
        batch_size=config.rollout_batch_size,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        workers=config.rollout_workers,
        reserved=reserved,
        folder=folder,
    )
    if choice.elsewhere and ranks.count > 1:
        return SharedEngine(RankZero(ranks, config.watchdog_seconds), start, model, tokenizer)
    return start()


class SharedEngine:
    """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; all processes call its methods alike, also without prompts.

    Args:
        first: the process that has the engine.
        start: gives the engine; called there.
        model: whose weights are handed over, the same in all processes.
        tokenizer: its tokenizer.

    Raises:
        ReinforceError: in all processes, what ``start`` raised.
    """

    shares_trainer_forward = False

    def __init__(
        self,
        first: RankZero,
        start: Callable[[], RolloutEngine],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._first, self._tokenizer, self._eos_ids = first, tokenizer, eos_token_ids(model, tokenizer)
        self.own: Any = None
        """There where the engine is."""

        def begin() -> tuple[str, Any]:
            self.own = start()
            return self.own.name, self.own.dtype

        self.name, self.dtype = first.run(begin)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""

        def answers(asked: Sequence[Sequence[Prompt]]) -> list[list[Completion]]:
            completions = iter(self.own.generate([prompt for own in asked for prompt in own], sampling))
            return [list(islice(completions, len(own) * sampling.num_samples)) for own in asked]

        return self._first.map(list(prompts), answers)

    def generate_everywhere(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """What each of the workers or servers answers to the first process's ``prompts``."""
        completions: list[Completion] = self._first.run(lambda: self.own.generate_everywhere(prompts, sampling))
        return completions

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; it comes when it is whole, and then bit by bit."""
        (whole,) = self.generate([prompt], sampling)
        yield from grown(self._tokenizer, self._eos_ids, whole)

    def load_weights(self, model: PreTrainedModel) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; they are those of the first process."""

        def load() -> Any:
            self.own.load_weights(model)
            return self.own.dtype  # servers that come and go differ

        self.dtype = self._first.run(load)

    def close(self) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; nobody waits for the others."""
        if self.own is not None:
            self.own.close()
