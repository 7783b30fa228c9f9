"""The completions of each training step: by the policy as it is, or, with ``staleness``, ahead of time by an earlier one.

Ahead of time, a thread generates beside the update. What decides the result is the same at each run: the completions of
step n come from the weights after step n - ``staleness`` (from the first ones at the beginning), however long anything takes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.files import write_json
from reinforcepp.models.lora import load_trainable_weights, trainable_weights
from reinforcepp.rollout.engine import RolloutEngine, request_seed
from reinforcepp.rollout.serialization import as_rows, from_rows
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.rollout.weight_sync_check import check_sync
from reinforcepp.training.batches import micro_batches
from reinforcepp.training.policy_update import PolicyUpdate
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reinforcepp.training.checkpoint import Checkpoint

AHEAD = "ahead.json"


@dataclass(frozen=True)
class Sampled:
    """Completions of a step, by the policy as it was after ``version`` steps."""

    completions: list[Completion]
    version: int


class Sampler:
    """Has the prompts of each step answered.

    Args:
        config: the run's settings.
        engine: that generates.
        update: whose policy is sampled, and how it scores.
        tokenizer: the policy's.
        prompts_of: the prompts of a step, those of all ranks.
        steps: of the run.
    """

    def __init__(
        self,
        config: ReinforceConfig,
        engine: RolloutEngine,
        update: PolicyUpdate,
        tokenizer: PreTrainedTokenizerBase,
        prompts_of: Callable[[int], list[Prompt]],
        steps: int,
    ) -> None:
        self.config = config
        self.engine = engine
        self.update = update
        self.tokenizer = tokenizer
        self.prompts_of = prompts_of
        self._policy: PreTrainedModel = update.policy.plain
        self._ranks: Ranks = update.ranks
        self._steps = steps
        self._checked = False
        self._copies = [copy_to_sample(self._policy) for _ in range(config.staleness)]
        self._thread = ThreadPoolExecutor(1, "rollout")
        self._jobs: dict[int, Future[Sampled]] = {}

    def at(self, step: int) -> Sampled:
        """This rank's completions of a step, counted from 0, which is the next to be trained on."""
        ahead = self.config.staleness
        if not ahead:
            return Sampled(self._generate(self.engine, self._own_prompts(step), step), step)
        for own in range(step, step + ahead):  # all but the first time they are under way
            self._begin(own, step)
        sampled = self._jobs[step].result()
        self._jobs = {own: job for own, job in self._jobs.items() if own >= step}
        self._begin(step + ahead, step)
        return sampled

    def sampling(self, step: int) -> Sampling:
        """How completions of a step are drawn."""
        config = self.config
        return Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            num_samples=config.num_generations,
            seed=request_seed(config.seed, step, 0),
        )

    def staleness(self, step: int) -> dict[str, float]:
        """How many steps older than the policy the weights were that sampled for ``step``, under its name as a metric."""
        job = self._jobs.get(step)
        return {"staleness": float(step - job.result().version)} if job is not None else {}

    def updated(self, step: int) -> None:
        """The policy has been trained: the engine is given its weights, unless it has work with earlier ones."""
        if not self.config.staleness:
            self._hand_over(self._policy, step)

    def hold_present(self) -> None:
        """Have the engine generate with the policy's present weights, for what isn't a step's rollout."""
        if self.config.staleness:
            wait(self._jobs.values())
            self.engine.load_weights(self._policy)

    def close(self) -> None:
        """End what is under way, and forget what was sampled."""
        self._thread.shutdown(cancel_futures=True)
        self._thread, self._jobs = ThreadPoolExecutor(1, "rollout"), {}

    # --- in checkpoints ---

    def waiting(self, step: int) -> dict[int, Sampled]:
        """What is sampled for ``step`` and those that follow, on all ranks; all of them have to ask."""
        under_way = {at: job for at, job in self._jobs.items() if at >= step}
        own = {at: job.result() for at, job in under_way.items() if job.exception() is None}  # each is waited for
        told = self._ranks.gather(own)
        return {
            at: Sampled([c for part in told for c in part[at].completions], sampled.version)
            for at, sampled in own.items()
            if all(at in part for part in told)
        }

    def restore(self, saved: Checkpoint) -> None:
        """Go on with what :func:`write_ahead` wrote into a checkpoint, and nothing else."""
        wait(self._jobs.values())
        self._jobs = {}
        for step, sampled in read_ahead(saved.folder, self.prompts_of).items() if self.config.staleness else ():
            own = {prompt.key for prompt in self._own_prompts(step)}
            kept = [c for c in sampled.completions if c.prompt.key in own]
            self._jobs[step] = Future()
            self._jobs[step].set_result(replace(sampled, completions=kept))

    # --- inside ---

    def _own_prompts(self, step: int) -> list[Prompt]:
        return self._ranks.local_slice(self.prompts_of(step))

    def _begin(self, step: int, version: int) -> None:
        """Have ``step`` sampled by the policy as it is after ``version`` steps, if it isn't yet."""
        if step in self._jobs or step >= self._steps:
            return
        held = self._copies[step % len(self._copies)]  # the step that had it is through
        load_trainable_weights(held, trainable_weights(self._policy))
        self._jobs[step] = self._thread.submit(self._ahead, held, self._own_prompts(step), step, version)

    def _ahead(self, held: PreTrainedModel, prompts: Sequence[Prompt], step: int, version: int) -> Sampled:
        """In the thread: completions by the weights in ``held``, scored by these, which nobody has any more later."""
        engine = self.engine
        if isinstance(engine, TransformersEngine):
            engine = TransformersEngine(held, self.tokenizer, engine.batch_size)
        else:
            self._hand_over(held, version)
        return Sampled(self._scored(held, self._generate(engine, prompts, step)), version)

    def _generate(self, engine: RolloutEngine, prompts: Sequence[Prompt], step: int) -> list[Completion]:
        return engine.generate(prompts, self.sampling(step))  # without any, too: all processes may share the engine

    def _hand_over(self, model: PreTrainedModel, step: int) -> None:
        """Hand weights to the engine; the first time and now and then, prove that it has them."""
        self.engine.load_weights(model)
        due = step % self.config.sync_check_every == 0 or not self._checked
        if due and not self.engine.shares_trainer_forward:
            check_sync(self.engine, model, self.tokenizer)
        self._checked = True

    @torch.no_grad()
    def _scored(self, held: PreTrainedModel, completions: list[Completion]) -> list[Completion]:
        width = max((len(c.ids) for c in completions), default=0)
        scored = list(completions)
        for rows in micro_batches(completions, range(len(completions)), self.update.micro_batch_size):
            logprobs_BT, entropy_BT, _ = self.update.logprobs(held, completions, rows, width)
            for row, logprobs, entropy in zip(rows, logprobs_BT.tolist(), entropy_BT.tolist(), strict=True):
                real = slice(len(completions[row].ids))
                scored[row] = replace(
                    completions[row], old_logprobs=tuple(logprobs[real]), entropy=tuple(entropy[real])
                )
        return scored


def copy_to_sample(policy: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that can be generated with while the model learns; weights that don't learn are shared."""
    shared = {id(weight): weight for weight in policy.parameters() if not weight.requires_grad}
    return copy.deepcopy(policy, shared).requires_grad_(False)


def write_ahead(sampled: Mapping[int, Sampled], folder: Path) -> None:
    """Write what was sampled ahead of time into a checkpoint."""
    told = {step: {"version": own.version, "completions": as_rows(own.completions)} for step, own in sampled.items()}
    write_json(folder / AHEAD, told)


def read_ahead(folder: Path, prompts_of: Callable[[int], list[Prompt]]) -> dict[int, Sampled]:
    """What :func:`write_ahead` wrote, if anything."""
    if not (folder / AHEAD).is_file():
        return {}
    told = json.loads((folder / AHEAD).read_text(encoding="utf-8"))
    return {
        int(step): Sampled(from_rows(own["completions"], prompts_of(int(step))), own["version"])
        for step, own in told.items()
    }
