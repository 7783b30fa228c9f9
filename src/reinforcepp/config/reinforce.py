"""Settings of the algorithm, its rewards and its training loop."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from reinforcepp.config.algorithm import AlgorithmConfig
from reinforcepp.config.aliases import share_flags
from reinforcepp.config.base import (
    Config,
    FilledStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveCount,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seed,
    Share,
    StepInterval,
)
from reinforcepp.config.environments import EnvironmentConfig
from reinforcepp.config.hub import HubConfig
from reinforcepp.config.learning_rates import Training
from reinforcepp.config.prompt_selection import PromptSelectionConfig
from reinforcepp.config.sampling import RolloutSamplingConfig
from reinforcepp.config.shared import (
    MODEL_CONFIG,
    ChatTemplateConfig,
    ComputeConfig,
    OptimizerConfig,
    Scheduler,
    TrackingConfig,
)
from reinforcepp.config.values import NAMES, EmptyIfNone
from reinforcepp.errors import ConfigError, nearest, option

DEFAULT_MICRO_BATCH = 8
DEFAULT_ROLLOUT_BATCH, MAX_DEFAULT_ROLLOUT_BATCH = 128, 512
"""Bounds of the default of rollout_batch_size; the upper one is for vLLM on a GPU."""
ENGINES = ("auto", "transformers", "vllm")
RAY = "ray://"
RAY_ADDRESS = re.compile(r"ray://(auto|local|[^\s/:]+:\d{1,5})")
SERVERS = {"vllm://": "http://", "vllm+https://": "https://"}
SERVER = r"([^\s/:,@\[\]]+|\[[0-9a-fA-F:.]+\]):\d{1,5}"
SERVER_ADDRESSES = re.compile(rf"vllm(\+https)?://{SERVER}(,{SERVER})*")


@dataclass(frozen=True)
class RewardScoringConfig(Config):
    """How completions are scored, and how their scores become rewards."""

    reward_weights: Annotated[tuple[float, ...], EmptyIfNone()] = field(default=(), metadata=NAMES)
    """One weight per reward, multiplied by the weight in its name. Default: 1"""
    reward_normalize: bool = False
    """Standardize reward model scores with the mean and deviation of their card"""
    reward_clip: PositiveFloat | None = None
    """Clip the weighted sum of rewards, minus truncation_penalty, to +- this value"""
    reward_clip_range: Annotated[tuple[float, ...], EmptyIfNone()] = field(default=(), metadata=NAMES)
    """Clip the weighted sum of rewards to this range instead, LOW HIGH"""
    reward_length_power: NonNegativeFloat = 0.0
    """Divide the reward by the completion's tokens to this power; 0 disables"""
    truncation_penalty: NonNegativeFloat = 0.0
    """Subtracted from the reward of a completion truncated at max_new_tokens"""
    reward_timeout: PositiveFloat = 60.0
    """Seconds per reward server request, up to the last byte of the response"""
    reward_attempts: PositiveInt = 5
    """Attempts per reward server request, with growing pauses"""
    reward_batch_size: PositiveInt = 64
    """Completions per reward server request"""
    reward_label_column: FilledStr = "label"
    """Column sent to a reward server as labels"""

    @property
    def reward_bounds(self) -> tuple[float, float] | None:
        """Range to which rewards are clipped, or None."""
        if self.reward_clip_range:
            return self.reward_clip_range[0], self.reward_clip_range[1]
        return None if self.reward_clip is None else (-self.reward_clip, self.reward_clip)

    def _check_rules(self) -> None:
        bounds = self.reward_clip_range
        if bounds and (len(bounds) != 2 or bounds[0] >= bounds[1]):
            raise ConfigError(f"reward_clip_range must be LOW HIGH, as in -1 2, not {' '.join(map(str, bounds))}.")
        if bounds and self.reward_clip is not None:
            raise ConfigError("reward_clip and reward_clip_range: both are given. Remove one.")


