"""The files and state of a policy training: logs, checkpoints, resuming, rolling back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from reinforcepp.config import as_dict
from reinforcepp.data import EXTRA_FIELDS, StreamRows
from reinforcepp.errors import ConfigError, TrainingDiverged, option
from reinforcepp.files import write_json
from reinforcepp.locks import OutputLock
from reinforcepp.models.loading import load_policy, weights_hash
from reinforcepp.models.lora import has_adapter, load_adapter_weights, load_trainable_weights
from reinforcepp.models.precision import compute_dtype
from reinforcepp.models.saving import save_model
from reinforcepp.models.tokenization import LazyPrompts
from reinforcepp.monitoring import MetricLog, log_event, restore_logs
from reinforcepp.monitoring.completion_log import (
    COMPLETIONS,
    evaluation_file,
    message_fields,
    restore_completions,
    save_completions,
    step_file,
)
from reinforcepp.monitoring.run_record import RunRecord, read_run
from reinforcepp.monitoring.step_metrics import rollout_columns
from reinforcepp.rewards.sources import RewardSum
from reinforcepp.run_dir import RUN_FILE, check_output, claim_output, clear, describe_run, set_run_aside, write_finished
from reinforcepp.runtime.terminal import echo
from reinforcepp.training import checkpoint, rng
from reinforcepp.training.async_rollouts import PENDING_FILE
from reinforcepp.training.batches import UpdateBatch
from reinforcepp.training.callbacks import Callbacks
from reinforcepp.training.evaluation import Evaluation, logged_metrics
from reinforcepp.training.moving_reference import MovingReference
from reinforcepp.training.policy_update import PolicyUpdate
from reinforcepp.training.preflight import check_before_training
from reinforcepp.training.rollout_scheduler import RolloutScheduler
from reinforcepp.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reinforcepp.training.monitor import Monitor

STEP_SETTINGS = ("max_steps", "num_train_epochs")
"""Settings that a run resumed by ``train(resume_from_checkpoint=...)`` can change, as in transformers."""
PROMPTS_FILE = "curriculum.json"
DIGEST_PROMPTS = 100
"""Prompts of a dataset on disk whose tokens are part of its fingerprint."""


@dataclass
class RunState:
    """The state of a run apart from its weights; each field is JSON and part of every checkpoint."""

    step: int = 0
    """Finished training steps."""
    num_tokens: float = 0.0
    """Tokens of prompts and completions so far."""
    kl_coef: float = 0.0
    """The current KL coefficient."""
    guard: dict[str, Any] = field(default_factory=dict)
    """State of the guardrails."""
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of the evaluations so far."""
    best: dict[str, Any] = field(default_factory=dict)
    """The best checkpoint so far: its name, and the value of the metric."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """States of the callbacks that export one."""
    random: dict[str, Any] = field(default_factory=dict)
    """The global random generators at the beginning of the unfinished step."""


class PolicyRun:
    """Owns the files of a run, and everything that decides how it continues, apart from its settings.

    Args:
        folder: the run directory.
        update: owns the weights, the optimizers and the guardrails.
        rollouts: owns the engine, and completions generated ahead.
        tokenizer: saved with the policy.
        callbacks: get each event.
        facts: the facts that ``run.json`` and the report hold in addition to settings, ``inputs`` (fingerprints) among them.
        resumed: the checkpoint that the run resumes from, or the finished run, if any.
        moving_reference: updates the reference policy, for ``sync_ref_model``.
    """

    def __init__(
        self,
        folder: Path,
        update: PolicyUpdate,
        rollouts: RolloutScheduler,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: Callbacks,
        facts: dict[str, Any],
        resumed: checkpoint.Checkpoint | checkpoint.FinishedRun | None = None,
        moving_reference: MovingReference | None = None,
    ) -> None:
        self.folder = folder
        self.config = update.config
        self.update = update
        self.rollouts = rollouts
        self.tokenizer = tokenizer
        self.callbacks = callbacks
        self.facts = facts
        self.moving_reference = moving_reference
        self.resumed: checkpoint.Checkpoint | None = None
        """The checkpoint to resume from, until it is restored."""
        self.finished_earlier: checkpoint.FinishedRun | None = None
        """The finished run of an earlier process, until its policy is loaded."""
        self.finished = False
        """Whether all steps are done and the policy is saved."""
        self._resume = self.config.resume
        self._set_resumed(resumed)
        self.state = RunState(kl_coef=self.config.kl_coef)
        self.begun = False
        """Whether this object has written to the run directory."""
        self._lock: OutputLock | None = None
        self.log = MetricLog()
        self.monitor: Monitor | None = None
        """Shows each recorded step, if set."""
        self.batch: UpdateBatch | None = None
        """The batch of the unfinished step."""
        self.metrics: dict[str, float] = {}
        """The metrics of the last step."""

    # --- a step -----------------------------------------------------------------------------------------------------

    def record(
        self,
        step: int,
        batch: UpdateBatch | None,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        kl_coef: float | None = None,
    ) -> None:
        """Finish a step: log its metrics and completions, and set the KL coefficient of the next step."""
        self.batch = None
        position = self.callbacks.at(step + 1)
        self.state.num_tokens += metrics.get("num_tokens", 0.0)
        self.callbacks.state.num_input_tokens_seen = int(self.state.num_tokens)
        self.callbacks.call("on_step_end")
        self.metrics = {**position, **metrics, "num_tokens": self.state.num_tokens}
        if kl_coef is not None and self.config.kl_target is not None:
            self.metrics["kl_coef"] = self.state.kl_coef
            self.state.kl_coef = kl_coef
        logs = self.callbacks.log_step({**self.metrics, **timings})
        self.metrics = {name: value for name, value in logs.items() if isinstance(value, Real)} | self.metrics
        checkpoint.check_metric(self.config.keep_best, self.metrics)
        if self.update.ranks.is_main:
            if self.config.log_completions and batch is not None:
                columns = rollout_columns(batch.rollout, batch.scores, step + 1)
                save_completions(self.folder / COMPLETIONS / step_file(step + 1), columns, self._message_fields)
            self.log.write(self.metrics)
        if self.monitor is not None:
            self.monitor.step(self.metrics, timings, batch, logs)

    @cached_property
    def _message_fields(self) -> Sequence[str]:
        """The fields of the messages of all prompts, which the files of all steps have; every field, if reading all is slow."""
        prompts = self.rollouts.batches.prompts
        return EXTRA_FIELDS if isinstance(prompts, LazyPrompts) else message_fields(prompts)

    def advance(self) -> None:
        """Begin the next step, for which the reference policy is updated if that is due."""
        self.state.step += 1
        if self.moving_reference is not None:
            self.moving_reference.after(self.state.step)
        self.state.random = rng.capture()

    def end_step(self) -> None:
        """End an epoch with its last step, or where a callback asks for it."""
        self.callbacks.end_step()
        self._skip_stopped_epoch()

    def _skip_stopped_epoch(self) -> None:
        if self.callbacks.control.should_epoch_stop:
            self.state.step += -self.state.step % self.rollouts.batches.steps_per_epoch
            self.callbacks.at(self.state.step)

    def record_evaluation(self, name: str, evaluation: Evaluation, *, report: bool = True) -> None:
        """Write the completions of an evaluation, and the metrics of all evaluations so far; ``report`` it to callbacks."""
        self.state.evaluations[name] = evaluation.metrics()
        if report:
            metrics = logged_metrics(evaluation.metrics())
            self.metrics |= metrics
            checkpoint.check_evaluation_metric(self.config.keep_best, metrics)
            self.callbacks.evaluated(metrics)
        if not self.update.ranks.is_main:
            return
        file = evaluation_file(self.folder, name)
        if self.resumed is None or not file.is_file():  # A reward that isn't deterministic would change it.
            save_completions(file, evaluation.columns())
        write_json(self.folder / "evaluation.json", self.state.evaluations)

    # --- begin, save, restore ---------------------------------------------------------------------------------------

    @property
    def summary(self) -> RunRecord:
        """The run's folder, settings and facts."""
        return RunRecord(self.folder, as_dict(self.config), self.facts)

    def begin(self) -> None:
        """Create the run directory, or open that of a resumed run.

        A run that has begun before, and was stopped by an error or a signal, resumes from its last checkpoint.

        Raises:
            ConfigError: another process or another run uses the directory, or a stopped run has no checkpoint.
        """
        self.update.ranks.barrier()  # until every rank has checked the directory
        self.update.ranks.run_or_raise_all(self._claim)
        if self.begun and self.resumed is None:
            self.resumed = checkpoint.latest(self.folder)
            if self.resumed is None:
                raise ConfigError(
                    f"output_dir: the run in {self.folder} stopped before its first checkpoint, so it can't continue. Create a "
                    "new trainer, with overwrite or another output_dir."
                )
        self.begun = True
        if self.resumed is None:
            rng.seed_all(self.config.seed)
            self.state.random = rng.capture()
        if self.update.ranks.is_main:
            if self.resumed is None and self.config.overwrite:
                clear(self.folder)
            elif self.resumed is None and (moved := set_run_aside(self.folder)) is not None:
                echo(
                    f"Moved the earlier run in {self.folder} to {moved}. To continue a run instead, call "
                    "train(resume_from_checkpoint=True)."
                )
            if self.resumed is None or not (self.folder / RUN_FILE).is_file():
                describe_run(self.folder, as_dict(self.config), self.facts)
            self.log.open(self.folder)
        models = [learner.plain for learner in self.update.learners.values()]
        check_before_training(
            self.folder,
            models,
            self.tokenizer,
            self.config,
            steps=self.facts["num_steps"],
            ranks=self.update.ranks,
        )

    def resume_from(self, resume: bool | str) -> None:
        """Resume from the checkpoint at the path ``resume`` or, with True, from the latest one.

        Does nothing if all steps are done, or with True if this object has begun, because it then continues anyway.

        Raises:
            ModelError: there is no such checkpoint, or it is damaged.
            ConfigError: the run had other settings or inputs than this one, apart from the number of steps.
        """
        if self.finished or resume == self._resume or (resume is True and self.begun):
            return
        if not self.begun:
            check_output(self.config.output_dir, overwrite=False, resume=resume)
        found = checkpoint.checkpoint_to_resume(self.folder, self.config, resume, allowed=STEP_SETTINGS)
        checkpoint.check_inputs(found, self.facts["inputs"], self.config.allowed_changes)
        self._resume = resume
        self._set_resumed(found)

    def _set_resumed(self, found: checkpoint.Checkpoint | checkpoint.FinishedRun | None) -> None:
        self.resumed = found if isinstance(found, checkpoint.Checkpoint) else None
        self.finished_earlier = found if isinstance(found, checkpoint.FinishedRun) else None
        self.finished = self.finished_earlier is not None

    def _claim(self) -> None:
        """Lock the run directory, on rank 0."""
        if self.update.ranks.is_main:
            config, resume = self.config, True if self.begun else self._resume
            self._lock = claim_output(config.output_dir, overwrite=config.overwrite, resume=resume, set_aside=True)

    def save(self, metrics: Mapping[str, float] | None = None) -> None:
        """Write a checkpoint; ``metrics`` are those of the step just finished, None in the middle of a step.

        Every rank must call this; it returns when the checkpoint is written.
        """
        state, batch = self.state, self.batch
        updates = len(batch.history) if batch is not None else 0
        state.callbacks = self.callbacks.stateful()
        if metrics is not None:
            state.best = checkpoint.best_checkpoint(
                state.best, self.config.keep_best, metrics, checkpoint.name_of(state.step)
            )
        if updates:  # otherwise the step begins again, with the random numbers that it had
            state.random = rng.capture()
        state.guard = self.update.guardrails.as_dict()
        content = checkpoint.run_description(self.config, self.facts["inputs"]) | {"run": asdict(state)}
        learners = {name: learner.state() for name, learner in self.update.learners.items()}
        pending, prompts = self.rollouts.pending(state.step), self.rollouts.batches.state()
        if self.update.ranks.sharded:
            try:
                checkpoint.write_optimizer_shards(self.folder, learners, self.update.ranks)
            except OSError as error:
                checkpoint.warn_full_disk(error, self.folder, state.step)
                return

        def write_files(folder: Path) -> None:
            content["learners"] = checkpoint.write_learners(learners, folder)
            save_model(self.update.policy.plain, self.tokenizer, folder)
            if self.moving_reference is not None:
                save_file(self.moving_reference.state(), folder / f"{checkpoint.REFERENCE}.safetensors")
            if batch is not None and updates:
                batch.save(folder)
            if prompts:
                write_json(folder / PROMPTS_FILE, prompts)
            if pending:
                write_json(folder / PENDING_FILE, pending)

        keep = state.best["checkpoint"] if state.best else None
        if self.update.ranks.is_main:
            position = state.step, updates
            checkpoint.save(self.folder, position, content, write_files, keep_last=self.config.latest_kept, keep=keep)
        self.update.ranks.barrier()
        if metrics is not None:
            self.callbacks.saved(str(self.folder / checkpoint.FOLDER / keep) if keep else None)

    def restore(self, saved: checkpoint.Checkpoint, *, log: bool = True) -> None:
        """Restore weights, counters, random generators and, with ``log``, the logs."""
        checkpoint.restore_learners(self.update.learners, saved, self._policy_weights(saved.folder))
        if self.moving_reference is not None:
            self.moving_reference.load(saved.tensors(checkpoint.REFERENCE))
        vars(self.state).update(saved.state["run"])
        self.update.guardrails.load(self.state.guard)
        if (saved.folder / PROMPTS_FILE).is_file():
            self.rollouts.batches.load(json.loads((saved.folder / PROMPTS_FILE).read_text(encoding="utf-8")))
        self.rollouts.restore(saved.folder)
        prompts = self.rollouts.batches.with_refills(self.state.step)
        self.batch = UpdateBatch.load(saved, prompts, self.update.ranks.device)
        rng.restore(self.state.random)
        if log:
            state = self.state
            self.callbacks.restore(saved.folder, state.evaluations, state.step, state.callbacks)
            self._skip_stopped_epoch()
        if log and self.update.ranks.is_main:
            self.log.close()
            restore_logs(saved.folder, self.folder)
            self.log.open(self.folder)
            restore_completions(saved.folder.parent.parent, self.folder, saved.step)

    def _policy_weights(self, folder: Path) -> dict[str, Tensor]:
        """Return the policy's trainable weights in a checkpoint."""
        if has_adapter(self.update.policy.plain):
            return load_adapter_weights(folder)
        return dict(load_policy(str(folder), compute_dtype(self.config)).state_dict())

    def restore_resumed(self) -> None:
        """Restore the checkpoint that the run resumes from."""
        assert self.resumed is not None
        evaluations = self.state.evaluations
        self.restore(self.resumed)
        if self.update.ranks.is_main:
            write_finished(self.folder, None)
        self.state.evaluations = evaluations | self.state.evaluations
        self.resumed = None
        self.rollouts.checked.engine.load_weights(self.update.policy.plain)

    def roll_back(self, reason: str) -> None:
        """Restore the last checkpoint, and halve the learning rate."""
        saved = checkpoint.latest(self.folder)
        if saved is None:
            raise TrainingDiverged(f"{reason}, and there is no checkpoint to roll back to.")
        guardrails = self.update.guardrails
        rollbacks = guardrails.state.rollbacks
        self.restore(saved)
        for learner in self.update.learners.values():
            learner.scale_rate(0.5 ** (rollbacks - guardrails.state.rollbacks))
        guardrails.state.rollbacks = rollbacks
        log_event(self.folder, f"{reason}: rolled back to step {self.state.step} with half the learning rate.")
        self.rollouts.checked.engine.load_weights(self.update.policy.plain)
        if self.monitor is not None:
            self.monitor.rolled_back()

    def load_best(self) -> bool:
        """Load the weights of the best checkpoint; return whether they are others than the current ones."""
        best = self.state.best.get("checkpoint")
        if best is None:
            echo("load_best_model_at_end: no checkpoint has the metric of keep_best; the last weights stay.", "yellow")
        if best in (None, checkpoint.name_of(self.state.step)):
            return False
        saved = checkpoint.open_checkpoint(str(self.folder / checkpoint.FOLDER / best))
        checkpoint.restore_learners(self.update.learners, saved, self._policy_weights(saved.folder))
        self.rollouts.checked.engine.load_weights(self.update.policy.plain)
        echo(f"Loaded the best checkpoint, {best}: {self.config.keep_best} {self.state.best['value']:.4g}.")
        return True

    def restore_last_good(self) -> str:
        """Restore the last checkpoint, so that the trainer stays usable; return a hint for the error message."""
        saved = checkpoint.latest(self.folder)
        if saved is None:
            return f"No checkpoint was saved. Start over with {option('overwrite')}."
        self.restore(saved, log=False)
        return (
            f"The last good state is {saved.folder}. Resume from it with {option('resume')} and other settings, and list "
            "these in allow_changes."
        )

    def finish(self) -> None:
        """Record that all steps are done and the policy is saved, and delete checkpoints that aren't kept."""
        self.finished = True
        self.callbacks.finish()
        if self.update.ranks.is_main:
            checkpoint.finish(self.folder, self.config, self.facts["inputs"], self.state.step)

    def open_finished(self) -> None:
        """Print that all steps are done; load the policy if an earlier process has saved it."""
        if self.finished_earlier is None:
            steps, step = self.facts["num_steps"], self.state.step
            done = f"All {steps} steps are done" if step >= steps else f"A callback ended training after step {step}"
            echo(f"{done}. To train more, give the model in {self.folder} to a new trainer.")
            return
        policy = self.update.policy.plain
        load_trainable_weights(policy, self._policy_weights(self.folder))
        self.rollouts.checked.engine.load_weights(policy)
        self.callbacks.restore(self.folder, read_run(self.folder).evaluations, self.finished_earlier.step)
        self.callbacks.finish()
        self.finished_earlier.close(self.config, self.facts["inputs"])
        self.finished_earlier = None

    def close(self) -> None:
        """Stop pending rollouts, close the logs, and release the run directory."""
        self.rollouts.close()
        self.log.close()
        if self._lock is not None:
            self._lock.release()


def fingerprints(model: PreTrainedModel, parts: Sequence[Sequence[Prompt]], rewards: RewardSum) -> dict[str, str]:
    """Return a short fingerprint of each input of a run, by the name of its setting; ``parts`` are its prompts.

    The fingerprint of prompts on disk is a hash of their texts, and of the tokens of the first ones.
    """
    on_disk = [prompts for prompts in parts if isinstance(prompts, LazyPrompts)]
    hashed = chain.from_iterable(p[: _hashed_rows(p)] if isinstance(p, LazyPrompts) else p for p in parts)
    texts = json.dumps([*((prompt.text, prompt.ids) for prompt in hashed), *(prompts.digest for prompts in on_disk)])
    return {
        "model": weights_hash(model),
        "data": hashlib.sha256(texts.encode()).hexdigest()[:16],
        "reward_model": rewards.fingerprint(),
    }


def _hashed_rows(prompts: LazyPrompts) -> int:
    return prompts.rows.batch_size if isinstance(prompts.rows, StreamRows) else DIGEST_PROMPTS
