"""Assemble the parts of a policy training from settings, models, data and rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.algorithm.importance import Correction
from reinforcepp.algorithm.kl import next_kl_coef
from reinforcepp.config import ReinforceConfig
from reinforcepp.data import StreamRows, check_dataset, prompt_rows
from reinforcepp.distributed.rank_zero import RankZero
from reinforcepp.distributed.ranks import Ranks, check_trackers, init_process_group
from reinforcepp.environments.protocol import EnvironmentFactory
from reinforcepp.environments.tools.schemas import ToolFunction
from reinforcepp.errors import ConfigError, DataError, setting
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.devices import check_compiler, choose_device
from reinforcepp.models.loading import check_trainable, load_config, prompt_limit, tokenizer_for, weight_bytes
from reinforcepp.models.lora import is_4bit, make_reference, with_adapter
from reinforcepp.models.micro_batches import MicroBatchLimit
from reinforcepp.models.precision import cast_parameters, compute_dtype
from reinforcepp.models.prompt_format import prompt_form
from reinforcepp.models.remote_code import allow_remote_code
from reinforcepp.models.rotary import fix_frequencies
from reinforcepp.monitoring import log_event
from reinforcepp.monitoring.environment import environment as host_facts
from reinforcepp.rewards.functions import RewardFunction
from reinforcepp.rewards.sources import RewardSum, load_rewards
from reinforcepp.rollout.checked_engine import CheckedEngine
from reinforcepp.rollout.engine import RolloutEngine
from reinforcepp.rollout.factory import start_training_engine
from reinforcepp.rollout.ray.reward_pool import pool_rewards, rewards_to_pool
from reinforcepp.rollout.selection import agree_on_engine, choose_engine
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.run_dir import check_output
from reinforcepp.runtime.terminal import echo
from reinforcepp.training import checkpoint
from reinforcepp.training.async_rollouts import AsyncRolloutScheduler
from reinforcepp.training.callbacks import Callbacks
from reinforcepp.training.critic import Critic
from reinforcepp.training.episodes import (
    environment_inputs,
    episode_runner,
    longest_start,
    start_environments,
    template_variables,
    with_environment,
    with_environment_reward,
)
from reinforcepp.training.evaluation import Evaluator
from reinforcepp.training.guardrails import Guardrails
from reinforcepp.training.learner import Learner
from reinforcepp.training.moving_reference import MovingReference
from reinforcepp.training.optimizer import Optimizers, check_optimizers, with_given_rate
from reinforcepp.training.policy_run import PolicyRun, fingerprints
from reinforcepp.training.policy_update import PolicyUpdate
from reinforcepp.training.precision import with_precision
from reinforcepp.training.prompt_batches import joined
from reinforcepp.training.prompt_selection import prompt_batches
from reinforcepp.training.prompt_summary import print_prompt_format
from reinforcepp.training.rollout_scheduler import RolloutScheduler
from reinforcepp.training.run_guard import Heartbeat, RunGuard
from reinforcepp.training.schedule import with_learning_rate
from reinforcepp.training.setup import (
    check_sampling,
    encode,
    longest_prompt,
    start_policy,
    warn_about_bias,
    with_quantization,
)
from reinforcepp.types import Prompt

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback


@dataclass(frozen=True)
class TrainingParts:
    """The parts of a policy training; each resource has one owner.

    ``rollouts`` own the engine, ``update`` owns policy, critic and optimizers, ``run`` owns files and state, and ``guard``
    surrounds the loop.
    """

    folder: Path
    ranks: Ranks
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    num_steps: int
    rewards: RewardSum
    reference: PreTrainedModel
    update: PolicyUpdate
    rollouts: RolloutScheduler
    run: PolicyRun
    callbacks: Callbacks
    guard: RunGuard
    evaluator: Evaluator
    kl_controller: Callable[[float, float], float]
    """Returns the next KL coefficient from the current one and the KL of the step."""


def build(
    model: str | PreTrainedModel,
    reward_funcs: str | RewardFunction | Sequence[str | RewardFunction] | None,
    config: ReinforceConfig,
    train_dataset: Iterable[Any] | None,
    eval_dataset: Iterable[Any] | None,
    processing_class: PreTrainedTokenizerBase | None,
    engine: RolloutEngine | None,
    judge: str | RewardFunction | None,
    reward_weights: Sequence[float] | None,
    reward_processing_classes: Any,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None,
    optimizers: Optimizers,
    quantization_config: Any,
    environment: EnvironmentFactory | None,
    tools: Sequence[str | ToolFunction] | None,
) -> TrainingParts:
    """Check everything that can be checked first, then load the models; the arguments are those of the trainer.

    Raises:
        ReinforceError: settings, data or models don't fit together.
    """
    config, quantization = with_quantization(config, model, quantization_config)
    config = with_environment(config, environment, tools)
    if config.trust_remote_code:
        allow_remote_code(model if isinstance(model, str) else model.config.name_or_path, config.output_dir)
    folder, resumed = open_folder(model, config)
    model_config = load_config(model) if isinstance(model, str) else model.config
    limit = prompt_limit(model_config, config.max_prompt_length, config.max_new_tokens, config.max_length)
    config = with_given_rate(config, optimizers[0])
    config = with_learning_rate(config, model_config, resumed.state["settings"] if resumed else None)
    config, precision = with_precision(config, model_config, resumed.state["settings"] if resumed else None)
    dtype = compute_dtype(config)
    rollout = "transformers" if config.load_in_4bit else config.rollout
    choice = choose_engine(rollout, model_config, dtype) if engine is None else None
    if choice is not None:
        check_sampling(config, choice.name)
    tokenizer = with_chat_template(tokenizer_for(model_config, processing_class), config)
    warn_about_bias(config)
    make_environment = start_environments(config, environment, tokenizer)
    variables = template_variables(make_environment)
    encode_held_out = partial(load_held_out, tokenizer, config, limit, variables)
    prompts = load_prompts(tokenizer, train_dataset, config, limit, variables)
    eval_sets = encode_held_out(eval_dataset)
    held_out = sum(map(len, eval_sets.values()))
    if (
        config.eval_prompts
        and (used := sum(min(config.eval_prompts, len(part)) for part in eval_sets.values())) < held_out
    ):
        echo(f"Evaluations before and after training use {used} of {held_out} held-out prompts (eval_prompts).")
    if (config.keep_best or "").removeprefix("-").startswith("eval_") and not held_out:
        raise ConfigError(f"keep_best: {config.keep_best} needs an eval_dataset. Give held-out rows.")
    if config.eval_every and eval_dataset is None:
        echo("eval_every: nothing is evaluated, because there is no eval_dataset.", "yellow")
    batches = prompt_batches(prompts, config, stream=is_stream(train_dataset, config))
    num_steps = config.max_steps or math.ceil(batches.steps_per_epoch * config.num_train_epochs)
    rewards = load_rewards(
        with_environment_reward(config, reward_funcs),
        config,
        reward_weights,
        reward_processing_classes,
        texts_are_messages=prompt_form(tokenizer) != "plain",
    )
    judge_sum = load_rewards(judge) if judge is not None else None

    ranks = Ranks(config.report_to, folder)
    if choice is not None:
        choice = agree_on_engine(choice, ranks)
        check_sampling(config, choice.name)
    place_reward_models(rewards, judge_sum, config, ranks)
    updates = num_steps * config.updates_per_step
    learner, critic = start_learners(
        model, config, ranks, updates=updates, optimizers=optimizers, quantization=quantization
    )
    longest = longest_start(config, longest_prompt(prompts, *eval_sets.values()), limit, make_environment)
    max_length = longest + config.max_new_tokens
    for trained in (learner, critic):
        if trained is not None and (kind := fix_frequencies(trained.plain, max_length)) and trained is learner:
            echo(
                f"Rotary frequencies ({kind}) are fixed for sequences of {max_length} tokens. Otherwise they would depend on the "
                "longest row of each micro-batch."
            )
    events = Callbacks(callbacks, config, ranks, learner, tokenizer, num_steps, batches.steps_per_epoch)
    rewards = replace(rewards, trainer_state=events.state)
    reference = make_reference(learner.plain, new_adapter=config.use_peft)
    inputs = fingerprints(reference, [prompts, *eval_sets.values()], rewards)
    inputs |= environment_inputs(config, environment)
    checkpoint.check_inputs(resumed, inputs, config.allowed_changes)
    if choice is not None:
        if config.rollout == "auto":
            echo(f"Completions come from {choice.name}: {choice.reason}.")
        reserved = config.reward_workers * len(rewards.trained)
        moments = learner.pending_moment_bytes + (critic.pending_moment_bytes if critic is not None else 0)
        engine = start_training_engine(
            choice, learner.plain, tokenizer, config, ranks, reserved, folder, max_length, moments
        )
    assert engine is not None
    if config.reward_workers:
        rewards = pool_rewards(rewards, engine, config.reward_workers, RankZero(ranks, config.watchdog_seconds))

    heartbeat = Heartbeat(folder, config.watchdog_seconds, ranks)
    guardrails = Guardrails(config, partial(log_event, folder))
    correction, on_policy = sampling_gap(config, engine)
    update = PolicyUpdate(
        config,
        ranks,
        learner,
        critic,
        pad_id=int(tokenizer.pad_token_id),
        correction=correction,
        on_policy=on_policy,
        guardrails=guardrails,
        heartbeat=heartbeat,
    )
    own_engine = partial(TransformersEngine, learner.plain, tokenizer, config.effective_rollout_batch_size)
    fallback = own_engine if choice is not None and choice.can_fall_back else None
    checked = CheckedEngine(engine, tokenizer, fallback)
    episodes = episode_runner(config, make_environment, tokenizer, longest, folder)
    rollouts = (
        AsyncRolloutScheduler(config, checked, update, batches, num_steps, episodes)
        if config.staleness
        else RolloutScheduler(config, checked, learner.plain, batches, ranks, episodes)
    )
    facts = {
        "kind": type(config).__name__,
        "num_steps": num_steps,
        "prompts": len(prompts),
        "heldout_prompts": held_out,
        "inputs": inputs,
        "rewards": rewards.describe(),
        "judge": judge_sum.names[0] if judge_sum else None,
        **precision,
        **host_facts(ranks.device),
    }
    moving = MovingReference(reference, learner.plain, config) if config.sync_ref_model else None
    run = PolicyRun(folder, update, rollouts, tokenizer, events, facts, resumed, moving)
    guard = RunGuard(run, guardrails, heartbeat, num_steps)
    evaluator = Evaluator(eval_sets, encode_held_out, rewards, judge_sum, reference, rollouts, run, heartbeat)
    return TrainingParts(
        folder=folder,
        ranks=ranks,
        tokenizer=tokenizer,
        prompts=prompts,
        num_steps=num_steps,
        rewards=rewards,
        reference=reference,
        update=update,
        rollouts=rollouts,
        run=run,
        callbacks=events,
        guard=guard,
        evaluator=evaluator,
        kl_controller=partial(
            next_kl_coef,
            target=config.kl_target,
            completions=config.completions_per_step,
            horizon=config.kl_horizon,
        ),
    )


def open_folder(
    model: str | PreTrainedModel, config: ReinforceConfig
) -> tuple[Path, checkpoint.Checkpoint | checkpoint.FinishedRun | None]:
    """Check the output directory and join the other ranks; return it and the checkpoint to resume, or the finished run."""
    if isinstance(model, str):
        check_trainable(model, use_peft=config.use_peft)
    # Each checkpoint holds the weights and AdamW's two moments, also of a critic, and a moving reference.
    each = 3 + 3 * config.estimator_spec.uses_critic + config.sync_ref_model
    copies = each * config.checkpoints_at_most + 1
    needed = copies * weight_bytes(model) if isinstance(model, str) and not config.use_peft else 0
    choose_device(config.use_cpu)
    if config.torch_compile:
        check_compiler(setting("torch_compile"))
    init_process_group(config.watchdog_seconds)
    folder = check_output(
        config.output_dir, overwrite=config.overwrite, resume=config.resume, set_aside=True, needed_bytes=needed
    )
    check_trackers(config.report_to)
    resumed = checkpoint.checkpoint_to_resume(folder, config)
    if isinstance(resumed, checkpoint.FinishedRun):
        echo(
            f"The run in {folder} finished after {resumed.step} steps. Checking that its data and models are unchanged ..."
        )
    return folder, resumed


def is_stream(dataset: Any, config: ReinforceConfig) -> bool:
    """Return whether a dataset is read only as far as ``max_steps`` needs it: its length isn't known."""
    return bool(config.max_steps) and dataset is not None and not hasattr(dataset, "__len__")


