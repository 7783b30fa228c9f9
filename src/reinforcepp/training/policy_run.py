"""A policy training's folder and state: what its checkpoints hold, and how they bring it back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from reinforcepp.algorithm.kl import next_kl_coef
from reinforcepp.errors import TrainingDiverged
from reinforcepp.models.loading import load_policy, save_model, weights_hash
from reinforcepp.models.lora import has_adapter, load_adapter_weights
from reinforcepp.models.precision import compute_dtype
from reinforcepp.models.tokenization import LazyPrompts
from reinforcepp.monitoring import MetricLog, note_event, restore_logs
from reinforcepp.monitoring.completion_log import COMPLETIONS, restore_answers, save_answers, step_file
from reinforcepp.monitoring.step_metrics import rollout_columns
from reinforcepp.rewards.sources import RewardSum
from reinforcepp.training import checkpoint
from reinforcepp.training import rng as random_state
from reinforcepp.training.learner import Learner
from reinforcepp.training.policy_update import PolicyUpdate
from reinforcepp.training.rollout_scheduler import Sampler, write_ahead
from reinforcepp.training.run_state import RunState, better
from reinforcepp.training.update_batch import BatchInUse
from reinforcepp.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WITNESSES = 100


class PolicyRun:
    """Everything that decides what the run does next, apart from its settings.

    Args:
        folder: where it writes.
        update: holds the settings, the learners, the guardrails and the KL coefficient in force.
        sampler: may hold completions of the next steps.
        tokenizer: saved with the policy.
        inputs: fingerprints of what the run starts from.
    """

    def __init__(
        self,
        folder: Path,
        update: PolicyUpdate,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self.config = update.config
        self.update = update
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.inputs = inputs
        self.state = RunState()
        self.log = MetricLog()
        self.work: BatchInUse | None = None
        """The batch of the unfinished step."""

    @property
    def learners(self) -> dict[str, Learner]:
        """The policy, and the critic if there is one."""
        critic = self.update.critic
        return {"policy": self.update.policy} | ({"critic": critic} if critic is not None else {})

    def finish_step(
        self, metrics: dict[str, float], timings: dict[str, float]
    ) -> tuple[dict[str, float], dict[str, float], BatchInUse | None]:
        """Write down a step's answers and figures, adapt the KL coefficient to them, and give them back, with the batch."""
        work, self.work = self.work, None
        self.state.num_tokens += metrics.get("num_tokens", 0.0)
        metrics["num_tokens"] = self.state.num_tokens
        target = self.config.kl_target
        if target is not None and "kl" in metrics:
            metrics["kl_coef"] = self.update.kl_coef
            self.update.kl_coef = next_kl_coef(
                self.update.kl_coef,
                metrics["kl"],
                target=target,
                completions=self.config.completions_per_step,
                horizon=self.config.kl_horizon,
            )
        if not self.update.ranks.is_main:
            return metrics, timings, work
        if self.config.log_completions and work is not None and "reward" in metrics:
            step = int(metrics["step"])
            save_answers(self.folder / COMPLETIONS / step_file(step), rollout_columns(work.batch, work.scores, step))
        self.log.write({**metrics, **timings})
        return metrics, timings, work

    def save(self, metrics: Mapping[str, float] | None = None) -> None:
        """Write a checkpoint; ``metrics`` are those of the step just made, None where a step is unfinished.

        Every rank has to call it, and goes on when it is written.
        """
        state, work = self.state, self.work
        updates = len(work.history) if work is not None else 0
        if metrics is not None:
            state.best = better(state.best, self.config.keep_best, metrics, checkpoint.name_of(state.step))
        if updates:  # else the step is begun, or begun again, with the random numbers it had
            state.random = random_state.capture()
        state.guard, state.kl_coef = self.update.guard.as_dict(), self.update.kl_coef
        held = checkpoint.described(self.config, self.inputs) | {"run": asdict(state)}
        learnt = {name: learner.state() for name, learner in self.learners.items()}
        waiting = self.sampler.waiting(state.step)
        if self.update.ranks.sharded:
            try:
                checkpoint.write_parts(self.folder, learnt, self.update.ranks)
            except OSError as error:
                checkpoint.tell_full_disk(error, self.folder, state.step)
                return

        def fill(folder: Path) -> None:
            held["learners"] = checkpoint.fill_with(learnt, folder)
            save_model(self.update.policy.plain, self.tokenizer, folder)
            if work is not None and updates:
                work.save(folder)
            if waiting:
                write_ahead(waiting, folder)

        keep = state.best["checkpoint"] if state.best else None
        if self.update.ranks.is_main:
            checkpoint.save(self.folder, (state.step, updates), held, fill, keep_last=self.config.keep_last, keep=keep)
        self.update.ranks.barrier()

    def restore(self, saved: checkpoint.Checkpoint, *, log: bool = True) -> None:
        """Bring weights, counters, random generators and, unless told otherwise, the log where they were."""
        checkpoint.load_into(self.learners, saved, self._policy_weights(saved.folder))
        vars(self.state).update(saved.state["run"])
        self.update.guard.load(self.state.guard)
        self.update.kl_coef = self.state.kl_coef
        self.sampler.restore(saved)
        self.work = BatchInUse.load(saved, self.sampler.prompts_of(self.state.step), self.update.ranks.device)
        random_state.restore(self.state.random)
        if log and self.update.ranks.is_main:
            self.log.close()
            restore_logs(saved.folder, self.folder)
            self.log.open(self.folder)
            restore_answers(saved.folder.parent.parent, self.folder, saved.step)

    def _policy_weights(self, folder: Path) -> dict[str, Tensor]:
        """What a checkpoint holds of the policy."""
        if has_adapter(self.update.policy.plain):
            return load_adapter_weights(folder)
        return dict(load_policy(str(folder), compute_dtype(self.config)).state_dict())

    def roll_back(self, told: str) -> None:
        """To the last checkpoint, and on from there with smaller steps."""
        saved = checkpoint.newest(self.folder)
        if saved is None:
            raise TrainingDiverged(f"{told}, and there is no checkpoint to go back to.")
        guard = self.update.guard
        often = guard.state.rollbacks
        self.restore(saved)
        for learner in self.learners.values():
            learner.scale_rate(0.5 ** (often - guard.state.rollbacks))
        guard.state.rollbacks = often
        note_event(self.folder, f"{told}: back to step {self.state.step}, and on at half the learning rate.")

    def to_last_good(self) -> str:
        """Restore the last checkpoint for whoever goes on using the trainer; returns what the user should know."""
        saved = checkpoint.newest(self.folder)
        if saved is None:
            return "No checkpoint was saved before: start again, with --overwrite."
        self.restore(saved, log=False)
        return (
            f"The last good state is {saved.folder}: go on from it with --resume and other settings, named with "
            "--allow_changes."
        )


def fingerprints(model: PreTrainedModel, parts: Sequence[Sequence[Prompt]], rewards: RewardSum) -> dict[str, str]:
    """What a run starts from, each in one word, by the name of its setting; ``parts`` are its prompts.

    Of prompts on the disk that is a hash of their texts, and the tokens of some.
    """
    on_disk = [prompts for prompts in parts if isinstance(prompts, LazyPrompts)]
    seen = chain.from_iterable(p[:WITNESSES] if isinstance(p, LazyPrompts) else p for p in parts)
    texts = json.dumps([*((prompt.text, prompt.ids) for prompt in seen), *(prompts.digest for prompts in on_disk)])
    return {
        "model": weights_hash(model),
        "data": hashlib.sha256(texts.encode()).hexdigest()[:16],
        "reward_model": rewards.fingerprint(),
    }
