"""Settings of OpenRLHF and verl by their names there: our setting, and how the value converts.

OpenRLHF renamed the flags of ``train_ppo_ray`` in 2026, so both names are listed. Sources: OpenRLHF 3c3be623
and 0.11.2 (``openrlhf/cli/train_ppo_ray.py``), verl 008db456 (``verl/trainer/config/ppo_trainer.yaml``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Foreign(NamedTuple):
    """Our counterpart of a setting.

    Attributes:
        setting: Name of our setting; None if there is none.
        note: How the value converts, or why there is no such setting; empty if the value stays the same.
        values: Our value by theirs, for choices.
    """

    setting: str | None
    note: str = ""
    values: Mapping[str, str] = {}


ESTIMATORS = {
    "gae": "ppo",
    "reinforce": "reinforce_plus_plus",
    "reinforce_baseline": "reinforce_plus_plus_baseline",
    "rloo": "rloo",
    "group_norm": "grpo",
    "flash_reinforce": "flash_reinforce",
    "grpo": "grpo",
    "reinforce_plus_plus": "reinforce_plus_plus",
    "reinforce_plus_plus_baseline": "reinforce_plus_plus_baseline",
}
PLACEMENT = "processes and GPUs are chosen by the launcher (docs/parallel.md) or a Ray pool (docs/ray.md)"
SHARDING = "give it to the launcher: accelerate launch --config_file FILE (docs/parallel.md)"
OVERLONG = "add rule:soft_overlong_punishment?max_completion_len=LONGEST&soft_punish_cache=LENGTH"
OVERLONG_FACTOR = "the weight of the rule: 0.5*rule:soft_overlong_punishment?..."
PER_UPDATE = "completions per optimizer step, which is micro_batch_size x gradient_accumulation_steps"

# Present name, old name (empty if it didn't change), counterpart.
_OPENRLHF: tuple[tuple[str, str, Foreign], ...] = (
    ("actor.model_name_or_path", "pretrain", Foreign("model")),
    ("reward.model_name_or_path", "reward_pretrain", Foreign("reward_model")),
    ("reward.remote_url", "remote_rm_url", Foreign("rewards", "one entry per URL")),
    ("data.prompt_dataset", "prompt_data", Foreign("data")),
    ("data.prompt_probs", "prompt_data_probs", Foreign("interleave_probs", "one number per dataset")),
    ("data.input_key", "input_key", Foreign("prompt_column")),
    ("data.label_key", "label_key", Foreign("columns", "write answer=COLUMN")),
    (
        "data.apply_chat_template",
        "apply_chat_template",
        Foreign("prompt_format", "auto uses the model's chat template"),
    ),
    ("data.max_len", "max_len", Foreign("max_length")),
    ("", "prompt_max_len", Foreign("max_prompt_length")),
    ("rollout.max_new_tokens", "generate_max_len", Foreign("max_new_tokens")),
    ("rollout.batch_size", "rollout_batch_size", Foreign("batch_size", "both count prompts per rollout batch")),
    ("rollout.n_samples_per_prompt", "n_samples_per_prompt", Foreign("num_generations")),
    (
        "rollout.micro_batch_size",
        "micro_rollout_batch_size",
        Foreign("rollout_batch_size", "completions generated at a time"),
    ),
    ("rollout.temperature", "temperature", Foreign("temperature")),
    ("rollout.top_p", "top_p", Foreign("top_p")),
    ("train.batch_size", "train_batch_size", Foreign("gradient_accumulation_steps", PER_UPDATE)),
    ("train.micro_batch_size", "micro_train_batch_size", Foreign("micro_batch_size")),
    ("train.max_epochs", "max_epochs", Foreign("num_iterations", "passes over a rollout batch")),
    ("train.num_episodes", "num_episodes", Foreign("num_train_epochs", "passes over the prompts")),
    ("train.seed", "seed", Foreign("seed")),
    ("train.async_enable", "async_train", Foreign("staleness", "1 or more")),
    ("actor.adam.lr", "actor_learning_rate", Foreign("learning_rate")),
    ("actor.learning_rate", "", Foreign("learning_rate")),
    ("critic.adam.lr", "critic_learning_rate", Foreign("critic_learning_rate")),
    ("actor.lr_scheduler", "lr_scheduler", Foreign("lr_scheduler_type")),
    ("actor.lr_warmup_ratio", "lr_warmup_ratio", Foreign("warmup_ratio")),
    ("actor.max_norm", "max_norm", Foreign("max_grad_norm")),
    ("actor.adam.weight_decay", "l2", Foreign("weight_decay")),
    ("actor.adam.betas", "adam_betas", Foreign("adam_beta1", "and adam_beta2")),
    ("actor.adam.eps", "", Foreign("adam_epsilon")),
    ("actor.eps_clip", "eps_clip", Foreign("clip_low", "and clip_high; or give epsilon for both")),
    ("actor.eps_clip_low_high", "eps_clip_low_high", Foreign("clip_low", "and clip_high")),
    ("actor.dual_clip", "dual_clip", Foreign("dual_clip")),
    ("actor.entropy_coef", "entropy_loss_coef", Foreign("entropy_coef")),
    ("actor.policy_loss_type", "policy_loss_type", Foreign("importance_sampling_level", "gspo is sequence")),
    ("actor.gradient_checkpointing_enable", "", Foreign("gradient_checkpointing")),
    ("critic.value_clip", "value_clip", Foreign("value_clip")),
    ("critic.model_name_or_path", "critic_pretrain", Foreign(None, "the critic is a copy of the policy")),
    ("algo.advantage.estimator", "advantage_estimator", Foreign("estimator", values=ESTIMATORS)),
    ("algo.advantage.gamma", "gamma", Foreign("gamma")),
    ("algo.advantage.lambd", "lambd", Foreign("gae_lambda")),
    ("algo.kl.init_coef", "init_kl_coef", Foreign("kl_coef")),
    ("algo.kl.target", "kl_target", Foreign("kl_target")),
    ("algo.kl.horizon", "kl_horizon", Foreign("kl_horizon")),
    ("algo.kl.use_loss", "use_kl_loss", Foreign("estimator", "the estimator decides: grpo has the KL in the loss")),
    ("algo.kl.estimator", "kl_estimator", Foreign("estimator", "k1 in the reward, k2 in the loss of grpo")),
    (
        "algo.advantage.is_correction_enable",
        "enable_vllm_is_correction",
        Foreign("importance_correction", "auto is on with vLLM"),
    ),
    (
        "algo.advantage.is_correction_level",
        "",
        Foreign(
            "importance_correction", "token with clip is tis, token with mask icepop, seq with binary_kl binary_kl"
        ),
    ),
    ("algo.advantage.is_correction_mode", "", Foreign("importance_correction", "clip is tis, mask is icepop")),
    ("algo.advantage.is_correction_gating", "", Foreign("importance_correction", "binary_kl, or a ratio")),
    (
        "algo.advantage.is_correction_threshold",
        "",
        Foreign("importance_low", "and importance_high; importance_max_kl with binary_kl"),
    ),
    ("actor.loss_agg_mode", "", Foreign("loss_type", "token-mean is dapo, seq-mean-token-mean is grpo")),
    ("algo.dynamic_filtering_enable", "dynamic_filtering", Foreign("dynamic_sampling")),
    (
        "algo.dynamic_filtering_range",
        "dynamic_filtering_reward_range",
        Foreign("dynamic_sampling", "groups whose rewards are all equal are replaced"),
    ),
    ("reward.clip_range", "reward_clip_range", Foreign("reward_clip_range")),
    ("reward.normalize_enable", "normalize_reward", Foreign("reward_normalize")),
    ("reward.overlong_buffer_len", "overlong_buffer_len", Foreign("rewards", OVERLONG)),
    ("reward.overlong_penalty_factor", "overlong_penalty_factor", Foreign("rewards", OVERLONG_FACTOR)),
    ("ckpt.output_dir", "save_path", Foreign("output_dir")),
    ("ckpt.path", "ckpt_path", Foreign("output_dir", "checkpoints are in its folder checkpoints")),
    ("ckpt.save_steps", "", Foreign("save_every", "-1 there is 0 here")),
    ("ckpt.max_num", "max_ckpt_num", Foreign("keep_last")),
    ("ckpt.load_enable", "load_checkpoint", Foreign("resume")),
    ("ckpt.best_metric_key", "", Foreign("keep_best")),
    ("eval.steps", "", Foreign("eval_every", "-1 there is 0 here")),
    ("eval.dataset", "eval_dataset", Foreign("heldout_fraction", "held-out prompts are split from data")),
    ("logger.logging_steps", "", Foreign("logging_steps")),
    ("logger.wandb.key", "use_wandb", Foreign("report_to", "wandb, after `wandb login`")),
    ("logger.wandb.run_name", "wandb_run_name", Foreign("run_name")),
    ("logger.tensorboard_dir", "use_tensorboard", Foreign("report_to", "tensorboard")),
    ("vllm.num_engines", "vllm_num_engines", Foreign("rollout_workers", "with rollout ray://auto")),
    ("vllm.tensor_parallel_size", "", Foreign("vllm_tensor_parallel_size")),
    ("vllm.gpu_memory_utilization", "", Foreign("vllm_gpu_memory_utilization")),
    ("vllm.enable_sleep", "vllm_enable_sleep", Foreign(None, "vLLM's memory is measured before the training")),
    ("ds.param_dtype", "param_dtype", Foreign("mixed_precision")),
    ("", "bf16", Foreign("mixed_precision", "bf16")),
    ("ds.attn_implementation", "", Foreign("attn_implementation")),
    ("ds.load_in_4bit", "", Foreign("load_in_4bit", "with use_peft")),
    ("ds.lora.rank", "lora_rank", Foreign("lora_r", "with use_peft")),
    ("ds.lora.alpha", "", Foreign("lora_alpha", "with use_peft")),
    ("ds.lora.dropout", "", Foreign("lora_dropout", "with use_peft")),
    ("ds.lora.target_modules", "target_modules", Foreign("lora_target_modules", "with use_peft")),
    ("ds.adam_offload", "adam_offload", Foreign("offload_optimizer")),
    ("ds.zero_stage", "zero_stage", Foreign(None, SHARDING)),
    ("ds.packing_samples", "packing_samples", Foreign(None, "rows of similar length are padded together")),
    ("actor.num_nodes", "actor_num_nodes", Foreign(None, PLACEMENT)),
    ("actor.num_gpus_per_node", "actor_num_gpus_per_node", Foreign(None, PLACEMENT)),
    ("ref.num_nodes", "ref_num_nodes", Foreign(None, PLACEMENT)),
    ("ref.num_gpus_per_node", "ref_num_gpus_per_node", Foreign(None, PLACEMENT)),
    ("reward.num_gpus_per_node", "reward_num_gpus_per_node", Foreign(None, PLACEMENT)),
    ("critic.num_gpus_per_node", "critic_num_gpus_per_node", Foreign(None, PLACEMENT)),
    ("train.colocate_all", "colocate_all_models", Foreign(None, PLACEMENT)),
)
OPENRLHF: Mapping[str, Foreign] = {
    name: foreign for present, old, foreign in _OPENRLHF for name in (present, old) if name
}
"""Counterparts of OpenRLHF's flags, under their present and old names."""
OPENRLHF_RENAMED: Mapping[str, str] = {old: present for present, old, _ in _OPENRLHF if present and old}
"""Present names of OpenRLHF's flags by their old ones."""

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
VERL: Mapping[str, Foreign] = {
    "data.train_files": Foreign("data"),
    "data.val_files": Foreign("heldout_fraction", "held-out prompts are split from data"),
    "data.prompt_key": Foreign("prompt_column"),
    "data.max_prompt_length": Foreign("max_prompt_length"),
    "data.max_response_length": Foreign("max_new_tokens"),
    "data.train_batch_size": Foreign("batch_size", "both count prompts per rollout batch"),
    "data.shuffle": Foreign(None, "every epoch has a new random order"),
    "data.filter_overlong_prompts": Foreign("long_prompts", "true is drop"),
    "data.truncation": Foreign("long_prompts", "cut drops the oldest turns"),
    "data.seed": Foreign("seed"),
    "data.sampler.class_path": Foreign("curriculum", "own samplers can't be given"),
    "actor_rollout_ref.model.path": Foreign("model"),
    "actor_rollout_ref.model.enable_gradient_checkpointing": Foreign("gradient_checkpointing"),
    "actor_rollout_ref.model.use_remove_padding": Foreign(None, "rows of similar length are padded together"),
    "actor_rollout_ref.model.lora_rank": Foreign("lora_r", "with use_peft"),
    "actor_rollout_ref.model.lora_alpha": Foreign("lora_alpha", "with use_peft"),
    "actor_rollout_ref.model.target_modules": Foreign("lora_target_modules", "with use_peft"),
    f"{ACTOR}.optim.lr": Foreign("learning_rate"),
    f"{ACTOR}.optim.lr_warmup_steps": Foreign("warmup_steps"),
    f"{ACTOR}.optim.lr_warmup_steps_ratio": Foreign("warmup_ratio"),
    f"{ACTOR}.optim.warmup_style": Foreign("lr_scheduler_type"),
    f"{ACTOR}.optim.weight_decay": Foreign("weight_decay"),
    f"{ACTOR}.ppo_mini_batch_size": Foreign(
        "gradient_accumulation_steps", f"prompts per optimizer step; times num_generations: {PER_UPDATE}"
    ),
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": Foreign("micro_batch_size"),
    f"{ACTOR}.ppo_micro_batch_size": Foreign("micro_batch_size", "divided by the number of GPUs"),
    f"{ACTOR}.ppo_epochs": Foreign("num_iterations", "passes over a rollout batch"),
    f"{ACTOR}.grad_clip": Foreign("max_grad_norm"),
    f"{ACTOR}.clip_ratio": Foreign("clip_low", "and clip_high; or give epsilon for both"),
    f"{ACTOR}.clip_ratio_low": Foreign("clip_low"),
    f"{ACTOR}.clip_ratio_high": Foreign("clip_high"),
    f"{ACTOR}.clip_ratio_c": Foreign("dual_clip"),
    f"{ACTOR}.entropy_coeff": Foreign("entropy_coef"),
    f"{ACTOR}.loss_agg_mode": Foreign("loss_type", "token-mean is dapo, seq-mean-token-mean is grpo"),
    f"{ACTOR}.use_kl_loss": Foreign("estimator", "the estimator decides: grpo has the KL in the loss"),
    f"{ACTOR}.kl_loss_coef": Foreign("kl_coef", "with the estimator grpo"),
    f"{ACTOR}.kl_loss_type": Foreign("estimator", "k2 in the loss of grpo"),
    f"{ACTOR}.fsdp_config.optimizer_offload": Foreign("offload_optimizer"),
    f"{ACTOR}.strategy": Foreign(None, SHARDING),
    f"{ROLLOUT}.name": Foreign("rollout", "vllm, or transformers for hf"),
    f"{ROLLOUT}.n": Foreign("num_generations"),
    f"{ROLLOUT}.temperature": Foreign("temperature"),
    f"{ROLLOUT}.top_p": Foreign("top_p"),
    f"{ROLLOUT}.top_k": Foreign("top_k", "-1 there is 0 here"),
    f"{ROLLOUT}.gpu_memory_utilization": Foreign("vllm_gpu_memory_utilization"),
    f"{ROLLOUT}.tensor_model_parallel_size": Foreign("vllm_tensor_parallel_size"),
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": Foreign("micro_batch_size", "log-probs use the same size"),
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": Foreign(
        "micro_batch_size", "log-probs use the same size"
    ),
    "critic.optim.lr": Foreign("critic_learning_rate"),
    "critic.cliprange_value": Foreign("value_clip"),
    "critic.model.path": Foreign(None, "the critic is a copy of the policy"),
    "reward_model.model.path": Foreign("reward_model"),
    "reward_model.enable": Foreign("reward_model", "give the folder of a reward model"),
    "reward_model.overlong_buffer.len": Foreign("rewards", OVERLONG),
    "reward_model.overlong_buffer.penalty_factor": Foreign("rewards", OVERLONG_FACTOR),
    "custom_reward_function.path": Foreign("rewards", "write FILE.py:FUNCTION"),
    "custom_reward_function.name": Foreign("rewards", "write FILE.py:FUNCTION"),
    "algorithm.adv_estimator": Foreign("estimator", values=ESTIMATORS),
    "algorithm.gamma": Foreign("gamma"),
    "algorithm.lam": Foreign("gae_lambda"),
    "algorithm.use_kl_in_reward": Foreign("estimator", "the estimator decides: only grpo has the KL in the loss"),
    "algorithm.kl_penalty": Foreign("estimator", "k1 in the reward, k2 in the loss of grpo"),
    "algorithm.rollout_correction.rollout_is": Foreign(
        "importance_correction", "token is tis, sequence is sequence_truncate"
    ),
    "algorithm.rollout_correction.rollout_is_threshold": Foreign("importance_high", "with importance_low 0"),
    "algorithm.kl_ctrl.kl_coef": Foreign("kl_coef"),
    "algorithm.filter_groups.enable": Foreign("dynamic_sampling"),
    "algorithm.filter_groups.max_num_gen_batches": Foreign("max_num_gen_batches", "0 there has no limit"),
    "algorithm.filter_groups.metric": Foreign("dynamic_sampling", "the sum of the rewards decides"),
    "algorithm.kl_ctrl.target_kl": Foreign("kl_target", "only with the type adaptive"),
    "algorithm.kl_ctrl.horizon": Foreign("kl_horizon"),
    "trainer.total_epochs": Foreign("num_train_epochs"),
    "trainer.total_training_steps": Foreign("max_steps", "both count rollout batches"),
    "trainer.experiment_name": Foreign("run_name"),
    "trainer.project_name": Foreign(None, "trackers use the project reinforcepp"),
    "trainer.logger": Foreign("report_to", "without console"),
    "trainer.save_freq": Foreign("save_every", "-1 there is 0 here"),
    "trainer.test_freq": Foreign("eval_every", "-1 there is 0 here"),
    "trainer.val_before_train": Foreign("eval_prompts", "0 omits the evaluation"),
    "trainer.default_local_dir": Foreign("output_dir"),
    "trainer.resume_mode": Foreign("resume", "auto there is true here if there is a checkpoint"),
    "trainer.resume_from_path": Foreign("resume"),
    "trainer.max_actor_ckpt_to_keep": Foreign("keep_last"),
    "trainer.nnodes": Foreign(None, PLACEMENT),
    "trainer.n_gpus_per_node": Foreign(None, PLACEMENT),
}
"""Counterparts of verl's settings, as its overrides name them."""


def foreign_hint(name: str) -> str:
    """Return a sentence about a setting of OpenRLHF or verl, or an empty string."""
    for project, table in (("OpenRLHF", OPENRLHF), ("verl", VERL)):
        if (foreign := table.get(name)) is not None and foreign.setting != name:
            if foreign.setting is None:
                return f" It is a setting of {project} without an equivalent here: {foreign.note}."
            note = f" ({foreign.note})" if foreign.note else ""
            return f" {project}'s {name} is {foreign.setting} here{note}."
    return ""
