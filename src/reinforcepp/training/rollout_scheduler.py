"""Generate the completions of each step, and give the engine the policy's new weights afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import RolloutError
from reinforcepp.monitoring import echo
from reinforcepp.rollout.engine import RolloutEngine, request_seed
from reinforcepp.rollout.self_check import check_samples
from reinforcepp.rollout.weight_sync_check import check_sync
from reinforcepp.training.batches import PromptBatches
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(eq=False)
class RolloutScheduler:
    """Owns the rollout engine; generates with the policy's current weights.

    Attributes:
        config: the run's settings.
        engine: generates the completions.
        policy: the model whose weights the engine gets.
        tokenizer: the policy's tokenizer.
        batches: the prompts of each step.
        ranks: each rank generates for its share of the prompts.
        fallback: starts the engine that replaces one whose samples don't match the model; None if the user chose the engine.
    """

    config: ReinforceConfig
    engine: RolloutEngine
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batches: PromptBatches
    ranks: Ranks
    fallback: Callable[[], RolloutEngine] | None = None
    _checked: bool = field(default=False, init=False)
    _samples_checked: bool = field(default=False, init=False)

    def next(self, step: int) -> list[Completion]:
        """Return this rank's completions of a step; steps count from 0."""
        return self.ranks.run_or_raise_all(lambda: self.generate(self._local_prompts(step), self.sampling(step)))

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, model: PreTrainedModel | None = None
    ) -> list[Completion]:
        """Return completions of ``prompts``; those of the first batch are checked.

        Args:
            prompts: this rank's prompts. A rank without prompts calls the engine too, because all ranks can share it.
            sampling: the sampling parameters.
            model: the model whose weights the engine has, by default the policy.

        Raises:
            RolloutError: the engine's samples don't match the model, and the user chose this engine.
        """
        model = self.policy if model is None else model
        try:
            completions = self._engine_for(model).generate(prompts, sampling)
            if not self._samples_checked and completions:
                check_samples(self.engine, model, completions, sampling)
                self._samples_checked = True
        except RolloutError as error:
            if self._samples_checked or self.fallback is None:
                raise
            self.engine.close()
            self.engine, self.fallback = self.fallback(), None
            echo(f"Completions come from {self.engine.name}: {error}", "yellow")
            return self.generate(prompts, sampling, model)
        return completions

    def sync(self, step: int) -> None:
        """Give the engine the weights that the policy has after ``step``."""
        self._load_weights(self.policy, step)

    def staleness(self, step: int) -> dict[str, float]:
        """Return the metric ``staleness`` of a step: the age of the weights that sampled it, in steps."""
        return {}

    def sampling(self, step: int) -> Sampling:
        """Return the sampling parameters of a step."""
        config = self.config
        return Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            num_samples=config.num_generations,
            seed=request_seed(config.seed, step, 0),
        )

    def use_current_weights(self) -> None:
        """Make the engine generate with the policy's current weights, for an evaluation."""

    def close(self) -> None:
        """Stop pending work."""

    def pending(self, step: int) -> dict[str, object]:
        """Return the completions already generated for ``step`` and later, as JSON; every rank must call this."""
        return {}

    def restore(self, checkpoint: Path) -> None:
        """Resume with the completions that a checkpoint holds."""

    def _local_prompts(self, step: int) -> list[Prompt]:
        return self.ranks.local_slice(self.batches.at(step))

    def _engine_for(self, model: PreTrainedModel) -> RolloutEngine:
        """Return the engine that has the weights of ``model``."""
        return self.engine

    def _load_weights(self, model: PreTrainedModel, step: int) -> None:
        """Load weights into the engine; check the first time, and at intervals, that it generates with them."""
        self.engine.load_weights(model)
        due = step % self.config.sync_check_every == 0 or not self._checked
        if due and not self.engine.shares_trainer_forward:
            check_sync(self.engine, model, self.tokenizer)
        self._checked = True