def load_prompts(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Any] | None,
    config: ReinforceConfig,
    limit: int,
    variables: Mapping[str, Any],
) -> Sequence[Prompt]:
    """Return the training prompts, of up to ``limit`` tokens, with ``variables`` of the chat template.

    Those of a dictionary of datasets follow each other, with the names of their datasets.

    Raises:
        DataError: there is no training prompt.
        ConfigError: ``dataset`` isn't a dataset.
    """
    name = "train_dataset"
    if isinstance(dataset, Mapping) and config.interleave_probs:
        return _of_several(tokenizer, dataset, config, limit, variables)
    if dataset is not None:
        check_dataset(dataset, name)
    rows = (
        StreamRows(dataset, name, config.max_steps * config.batch_size, config.batch_size)
        if dataset is not None and is_stream(dataset, config)
        else prompt_rows(dataset, name)
    )
    prompts = encode(tokenizer, rows, "training", config, limit, variables)
    if not prompts:
        raise DataError("train_dataset: no rows. Give at least one row with a prompt.")
    print_prompt_format(tokenizer, rows, prompts[0].ids)
    return prompts


def _of_several(
    tokenizer: PreTrainedTokenizerBase,
    datasets: Mapping[str, Any],
    config: ReinforceConfig,
    limit: int,
    variables: Mapping[str, Any],
) -> list[Prompt]:
    """Return the training prompts of several datasets; see :func:`load_prompts`."""
    parts: dict[str, Sequence[Prompt]] = {}
    for name, dataset in datasets.items():
        place = f"train_dataset[{name!r}]"
        check_dataset(dataset, place)
        if not isinstance(name, str) or not name or not hasattr(dataset, "__len__"):
            raise ConfigError(f"{place}: needs a text as name, and rows of known number. Give a Dataset or a list.")
        rows = prompt_rows(dataset, place)
        parts[name] = encode(tokenizer, rows, "training", config, limit, variables)
        if not parts[name]:
            raise DataError(f"{place}: no rows. Give at least one row with a prompt.")
        if len(parts) == 1:
            print_prompt_format(tokenizer, rows, parts[name][0].ids)
    if not parts:
        raise DataError("train_dataset: no datasets. Give at least one.")
    return joined(parts)


