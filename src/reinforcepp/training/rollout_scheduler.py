"""Generate the completions of each step, and give the engine the policy's new weights afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.environments.episodes import EpisodeRunner
from reinforcepp.rollout.checked_engine import CheckedEngine
from reinforcepp.rollout.engine import RolloutEngine, request_seed
from reinforcepp.training.prompt_batches import PromptBatches
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(eq=False)
class RolloutScheduler:
    """Owns the rollout engine; generates with the policy's current weights.

    Attributes:
        config: the run's settings.
        checked: generates the completions.
        policy: the model whose weights the engine gets.
        batches: the prompts of each step.
        ranks: each rank generates for its share of the prompts.
        episodes: runs the environments, if a completion is an episode.
    """

    config: ReinforceConfig
    checked: CheckedEngine
    policy: PreTrainedModel
    batches: PromptBatches
    ranks: Ranks
    episodes: EpisodeRunner | None = None

    def next(self, step: int, start: int = 0, count: int | None = None) -> list[Completion]:
        """Return this rank's completions of prompts of a step, see :meth:`PromptBatches.at`."""
        return self.ranks.run_or_raise_all(
            lambda: self.generate(self._local_prompts(step, start, count), self.sampling(step))
        )

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, model: PreTrainedModel | None = None
    ) -> list[Completion]:
        """Return completions by the weights of ``model``, which the engine has; by default the policy's.

        In an environment they are episodes, and those that failed have an error.
        """

        def complete(prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
            return self.checked.generate(prompts, sampling, self.policy if model is None else model, self._engine_for)

        if self.episodes is None:
            return complete(prompts, sampling)
        return self.episodes.run(prompts, sampling, complete, getattr(self.checked.engine, "any_rank", bool))

    def sync(self, step: int) -> None:
        """Give the engine the weights that the policy has after ``step``."""
        self._load_weights(self.policy, step)

    def staleness(self, step: int) -> dict[str, float]:
        """Return the metric ``staleness`` of a step: the age of the weights that sampled it, in steps."""
        return {}

    def sampling(self, step: int) -> Sampling:
        """Return the sampling parameters of a step."""
        config, seed = self.config, request_seed(self.config.seed, step, 0)
        return Sampling(
            config.max_new_tokens,
            config.temperature,
            config.top_p,
            config.top_k,
            config.repetition_penalty,
            num_samples=config.num_generations,
            seed=seed,
            min_p=config.min_p or 0.0,
            extra=config.engine_arguments,
        )

    def use_current_weights(self) -> None:
        """Make the engine generate with the policy's current weights, for an evaluation."""

    def close(self) -> None:
        """Stop pending work."""
        if self.episodes is not None:
            self.episodes.close()

    def pending(self, step: int) -> dict[str, object]:
        """Return the completions already generated for ``step`` and later, as JSON; every rank must call this."""
        return {}

    def restore(self, checkpoint: Path) -> None:
        """Resume with the completions that a checkpoint holds."""

    def _local_prompts(self, step: int, start: int = 0, count: int | None = None) -> list[Prompt]:
        return self.ranks.local_slice(self.batches.at(step, start, count))

    def _engine_for(self, model: PreTrainedModel) -> RolloutEngine:
        """Return the engine that has the weights of ``model``."""
        return self.checked.engine

    def _load_weights(self, model: PreTrainedModel, step: int) -> None:
        self.checked.load_weights(model, check=step % self.config.sync_check_every == 0)
