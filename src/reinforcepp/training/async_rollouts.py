"""Asynchronous rollouts: a thread generates the completions of later steps while the policy is updated.

The result doesn't depend on timing: the completions of step n always come from the weights after step n - ``staleness``, at
the beginning from the initial weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reinforcepp.config import ReinforceConfig
from reinforcepp.environments.episodes import EpisodeRunner
from reinforcepp.models.lora import frozen_copy, load_trainable_weights, trainable_weights
from reinforcepp.rewards.functions import drop_failed
from reinforcepp.rollout.checked_engine import CheckedEngine
from reinforcepp.rollout.engine import RolloutEngine, select_device
from reinforcepp.rollout.serialization import as_rows, from_rows
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.training.policy_update import PolicyUpdate
from reinforcepp.training.prompt_batches import PromptBatches
from reinforcepp.training.rollout_scheduler import RolloutScheduler
from reinforcepp.types import Completion, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PENDING_FILE = "ahead.json"


@dataclass(frozen=True)
class PendingRollout:
    """Completions of a step, sampled by the policy as it was after ``version`` steps."""

    completions: list[Completion]
    version: int


class AsyncRolloutScheduler(RolloutScheduler):
    """Generates ``staleness`` steps ahead, with copies of the policy's weights.

    Args:
        config: the run's settings.
        checked: generates the completions.
        update: owns the policy; scores completions under the weights that sampled them.
        batches: the prompts of each step.
        num_steps: steps of the run.
        episodes: runs the environments, if a completion is an episode.
    """

    def __init__(
        self,
        config: ReinforceConfig,
        checked: CheckedEngine,
        update: PolicyUpdate,
        batches: PromptBatches,
        num_steps: int,
        episodes: EpisodeRunner | None = None,
    ) -> None:
        super().__init__(config, checked, update.policy.plain, batches, update.ranks, episodes)
        self._update = update
        self._num_steps = num_steps
        self._copies = [frozen_copy(self.policy) for _ in range(config.staleness)]
        self._thread = self._new_thread()
        self._jobs: dict[int, Future[PendingRollout]] = {}

    def next(self, step: int, start: int = 0, count: int | None = None) -> list[Completion]:
        """Return this rank's completions of a step, and start generating those of a later step; there are no refills."""
        return self.ranks.run_or_raise_all(lambda: self._take(step))

    def _take(self, step: int) -> list[Completion]:
        ahead = self.config.staleness
        for later in range(step, step + ahead):  # under way already, except in the first step
            self._start(later, step)
        completions = self._jobs[step].result().completions
        self._jobs = {later: job for later, job in self._jobs.items() if later >= step}
        self._start(step + ahead, step)
        return completions

    def sync(self, step: int) -> None:
        """Do nothing: each rollout loads the weights that it samples from."""

    def staleness(self, step: int) -> dict[str, float]:
        """Return the metric ``staleness`` of a step: the age of the weights that sampled it, in steps."""
        job = self._jobs.get(step)
        return {"staleness": float(step - job.result().version)} if job is not None else {}

    def use_current_weights(self) -> None:
        """Wait for pending rollouts, then load the policy's current weights."""
        wait(self._jobs.values())
        self.checked.engine.load_weights(self.policy)

    def close(self) -> None:
        """Stop pending rollouts and drop their completions."""
        self._thread.shutdown(cancel_futures=True)
        self._thread, self._jobs = self._new_thread(), {}
        super().close()

    # --- checkpoints ---

    def pending(self, step: int) -> dict[str, object]:
        """Return the completions generated for ``step`` and later on all ranks, as JSON; every rank must call this."""
        jobs = {later: job for later, job in self._jobs.items() if later >= step}
        local = {later: job.result() for later, job in jobs.items() if job.exception() is None}  # waits for each job
        parts = self.ranks.gather(local)
        return {
            str(later): {
                "version": pending.version,
                "completions": as_rows([c for part in parts for c in part[later].completions]),
            }
            for later, pending in local.items()
            if all(later in part for part in parts)
        }

    def restore(self, checkpoint: Path) -> None:
        """Resume with the completions that a checkpoint holds, and no others."""
        wait(self._jobs.values())
        self._jobs = {}
        path = checkpoint / PENDING_FILE
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for step, rollout in ((int(name), rollout) for name, rollout in saved.items()):
            local = {prompt.key for prompt in self._local_prompts(step)}
            completions = from_rows(rollout["completions"], self.batches.at(step))
            kept = [c for c in completions if c.prompt.key in local]
            self._jobs[step] = Future()
            self._jobs[step].set_result(PendingRollout(kept, rollout["version"]))

    # --- inside ---

    def _new_thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "rollout", select_device, (self.ranks.device,))

    def _start(self, step: int, version: int) -> None:
        """Start sampling ``step`` with the policy as it is after ``version`` steps, unless it is under way."""
        if step in self._jobs or step >= self._num_steps:
            return
        model = self._copies[step % len(self._copies)]  # the step that used this copy is finished
        load_trainable_weights(model, trainable_weights(self.policy))
        self._jobs[step] = self._thread.submit(self._sample, model, self._local_prompts(step), step, version)

    def _sample(self, model: PreTrainedModel, prompts: Sequence[Prompt], step: int, version: int) -> PendingRollout:
        """In the thread: generate with ``model`` and score with it, because later no model has these weights."""
        if not isinstance(self.checked.engine, TransformersEngine):
            self._load_weights(model, version)
        completions = self.generate(prompts, self.sampling(step), model)
        return PendingRollout(self._with_logprobs(model, completions), version)

    def _engine_for(self, model: PreTrainedModel) -> RolloutEngine:
        """Return an engine that generates with ``model`` while the policy is updated."""
        return (
            self.checked.engine.with_model(model)
            if isinstance(self.checked.engine, TransformersEngine)
            else self.checked.engine
        )

    def _with_logprobs(self, model: PreTrainedModel, completions: list[Completion]) -> list[Completion]:
        completions, failed = drop_failed(completions)
        width = max((len(c.ids) for c in completions), default=0)
        scored = list(completions)

        def score(rows: list[int]) -> None:
            logprobs_BT, entropy_BT, _ = self._update.logprobs(model, completions, rows, width)
            for row, logprobs, entropy in zip(rows, logprobs_BT.tolist(), entropy_BT.tolist(), strict=True):
                tokens = slice(len(completions[row].ids))
                scored[row] = replace(
                    completions[row], old_logprobs=tuple(logprobs[tokens]), entropy=tuple(entropy[tokens])
                )

        self._update.passes.score(completions, score)
        return [*scored, *failed]