def load_held_out(
    tokenizer: PreTrainedTokenizerBase, config: ReinforceConfig, limit: int, variables: Mapping[str, Any], dataset: Any
) -> dict[str, Sequence[Prompt]]:
    """Return the prompts of each held-out dataset by its name; the name of a single dataset is empty.

    Raises:
        ConfigError: ``dataset`` isn't a dataset, or a dictionary of them.
    """
    parts = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset if dataset is not None else []}
    sets: dict[str, Sequence[Prompt]] = {}
    for name, part in parts.items():
        place = f"eval_dataset[{name!r}]" if name else "eval_dataset"
        check_dataset(part, place)
        first = sum(map(len, sets.values()))
        encoded = encode(tokenizer, prompt_rows(part, place), "held-out", config, limit, variables)
        sets[str(name)] = [replace(prompt, key=first + i) for i, prompt in enumerate(encoded)] if first else encoded
    return sets


def place_reward_models(rewards: RewardSum, judge: RewardSum | None, config: ReinforceConfig, ranks: Ranks) -> None:
    """Move the trained reward models to this rank's device, except those that reward workers will hold.

    They score in batches of the size in which the policy's log-probabilities are computed.
    """
    dtype = compute_dtype(config)
    in_workers = rewards_to_pool(rewards, config.reward_workers)
    for reward in [*rewards.trained, *(judge.trained if judge else ())]:
        reward.limit = MicroBatchLimit.of(config, ranks.device.type, packed=config.padding_free == "auto").for_scoring
        if is_4bit(reward.model):  # already on the device
            continue
        if dtype != torch.float32 and not reward.given:
            cast_parameters(reward.model, dtype)
        if reward not in in_workers:
            reward.model.to(ranks.device)