@dataclass(frozen=True)
class ReinforceConfig(
    TrackingConfig,
    OptimizerConfig,
    RolloutSamplingConfig,
    AlgorithmConfig,
    RewardScoringConfig,
    EnvironmentConfig,
    PromptSelectionConfig,
    ChatTemplateConfig,
    ComputeConfig,
    HubConfig,
):
    """Settings of REINFORCE++ training."""

    TRAINING: ClassVar[Training] = "policy"

    output_dir: str = "runs/train"
    """Folder for the trained model, metrics and checkpoints"""
    seed: Seed = 42
    """Seed of the prompt order and of sampling"""

    batch_size: PositiveInt = 8
    """Prompts per training step; the last batch of an epoch can be smaller"""
    num_generations: PositiveInt = 1
    """Completions per prompt; 2 or more for rloo, grpo and *_baseline"""
    micro_batch_size: PositiveInt | None = None
    """Completions per forward and backward pass, instead of a number of tokens"""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Tokens, with padding, per forward and backward pass. Default: by device"""
    padding_free: Literal["auto", "off"] = "auto"
    """Compute rows without padding; auto: if the model gives the same results"""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches per optimizer step; default: all of a rollout batch"""
    num_iterations: PositiveInt = 1
    """Passes over each rollout batch"""
    num_train_epochs: PositiveCount = 1
    """Passes over the prompts; a fraction ends within a pass"""
    max_steps: NonNegativeInt = 0
    """Training steps (rollout batches); 0 uses num_train_epochs"""

    shuffle_dataset: bool = True
    """Shuffle the prompts in each epoch; a stream keeps its order"""

    max_length: PositiveInt | None = None
    """Most tokens of prompt and completion together. Default: the context"""
    max_prompt_length: PositiveInt | None = None
    """Most tokens of a formatted prompt. Default: what the context leaves"""
    max_new_tokens: PositiveInt = 384
    """Maximum length of a completion, in tokens"""
    long_prompts: Literal["cut", "drop"] = "cut"
    """Prompts over the maximum: cut drops the oldest turns, drop skips the prompts"""

    critic_learning_rate: PositiveFloat | None = None
    """Only ppo: peak learning rate of the critic; default: learning_rate"""
    warmup_ratio: Share = 0.0
    """Fraction of all optimizer steps in which the learning rate rises to its peak"""
    lr_scheduler_type: Scheduler = "constant"
    """Learning rate schedule after the warmup"""
    disable_dropout: bool = True
    """Accepted for TRL: dropout is always off, so that the policy ratio starts at 1"""
    cast_lm_head_to_fp32: bool = False
    """Accepted for TRL: the head computes in float32, and mixed_precision auto is no"""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory and step on the CPU; slower on a GPU"""

    rollout: str = "auto"
    """auto, transformers, vllm, ray://auto|local|HOST:PORT or vllm://HOST:PORT,..."""
    rollout_workers: NonNegativeInt = 0
    """Only Ray: maximum number of engines in the pool; 0: one per GPU, or per CPU"""
    reward_workers: NonNegativeInt = 0
    """Only Ray: processes that score with reward models; 0 scores in the trainer"""
    rollout_batch_size: PositiveInt | None = None
    """Completions generated at a time; default: 128, with vLLM on a GPU up to 512"""
    staleness: NonNegativeInt = 0
    """Steps by which generation runs ahead of training; 0 uses current weights"""
    importance_correction: Literal[
        "auto", "tis", "icepop", "sequence_truncate", "sequence_mask", "binary_kl", "off"
    ] = "auto"
    """Correct engine log-probs; auto: tis or binary_kl with vLLM, Ray or staleness"""
    importance_max_kl: PositiveFloat = 0.003
    """Only binary_kl: drop sequences with a higher mean KL between engine and policy"""
    importance_low: NonNegativeFloat = 0.5
    """Lower bound of the importance weight; 0 disables"""
    importance_high: float = 2.0
    """Upper bound of the importance weight"""
    sync_check_every: PositiveInt = 50
    """Steps between checks that the engine has the trainer's weights"""
    vllm_gpu_memory_utilization: Probability | None = None
    """Fraction of GPU memory for vLLM; default: measured"""
    vllm_tensor_parallel_size: PositiveInt = 1
    """Only Ray: GPUs that share the model in each engine of the pool"""

    eval_prompts: NonNegativeInt = 64
    """Held-out prompts evaluated before and after training; 0 disables"""
    eval_every: StepInterval = 0
    """Steps between evaluations during training; 0 disables, -1: once per epoch"""
    eval_on_start: bool = False
    """Also report the evaluation before training, which is always made, to callbacks"""
    load_best_model_at_end: bool = False
    """Save the policy of the best checkpoint, by keep_best, instead of the last one"""
    logging_steps: PositiveInt = 1
    """Steps between logs (their means) to trackers, callbacks and log_history"""
    logging_first_step: bool = False
    """Also log step 1 to trackers and callbacks"""
    log_completions: bool = True
    """Write the completions of every step to Parquet files, and tables to trackers"""
    num_completions_to_print: PositiveInt | None = None
    """Completions of every step to print as a table; default: none"""
    log_unique_prompts: bool = False
    """Only one completion per prompt in the tables of trackers and the terminal"""

    sync_ref_model: bool = False
    """Let the reference policy follow the policy (TR-DPO); KL is then to the mixture"""
    ref_model_mixup_alpha: Probability = 0.6
    """Share of the policy in an update of the reference; with sync_ref_model"""
    ref_model_sync_steps: PositiveInt = 512
    """Optimizer steps between updates of the reference; with sync_ref_model"""
    kl_target: PositiveFloat | None = None
    """Adapt kl_coef to keep the KL at this value, in nats/token; off by default"""
    kl_horizon: PositiveFloat = 10_000.0
    """Completions over which a 20% KL error changes kl_coef by 20%; with kl_target"""
    kl_limit: PositiveFloat | None = 5.0
    """KL to the reference policy, in nats/token, that counts as diverged; None: off"""
    kl_action: Literal["stop", "rollback"] = "stop"
    """Action over kl_limit; rollback: last checkpoint, half learning rate, up to 3x"""
    ratio_limit: NonNegativeFloat = 10_000.0
    """Skip an update with a policy ratio, or its inverse, above this; 0 disables"""
    collapse_length: Share = 0.1
    """Stop if lengths stay below this fraction of the first step's; 0 disables"""
    collapse_entropy: Share = 0.01
    """Stop if entropy stays below this fraction of the first step's; 0 disables"""
    collapse_distinct: Share = 0.1
    """Stop if distinct completions stay below this fraction of step 1's; 0 disables"""

    def _check_rules(self) -> None:
        if self.num_completions_to_print is not None and not self.log_completions:
            raise ConfigError("num_completions_to_print: needs log_completions. Turn it on, or remove one.")
        self.check_dynamic_sampling(self.num_generations, self.staleness)
        self._check_best()
        self._check_rollout()
        self._check_guardrails()
        self._check_reference()
        self._check_model()
        if self.importance_high < self.importance_low:
            raise ConfigError(
                f"importance_high: {self.importance_high} is below importance_low {self.importance_low}. Raise "
                "importance_high or lower importance_low."
            )
        if self.max_length is not None and (self.max_prompt_length or 1) + self.max_new_tokens > self.max_length:
            prompt = "a prompt" if self.max_prompt_length is None else f"max_prompt_length {self.max_prompt_length}"
            raise ConfigError(
                f"{prompt} + max_new_tokens {self.max_new_tokens} exceed max_length {self.max_length}. Lower one of the two "
                "or raise max_length."
            )
        if self.estimator_spec.grouped and self.num_generations < 2:
            raise ConfigError(
                f"estimator: {self.estimator} compares completions of one prompt, but num_generations is "
                f"{self.num_generations}. Set num_generations to 2 or more, or use the estimator reinforce_plus_plus."
            )
        if self.estimator_spec.baseline == "batch_mean" and self.completions_per_step < 2:
            raise ConfigError(
                f"batch_size: 1 completion per step equals the mean that {self.estimator} subtracts from it, so nothing would be "
                "learned. Set batch_size to 2 or more."
            )
        of_sum = {
            "reward_clip": self.reward_bounds,
            "truncation_penalty": self.truncation_penalty,
            "reward_length_power": self.reward_length_power,
        }
        if self.normalizes_each_reward and any(of_sum.values()):
            setting = next(name for name, value in of_sum.items() if value)
            raise ConfigError(
                f"{setting} changes the sum of the rewards, but multi_objective_aggregation normalize_then_sum normalizes each "
                f"one before. Omit {setting} or normalize_then_sum."
            )
        if self.optimizer_batch_size > self.completions_per_step:
            raise ConfigError(
                f"micro_batch_size {self.effective_micro_batch_size} x gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} is {self.optimizer_batch_size} completions per optimizer step, but a "
                f"rollout batch holds only {self.completions_per_step} (batch_size x num_generations). Lower one of the two "
                "or raise batch_size."
            )

    def _check_best(self) -> None:
        if self.load_best_model_at_end and (self.keep_best is None or not self.save_every):
            raise ConfigError(
                "load_best_model_at_end: there is no best checkpoint. Set keep_best, for example to eval_reward, and save_every."
            )
        if not (self.keep_best or "").removeprefix("-").startswith("eval_"):
            return
        if not self.eval_prompts or not self.eval_every:
            name = "eval_every" if self.eval_prompts else "eval_prompts"
            raise ConfigError(f"keep_best: {self.keep_best} needs evaluations during training. Set {name} above 0.")
        by_epoch = -1 in (self.save_every, self.eval_every)
        apart = self.save_every != self.eval_every if by_epoch else self.save_every % self.eval_every
        if self.load_best_model_at_end and apart:
            raise ConfigError(
                f"load_best_model_at_end: save_every {self.save_every} isn't a multiple of eval_every {self.eval_every}, so "
                "checkpoints have no evaluation. Change one of the two."
            )

    def _check_model(self) -> None:
        if not self.disable_dropout:
            raise ConfigError(
                "disable_dropout: False isn't supported, because dropout in training but not in generation changes the policy "
                "ratio. Omit it; lora_dropout sets the dropout of adapters."
            )
        if self.cast_lm_head_to_fp32 and self.mixed_precision in ("bf16", "fp16"):
            raise ConfigError(
                f"cast_lm_head_to_fp32: with mixed_precision {self.mixed_precision}, the head computes in 16 bits as in the "
                "rollout engine, and only its logits become float32. Omit one of the two."
            )

    def _check_reference(self) -> None:
        if self.sync_ref_model and self.use_peft:
            raise ConfigError(
                "sync_ref_model: with use_peft, the reference policy is the model with its adapter disabled, so it can't follow "
                "the policy. Remove one of the two."
            )
        if self.sync_ref_model and self.kl_coef == 0:
            raise ConfigError("sync_ref_model: kl_coef 0 doesn't use the reference policy. Remove one of the two.")

    def _check_guardrails(self) -> None:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ConfigError("kl_target adapts kl_coef, but kl_coef is 0. Set kl_coef to a positive value.")
        if 0 < self.ratio_limit <= 1 + self.clip_high:
            raise ConfigError(
                f"ratio_limit: {self.ratio_limit:g} would skip ordinary updates. Set it far above 1, or to 0 to disable it."
            )

    def _check_rollout(self) -> None:
        rollout, pool = self.rollout, self.rollout.startswith(RAY)
        if rollout not in ENGINES and not RAY_ADDRESS.fullmatch(rollout) and not SERVER_ADDRESSES.fullmatch(rollout):
            raise ConfigError(
                f"rollout must be one of {', '.join(ENGINES)}, or {RAY}auto, {RAY}local, {RAY}HOST:PORT, "
                f"vllm://HOST:PORT,HOST:PORT, not {rollout!r}.{nearest(rollout, [*ENGINES, RAY + 'auto', RAY + 'local'])}"
            )
        servers = server_addresses(rollout)
        for address in servers:
            if int(address.rpartition(":")[2]) not in range(1, 1 << 16):
                raise ConfigError(f"rollout: {address} has no valid port. Give a port from 1 to 65535.")
            if servers.count(address) > 1:
                raise ConfigError(f"rollout: {address} is given twice. Give each server once.")
        if self.staleness and rollout in ("auto", "vllm"):
            raise ConfigError(
                f"staleness: {self.staleness} needs generation during training, which rollout {rollout} can't do. Use "
                f"{option('rollout', 'ray://local')} or vllm://HOST:PORT (other processes), or transformers (a "
                "copy of the model)."
            )
        if self.vllm_tensor_parallel_size > 1 and not pool:
            raise ConfigError(
                f"vllm_tensor_parallel_size is a setting of {RAY} pools, but rollout is {rollout}. Start servers with "
                "`vllm serve --tensor-parallel-size`; the trainer's own vLLM uses one GPU."
            )
        for setting in ("rollout_workers", "reward_workers"):
            if getattr(self, setting) and not pool:
                raise ConfigError(f"{setting} is a setting of {RAY} pools, but rollout is {rollout}. Remove one.")
        if self.load_in_4bit and (pool or servers or rollout == "vllm"):
            target = "a Ray pool" if pool else "vLLM's servers" if servers else "vLLM"
            raise ConfigError(
                f"load_in_4bit: {target} can't load 4-bit weights. Use {option('rollout', 'transformers')}, or auto."
            )

    @property
    def float32_setting(self) -> str | None:
        """The setting that needs ``mixed_precision`` no."""
        return "cast_lm_head_to_fp32" if self.cast_lm_head_to_fp32 else None

    def logs_step(self, step: int) -> bool:
        """Return whether trackers and callbacks log ``step``, which counts from 1."""
        return step % self.logging_steps == 0 or (step == 1 and self.logging_first_step)

    @property
    def needs_reference(self) -> bool:
        """Whether a training step needs the KL to the reference policy."""
        return self.kl_coef > 0 or self.kl_limit is not None

    @property
    def completions_per_step(self) -> int:
        """Completions in a full rollout batch."""
        return self.batch_size * self.num_generations

    @property
    def effective_micro_batch_size(self) -> int:
        """Completions per micro-batch, as gradient_accumulation_steps counts them; a pass can have other limits."""
        return self.micro_batch_size or min(DEFAULT_MICRO_BATCH, self.completions_per_step)

    @property
    def effective_rollout_batch_size(self) -> int:
        """Completions generated at a time, except by vLLM on a GPU."""
        return self.rollout_batch_size or DEFAULT_ROLLOUT_BATCH

    def vllm_batch_size(self, ranks: int, *, on_gpu: bool) -> int:
        """Completions that the vLLM of one of ``ranks`` trainer processes generates at a time.

        On a GPU, decoding reads all weights for each token, whether it is of 128 completions or of 512. So the default is all
        completions of a step on one rank, up to ``MAX_DEFAULT_ROLLOUT_BATCH``. vLLM queues those that don't fit into its cache.
        """
        if self.rollout_batch_size or not on_gpu:
            return self.effective_rollout_batch_size
        local = -(-self.batch_size // ranks) * self.num_generations
        return max(DEFAULT_ROLLOUT_BATCH, min(local, MAX_DEFAULT_ROLLOUT_BATCH))

    @property
    def optimizer_batch_size(self) -> int:
        """Completions per optimizer step."""
        if self.gradient_accumulation_steps is None:
            return self.completions_per_step
        return self.effective_micro_batch_size * self.gradient_accumulation_steps

    @property
    def learns_as_sampled(self) -> bool:
        """Whether training computes the distribution that was sampled: no filters and no dropout."""
        return not self.sampling_filters and not self.lora_dropout

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on a full rollout batch."""
        return self.num_iterations * -(-self.completions_per_step // self.optimizer_batch_size)


share_flags(ReinforceConfig, hidden=MODEL_CONFIG)


def server_addresses(rollout: str) -> list[str]:
    """Return the URLs of the servers in ``rollout``; empty for another kind of engine."""
    for prefix, scheme in SERVERS.items():
        if rollout.startswith(prefix):
            return [scheme + address for address in rollout.removeprefix(prefix).split(",")]
    return []
