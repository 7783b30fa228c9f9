"""Settings of the algorithm and its training loop."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from reinforcepp.algorithm.estimators import ESTIMATORS, EstimatorName, EstimatorSpec
from reinforcepp.config._checks import check_sampling, check_trackers, check_values, fraction, not_negative, positive
from reinforcepp.config.base import Config
from reinforcepp.config.chat_template import Framing, check_framing
from reinforcepp.config.checkpointing import Keeping, check_keeping
from reinforcepp.config.lora import check_adapters
from reinforcepp.config.precision import Computing
from reinforcepp.config.rewards import RewardSettings, check_reward_settings
from reinforcepp.errors import ConfigError, nearest

DEFAULT_MICRO_BATCH = 8
ENGINES = ("auto", "transformers", "vllm")
RAY = "ray://"
RAY_ADDRESS = re.compile(r"ray://(auto|local|[^\s/:]+:\d{1,5})")
SERVERS = {"vllm://": "http://", "vllm+https://": "https://"}
SERVER = r"([^\s/:,@\[\]]+|\[[0-9a-fA-F:.]+\]):\d{1,5}"
SERVER_ADDRESSES = re.compile(rf"vllm(\+https)?://{SERVER}(,{SERVER})*")


@dataclass(frozen=True)
class ReinforceConfig(RewardSettings, Framing, Computing, Keeping, Config):
    """Settings of REINFORCE++ training."""

    output_dir: str = "runs/train"
    """Folder for the trained model, the metrics and the checkpoints."""
    seed: int = 42
    """Decides the order of the prompts and every sampled token."""

    batch_size: int = 8
    """Prompts per training step; the last batch of an epoch may be shorter."""
    num_generations: int = 1
    """Completions sampled per prompt; estimators that compare them (all with baseline, rloo, grpo) need at least 2."""
    micro_batch_size: int | None = None
    """Completions per forward and backward pass; less needs less memory and changes nothing else. Default: 8."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches per optimizer step. Default: as many as there are, so one optimiser step per rollout batch."""
    num_iterations: int = 1
    """How often each rollout batch is trained on."""
    num_train_epochs: int = 1
    """Passes over the prompts."""
    max_steps: int = 0
    """Training steps (rollout batches); 0 follows num_train_epochs."""

    max_length: int = 512
    """Limit for prompt and completion together, in tokens."""
    max_prompt_length: int = 128
    """Limit for the framed prompt, in tokens."""
    max_new_tokens: int = 384
    """Limit for a completion, in tokens."""
    long_prompts: Literal["cut", "drop"] = "cut"
    """What happens to a prompt over the limit: its text is cut from the left, or it is left out. Either is reported."""

    estimator: EstimatorName = "reinforce_plus_plus"
    """How advantages are estimated; rloo, grpo and ppo are there to compare with."""
    kl_coef: float = 0.1
    """Weight of the KL to the reference policy; higher keeps the policy closer to where it started."""
    gamma: float = 1.0
    """Discount per token."""
    clip_low: float = 0.2
    """How far below 1 the policy ratio counts; matters only with several optimiser steps per batch."""
    clip_high: float = 0.2
    """How far above 1 the policy ratio counts."""
    dual_clip: float | None = None
    """Bound on the loss of tokens with a negative advantage, in multiples of it; off by default."""
    normalize_over: Literal["tokens", "sequences"] = "tokens"
    """Population of the advantage normalisation: every token (the paper's code) or every sequence once."""

    gae_lambda: float = 0.95
    """Only ppo: 0 trusts the critic's next estimate alone, 1 what was seen alone."""
    value_clip: float | None = 0.2
    """Only ppo: how far a value may move from the one at sampling before it stops counting."""
    critic_learning_rate: float | None = None
    """Only ppo: peak learning rate of the critic. Default: learning_rate."""

    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Optimiser steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    offload_optimizer: bool = False
    """Keep what AdamW needs in main memory and let the CPU make its steps: the GPU then holds neither float32 weights nor
    gradients nor moments, 16 bytes less a weight that learns; steps take longer. Without a GPU it changes nothing."""

    temperature: float = 1.0
    """Sampling temperature of rollouts, also applied to every log-probability in training."""
    top_p: float = 1.0
    """Nucleus sampling of rollouts. Anything but 1 biases the policy ratio, so training samples the full distribution."""
    top_k: int = 0
    """Top-k sampling of rollouts; 0 is off. Anything else biases the policy ratio."""
    rollout: str = "auto"
    """Engine that generates the rollouts: transformers, vllm, a pool of them by Ray: ray://auto for the cluster that this
    machine is part of, ray://local, ray://HOST:PORT, or servers that `vllm serve` runs: vllm://HOST:PORT,HOST:PORT, with
    the key in VLLM_API_KEY. auto takes vLLM where it is installed and runs the model, else transformers."""
    rollout_workers: int = 0
    """Only Ray: engines in the pool, at most; 0 is one for each GPU of the cluster or, where it has none, for each CPU."""
    reward_workers: int = 0
    """Only Ray: processes of the pool that score with the trained reward models, in the trainer's place; 0 is none. Each takes a
    GPU or, where there is none, a CPU; rollouts get the rest."""
    rollout_batch_size: int = 128
    """Completions generated at a time; memory grows with it, results don't change."""
    staleness: int = 0
    """Steps by which generation runs ahead: the completions of a step come from the weights that many steps before, and are
    generated while the steps between are trained on. 0 waits for the present weights."""
    importance_correction: Literal["auto", "tis", "icepop", "off"] = "auto"
    """Correction for an engine whose log-probabilities differ from the trainer's; auto is tis for any engine but
    transformers, and with staleness, else off."""
    importance_low: float = 0.5
    """Lower bound of the importance weight."""
    importance_high: float = 2.0
    """Upper bound of the importance weight."""
    sync_check_every: int = 50
    """Steps between checks that the rollout engine really holds the trainer's weights; the first sync is always checked."""
    vllm_gpu_memory_utilization: float | None = None
    """Share of the GPU's memory for vLLM; measured by default."""
    vllm_tensor_parallel_size: int = 1
    """Only Ray: GPUs of a machine that share the model in each engine of the pool."""

    eval_prompts: int = 64
    """Held-out prompts answered before and after training; 0 skips the comparison."""
    eval_every: int = 0
    """Steps between further answers to them in the course of training; 0 is never."""
    log_completions: bool = True
    """Write every completion of every step, with its reward, KL and length, to a Parquet file in completions."""
    report_to: tuple[str, ...] = ()
    """Trackers for the figures of every step: tensorboard wandb mlflow trackio comet_ml aim clearml dvclive swanlab."""

    kl_target: float | None = None
    """KL to the start, in nats per token, to which kl_coef is adapted in the course of training; off by default."""
    kl_horizon: float = 10_000.0
    """Completions over which an error of a fifth in the KL changes kl_coef by a fifth; matters only with kl_target."""
    kl_limit: float | None = 5.0
    """KL to the start, in nats per token, over which the policy counts as run off; None switches the rule off."""
    kl_action: Literal["stop", "rollback"] = "stop"
    """Over kl_limit: stop, or go back to the last checkpoint and on at half the learning rate, three times at most."""
    ratio_limit: float = 10_000.0
    """An update in which a token's policy ratio, or its inverse, is larger is left out; 0 is off."""
    collapse_length: float = 0.1
    """Stop when completions stay shorter than this share of what they were in the first step; 0 is off."""
    collapse_entropy: float = 0.01
    """Stop when the entropy stays below this share of the first step's; 0 is off."""
    collapse_distinct: float = 0.1
    """Stop when the share of distinct completions stays below this share of the first step's; 0 is off."""

    def __post_init__(self) -> None:
        """Check each value, then what they mean together."""
        check_values(self)
        check_trackers(self)
        check_sampling(self)
        check_rollout(self)
        positive(self, "max_prompt_length")
        positive(self, "temperature")
        positive(self, "batch_size", "num_generations", "micro_batch_size", "gradient_accumulation_steps")
        positive(self, "num_iterations", "num_train_epochs", "max_length", "clip_low", "clip_high")
        positive(self, "learning_rate", "max_grad_norm", "rollout_batch_size", "importance_low", "sync_check_every")
        not_negative(
            self,
            "max_steps",
            "kl_coef",
            "gamma",
            "warmup_steps",
            "weight_decay",
            "eval_prompts",
            "eval_every",
            "ratio_limit",
        )
        check_keeping(self)
        check_adapters(self)
        check_framing(self)
        check_reward_settings(self)
        positive(self, "kl_target", "kl_horizon", "kl_limit")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ConfigError("kl_target adapts kl_coef, which is 0: give it a positive value to begin with.")
        fraction(self, "collapse_length", "collapse_entropy", "collapse_distinct")
        if 0 < self.ratio_limit <= 1 + self.clip_high:
            raise ConfigError(
                f"ratio_limit {self.ratio_limit:g} would leave out ordinary updates: set it far above 1, or 0 for off."
            )
        positive(self, "value_clip", "critic_learning_rate")
        not_negative(self, "gae_lambda")
        for name in ("gamma", "gae_lambda"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{name} must be at most 1, not {getattr(self, name)}.")
        if self.clip_low >= 1:
            raise ConfigError(f"clip_low must be below 1, not {self.clip_low}.")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ConfigError(f"dual_clip must be greater than 1, not {self.dual_clip}.")
        if self.vllm_gpu_memory_utilization is not None and not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ConfigError(
                f"vllm_gpu_memory_utilization must be above 0 and at most 1, not {self.vllm_gpu_memory_utilization}."
            )
        if self.importance_high < self.importance_low:
            raise ConfigError(f"importance_high {self.importance_high} is below importance_low {self.importance_low}.")
        if self.max_prompt_length + self.max_new_tokens > self.max_length:
            raise ConfigError(
                f"max_prompt_length {self.max_prompt_length} + max_new_tokens {self.max_new_tokens} exceed max_length "
                f"{self.max_length}: lower one of the two or raise max_length."
            )
        if self.estimator_spec.grouped and self.num_generations < 2:
            raise ConfigError(
                f"The estimator {self.estimator} compares samples of one prompt: set num_generations to 2 or more, or use "
                "the estimator reinforce_plus_plus."
            )
        if self.estimator_spec.grouped and self.gamma != 1:
            raise ConfigError(f"The estimator {self.estimator} needs gamma 1, because it has no rewards per token.")
        if self.optimizer_batch_size > self.completions_per_step:
            raise ConfigError(
                f"micro_batch_size {self.effective_micro_batch_size} x gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} is {self.optimizer_batch_size} completions per optimizer step, but a "
                f"rollout batch holds only {self.completions_per_step} (batch_size x num_generations). Lower one of the two "
                "or raise batch_size."
            )

    @property
    def estimator_spec(self) -> EstimatorSpec:
        """What the estimator is made of."""
        return ESTIMATORS[self.estimator]

    @property
    def completions_per_step(self) -> int:
        """Completions in a full rollout batch."""
        return self.batch_size * self.num_generations

    @property
    def effective_micro_batch_size(self) -> int:
        """Completions per forward and backward pass."""
        return self.micro_batch_size or min(DEFAULT_MICRO_BATCH, self.completions_per_step)

    @property
    def optimizer_batch_size(self) -> int:
        """Completions per optimiser step."""
        if self.gradient_accumulation_steps is None:
            return self.completions_per_step
        return self.effective_micro_batch_size * self.gradient_accumulation_steps

    @property
    def learns_as_sampled(self) -> bool:
        """Whether a pass that learns sees the distribution that was sampled: nothing cut off, nothing dropped at random."""
        return self.top_p == 1 and self.top_k == 0 and not self.lora_dropout

    @property
    def updates_per_step(self) -> int:
        """Optimiser steps on a full rollout batch."""
        return self.num_iterations * -(-self.completions_per_step // self.optimizer_batch_size)


def check_rollout(config: ReinforceConfig) -> None:
    """Check what names the engine."""
    named, pool = config.rollout, config.rollout.startswith(RAY)
    if named not in ENGINES and not RAY_ADDRESS.fullmatch(named) and not SERVER_ADDRESSES.fullmatch(named):
        raise ConfigError(
            f"rollout must be one of {', '.join(ENGINES)}, or {RAY}auto, {RAY}local, {RAY}HOST:PORT, "
            f"vllm://HOST:PORT,HOST:PORT, not {named!r}.{nearest(named, [*ENGINES, RAY + 'auto', RAY + 'local'])}"
        )
    servers = server_addresses(named)
    for address in servers:
        if int(address.rpartition(":")[2]) not in range(1, 1 << 16) or servers.count(address) > 1:
            raise ConfigError(f"rollout names {address}, which is no port or named twice: give each server once.")
    not_negative(config, "rollout_workers", "reward_workers", "staleness")
    if config.staleness and named in ("auto", "vllm"):
        raise ConfigError(
            f"With staleness, completions are generated while the trainer computes, which rollout {named} can't: use one that "
            "has processes of its own, --rollout ray://local or vllm://HOST:PORT, or a copy of the model in this one, --rollout "
            "transformers."
        )
    positive(config, "vllm_tensor_parallel_size")
    if config.vllm_tensor_parallel_size > 1 and not pool:
        raise ConfigError(
            f"vllm_tensor_parallel_size is a setting of {RAY} pools, and rollout is {named}: servers are started with "
            "`vllm serve --tensor-parallel-size`, and the trainer's own vLLM has one GPU."
        )
    for setting in ("rollout_workers", "reward_workers"):
        if getattr(config, setting) and not pool:
            raise ConfigError(f"{setting} is a setting of {RAY} pools, and rollout is {named}: leave one of them out.")
    if (pool or servers) and config.load_in_4bit:
        whom = "a Ray pool" if pool else "vLLM's servers"
        raise ConfigError(f"Weights of 4 bits can't be handed to {whom}: use --rollout transformers, or auto.")


def server_addresses(rollout: str) -> list[str]:
    """Where the servers are that ``rollout`` names, if it names any."""
    for prefix, scheme in SERVERS.items():
        if rollout.startswith(prefix):
            return [scheme + address for address in rollout.removeprefix(prefix).split(",")]
    return []