def start_learners(
    model: str | PreTrainedModel,
    config: ReinforceConfig,
    ranks: Ranks,
    *,
    updates: int,
    optimizers: Optimizers = (None, None),
    quantization: BitsAndBytesConfig | None = None,
) -> tuple[Learner, Critic | None]:
    """Return the policy and, for the estimator ppo, its critic, each with an optimizer for ``updates`` steps."""
    check_optimizers(optimizers, config, loaded=not isinstance(model, str), sharded=ranks.sharded)
    policy = start_policy(model, config, quantization)
    critic = Critic(policy, ranks, config, steps=updates) if config.estimator_spec.uses_critic else None
    if config.use_peft:
        policy = with_adapter(policy, config, seed=config.seed)
    rate = config.peak_learning_rate
    return Learner(policy, ranks, config, learning_rate=rate, steps=updates, optimizers=optimizers), critic


def sampling_gap(config: ReinforceConfig, engine: RolloutEngine) -> tuple[Correction, bool]:
    """Return how the engine's log-probabilities are corrected, and whether each batch is exactly on policy."""
    same_forward, ahead = engine.shares_trainer_forward, config.staleness > 0
    on_policy = (
        same_forward
        and not ahead
        and config.learns_as_sampled
        and config.updates_per_step == 1
        and config.top_entropy_quantile == 1
    )
    if config.importance_correction != "auto":
        return config.importance_correction, on_policy
    correction: Correction = "binary_kl" if config.estimator_spec.trust_region else "tis"
    return correction if ahead or not same_forward else "off", on_policy
