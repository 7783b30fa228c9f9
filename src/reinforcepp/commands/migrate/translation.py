"""Translate the settings of a training from TRL, OpenRLHF or verl to those of ``reinforcepp train``.

A framework's defaults are part of a training, so the result holds them, too. Sources: TRL 1.16 (PPO: TRL 0.29), OpenRLHF and
verl as in :mod:`reinforcepp.config.foreign_names`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from reinforcepp.commands.migrate.reading import TITLES, Training
from reinforcepp.config import TrainConfig
from reinforcepp.config.aliases import aliases_of, translated
from reinforcepp.config.foreign_names import ESTIMATORS, OPENRLHF, OPENRLHF_RENAMED, VERL, Foreign
from reinforcepp.config.values import accepted_values
from reinforcepp.errors import ConfigError, nearest


@dataclass
class Translation:
    """The result of a translation.

    Attributes:
        settings: Our settings.
        origins: Their names by our settings; empty for a default.
        notes: What was omitted, by their names, with the reason.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def give(self, origin: str, settings: Mapping[str, Any]) -> None:
        """Add our settings for the setting ``origin``."""
        self.settings |= settings
        self.origins |= dict.fromkeys(settings, origin)


ONLY_PPO = ("gae_lambda", "value_clip", "critic_learning_rate")


def translate(training: Training) -> Translation:
    """Return our settings for a training."""
    result = {"openrlhf": _from_openrlhf, "verl": _from_verl}.get(training.framework, _from_trl)(training)
    for name, text in training.unread.items():
        if not result.origins.get(SCRIPT_NAMES.get(name, name)):  # otherwise another name gives it
            result.notes.setdefault(name, SCRIPT_NOTES.get(name, f"the source doesn't show its value ({text})"))
    if result.settings.get("estimator") != "ppo":
        result.settings = {name: value for name, value in result.settings.items() if name not in ONLY_PPO}
    return result


# --- TRL --------------------------------------------------------------------------------------------------------------

TRL_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "trl-rloo": {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "linear",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": True,
        "bf16": True,
        "max_completion_length": 512,
        "num_generations": 2,
        "beta": 0.05,
        "save_steps": 500,
        "use_vllm": False,
    },
    "trl-ppo": {
        "learning_rate": 3e-6,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "response_length": 53,
        "temperature": 0.7,
        "kl_coef": 0.05,
        "lam": 0.95,
        "save_steps": 500,
        "use_vllm": False,
    },
}
TRL_DEFAULTS = {
    **TRL_DEFAULTS,
    "trl-grpo": {
        **TRL_DEFAULTS["trl-rloo"],
        "num_generations": 8,
        "beta": 0.0,
        "use_bias_correction_kl": True,
    },
}
METHODS = {
    "trl-rloo": {"estimator": "rloo", "loss_type": "rloo"},
    "trl-grpo": {"estimator": "grpo"},
    "trl-ppo": {"estimator": "ppo"},
}
SCRIPT_NAMES = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "train_dataset": "data",
    "reward_model_name_or_path": "reward_model",
    "reward_model_path": "reward_model",
    "reward_funcs": "rewards",
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "response_length": "max_new_tokens",
    "num_ppo_epochs": "num_iterations",
    "lam": "gae_lambda",
    "cliprange_value": "value_clip",
    "cliprange": "epsilon",
    "missing_eos_penalty": "truncation_penalty",
    "local_rollout_forward_batch_size": "rollout_batch_size",
}
"""Our names of flags and arguments of TRL's scripts, of peft's LoraConfig and of PPOConfig."""
SCRIPT_NOTES = {
    "train_dataset.map": "the script changes the rows; write them to a file, and give it as data",
    "eval_dataset": "held-out prompts are split from data (heldout_fraction)",
    "dataset_train_split": "write it as part of data: FILE?split=NAME, or give the file of the split",
    "dataset_test_split": "held-out prompts are split from data (heldout_fraction)",
    "dataset_config": "give the files of the configuration as data",
    "sft_model_path": "the reference policy is the model at the start of the training",
    "value_model": "the critic is a copy of the policy",
    "vf_coef": "the critic has its own optimizer, with critic_learning_rate",
    "whiten_rewards": "advantages are standardized over the batch",
    "num_sample_generations": "evaluations keep their completions (eval_every)",
    "environment_factory": "write a class with reset and step, see docs/environments.md",
    "tools": "give it to ReinforceTrainer as it is, or name the functions in tools",
    "task_type": "the training decides",
}


def _from_trl(training: Training) -> Translation:
    result = Translation()
    result.give(TITLES[training.framework], METHODS[training.framework])
    given: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, value in {**TRL_DEFAULTS[training.framework], **training.given}.items():
        if name in SCRIPT_NOTES:
            result.notes[name] = SCRIPT_NOTES[name]
            continue
        ours = SCRIPT_NAMES.get(name, name)
        given[ours], origins[ours] = value, name if name in training.given else ""
    if training.framework == "trl-ppo":
        given |= _ppo_batches(given)
    if isinstance(given.get("rewards"), str):
        given["rewards"] = [given["rewards"]]
    if "dtype" in given:
        given["model_init_kwargs"] = {**given.get("model_init_kwargs", {}), "dtype": given.pop("dtype")}
    known = accepted_values(TrainConfig).keys() | aliases_of(TrainConfig).keys()
    for name in sorted(given.keys() - known):
        result.notes[origins.get(name) or name] = "no such setting here" + nearest(name, known)
        del given[name]
    settings, renamed = _convertible(given, result)
    for name, value in settings.items():
        origin = renamed.get(name, name)
        result.give(origins.get(origin, ""), {name: value})
    return result


def _ppo_batches(given: dict[str, Any]) -> dict[str, Any]:
    """Return our batches for those of TRL's PPO trainer, which samples one completion per prompt; remove them from ``given``."""
    device_batch = int(given.pop("per_device_train_batch_size"))
    accumulation = int(given.pop("gradient_accumulation_steps", 1))
    prompts = device_batch * accumulation * int(given.pop("num_mini_batches"))
    batches = {"batch_size": prompts, "micro_batch_size": device_batch, "gradient_accumulation_steps": accumulation}
    if (episodes := given.pop("total_episodes", None)) is not None:
        batches["max_steps"] = -(-int(episodes) // prompts)
    return batches


def _convertible(given: dict[str, Any], result: Translation) -> tuple[dict[str, Any], dict[str, str]]:
    """Return our settings for those of TRL, and TRL's names of them; settings that can't be converted become notes."""
    while True:
        try:
            return translated(TrainConfig, given)
        except ConfigError as error:
            name, _, reason = str(error).partition(": ")
            if name not in given:
                raise
            result.notes[name] = reason
            del given[name]


# --- OpenRLHF and verl ------------------------------------------------------------------------------------------------

UNKNOWN = Foreign(None, "no such setting here")
Convert = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
"""Returns our settings from the value of a setting, and all values of the training."""


def _from_table(
    training: Training, table: Mapping[str, Foreign], given: Mapping[str, Any], conversions: Mapping[str, Convert]
) -> Translation:
    """Translate each setting by its conversion, or as ``table`` says."""
    result = Translation()
    known = accepted_values(TrainConfig)
    for name, value in given.items():
        origin = name if name in training.given else ""
        foreign = table.get(name, UNKNOWN)
        if foreign.setting is not None and foreign.setting not in known:
            foreign = UNKNOWN
        if name in conversions:
            try:
                result.give(origin, conversions[name](value, given))
            except (ConfigError, ValueError, TypeError) as error:
                result.notes[name] = str(error)
        elif foreign.setting is None or foreign.note:
            if origin:
                result.notes[name] = f"{foreign.setting}: {foreign.note}" if foreign.setting else foreign.note
        elif value is not None:
            value = foreign.values.get(str(value), value)
            result.give(origin, {foreign.setting: [value] if tuple in known[foreign.setting].kinds else value})
    return result


def _accumulation(optimizer: int, micro: int, completions: int) -> dict[str, Any]:
    """Return the micro-batches per optimizer step, unless a step has all completions of a rollout batch."""
    if optimizer >= completions:
        return {}
    if optimizer % micro:
        raise ConfigError(f"{optimizer} completions per optimizer step aren't a multiple of the micro-batch {micro}")
    return {"gradient_accumulation_steps": optimizer // micro}


def _steps(setting: str) -> Convert:
    return lambda value, _: {setting: max(0, int(value))}


def _lora(rank: Any) -> dict[str, Any]:
    return {"use_peft": True, "lora_r": int(rank)} if int(rank) else {}


def _rewards(value: Any, _: Any = None) -> dict[str, Any]:
    sources = value if isinstance(value, list) else str(value).split(",")
    if any(source.endswith(".py") for source in sources):
        raise ConfigError(
            "a reward function here is FILE.py:FUNCTION, and takes prompts and completions (docs/rewards.md)"
        )
    return {"rewards": sources}


def _clip(value: Any) -> dict[str, Any]:
    low, high = (float(bound) for bound in (value if isinstance(value, (list, tuple)) else str(value).split()))
    if low != -high:
        raise ConfigError("only a symmetric range can be given, as reward_clip")
    return {"reward_clip": high}


OPENRLHF_DEFAULTS: Mapping[str, Any] = {
    "rollout.batch_size": 1024,
    "rollout.n_samples_per_prompt": 1,
    "train.batch_size": 128,
    "train.micro_batch_size": 1,
    "actor.adam.lr": 1e-6,
    "actor.adam.betas": [0.9, 0.95],
    "actor.adam.eps": 1e-8,
    "actor.adam.weight_decay": 0.0,
    "actor.max_norm": 1.0,
    "actor.gradient_checkpointing_enable": False,
    "actor.eps_clip": 0.2,
    "actor.dual_clip": None,
    "actor.entropy_coef": None,
    "actor.lr_scheduler": "cosine_with_min_lr",
    "actor.lr_warmup_ratio": 0.03,
    "critic.adam.lr": 9e-6,
    "critic.value_clip": 0.5,
    "algo.advantage.estimator": "gae",
    "algo.advantage.lambd": 1.0,
    "algo.advantage.gamma": 1.0,
    "algo.kl.init_coef": 0.01,
    "algo.kl.target": None,
    "algo.kl.horizon": 10_000,
    "reward.clip_range": [-10, 10],
    "reward.normalize_enable": False,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "train.max_epochs": 1,
    "train.num_episodes": 1,
    "train.seed": 42,
    "ds.adam_offload": False,
    "ckpt.max_num": 3,
    "eval.steps": -1,
    "logger.logging_steps": 1,
    "data.max_len": 2048,
    "data.input_key": "input",
    "rollout.max_new_tokens": None,
    "ds.param_dtype": "bf16",
    "vllm.num_engines": None,
    "ckpt.save_steps": -1,
}


def _openrlhf_accumulation(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    completions = int(given["rollout.batch_size"]) * int(given["rollout.n_samples_per_prompt"])
    return _accumulation(int(value), int(given["train.micro_batch_size"]), completions)


def _openrlhf_lengths(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return both lengths; OpenRLHF's responses can have what a prompt leaves of the total."""
    longest = int(given["data.max_len"])
    return {"max_length": longest, "max_new_tokens": int(value) if value is not None else longest // 2}


def _openrlhf_schedule(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if value != "cosine_with_min_lr":
        return {"lr_scheduler_type": value}
    return {"lr_scheduler_type": value, "lr_scheduler_kwargs": {"min_lr_rate": given.get("actor.min_lr_ratio", 0.1)}}


def _betas(value: Any, _: Any = None) -> dict[str, Any]:
    first, second = map(float, value)
    return {"adam_beta1": first, "adam_beta2": second}


def _estimator(value: Any, *, scaled: bool = True) -> dict[str, Any]:
    if value not in ESTIMATORS:
        raise ConfigError(f"estimator {value!r} isn't available, only {', '.join(ESTIMATORS)}")
    return {"estimator": ESTIMATORS[value], **({} if scaled else {"scale_rewards": "none"})}


def _openrlhf_estimator(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    return _estimator("grpo", scaled=False) if value == "dr_grpo" else _estimator(value)


TOKEN_CORRECTIONS = {"clip": "tis", "mask": "icepop"}
LOSS_AGGREGATIONS = {"token-mean": "dapo", "seq-mean-token-mean": "grpo"}


def _one_of(choices: Mapping[str, str], value: Any) -> str:
    if value not in choices:
        raise ConfigError(f"{value!r} isn't available, only {', '.join(choices)}")
    return choices[value]


def _openrlhf_correction(level: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the correction of the engine's log-probabilities, which OpenRLHF builds of level, mode, gating and threshold."""
    mode, gating, threshold = (
        given.get(f"algo.advantage.is_correction_{part}") for part in ("mode", "gating", "threshold")
    )
    mode, gating, threshold = mode or "mask", gating or "ratio", threshold or [0.5, 5.0]
    bounds = [float(bound) for bound in (threshold if isinstance(threshold, (list, tuple)) else str(threshold).split())]
    if level == "off":
        return {"importance_correction": "off"}
    if (level, mode, gating) == ("seq", "mask", "binary_kl"):
        return {"importance_correction": "binary_kl", "importance_max_kl": bounds[-1]}
    if (level, gating) == ("token", "ratio"):
        correction, low = _one_of(TOKEN_CORRECTIONS, mode), bounds[0] if len(bounds) > 1 else 0.0
        return {"importance_correction": correction, "importance_low": low, "importance_high": bounds[-1]}
    raise ConfigError(
        f"{level} with {mode} and {gating} isn't available, only token with ratio, and seq with mask and binary_kl"
    )


def _loss_aggregation(value: Any, _: Any = None) -> dict[str, Any]:
    return {"loss_type": _one_of(LOSS_AGGREGATIONS, value)}


NOTHING: Convert = lambda value, given: {}  # noqa: E731  (the setting is part of another one's conversion)
OPENRLHF_CONVERSIONS: Mapping[str, Convert] = {
    "rollout.batch_size": lambda value, _: {"batch_size": int(value)},
    "train.batch_size": _openrlhf_accumulation,
    "data.max_len": NOTHING,
    "rollout.max_new_tokens": _openrlhf_lengths,
    "reward.remote_url": _rewards,
    "reward.clip_range": lambda value, _: _clip(value),
    "data.prompt_probs": lambda value, _: (
        {"interleave_probs": [float(share) for share in str(value).split(",")]} if value else {}
    ),
    "data.label_key": lambda value, _: {"columns": [f"label={value}"]},
    "data.apply_chat_template": NOTHING,
    "train.max_epochs": lambda value, _: {"num_iterations": int(value)},
    "train.num_episodes": lambda value, _: {"num_train_epochs": int(value)},
    "train.async_enable": lambda value, _: {"staleness": 1},
    "actor.adam.betas": _betas,
    "actor.lr_scheduler": _openrlhf_schedule,
    "actor.min_lr_ratio": NOTHING,
    "actor.eps_clip": lambda value, _: {"clip_low": float(value), "clip_high": float(value)},
    "actor.eps_clip_low_high": lambda value, _: {"clip_low": float(value[0]), "clip_high": float(value[1])},
    "actor.policy_loss_type": lambda value, _: {"importance_sampling_level": "sequence"} if value == "gspo" else {},
    "algo.advantage.estimator": _openrlhf_estimator,
    "algo.advantage.is_correction_enable": lambda value, _: {"importance_correction": "tis"},
    "algo.advantage.is_correction_level": _openrlhf_correction,
    "algo.advantage.is_correction_mode": NOTHING,
    "algo.advantage.is_correction_gating": NOTHING,
    "algo.advantage.is_correction_threshold": NOTHING,
    "actor.loss_agg_mode": _loss_aggregation,
    "ckpt.save_steps": _steps("save_every"),
    "eval.steps": _steps("eval_every"),
    "logger.wandb.key": lambda value, _: {"report_to": ["wandb"]},
    "logger.tensorboard_dir": lambda value, _: {"report_to": ["tensorboard"]},
    "vllm.num_engines": lambda value, _: (
        {"rollout": "ray://auto", "rollout_workers": int(value)}
        if value and int(value)
        else {"rollout": "transformers"}
    ),
    "bf16": lambda value, _: {"mixed_precision": "bf16"},
    "ds.lora.rank": lambda value, _: _lora(value),
}


def _from_openrlhf(training: Training) -> Translation:
    renamed = {OPENRLHF_RENAMED.get(name, name): value for name, value in training.given.items()}
    present = Training(training.framework, renamed, training.unread)
    return _from_table(present, OPENRLHF, {**OPENRLHF_DEFAULTS, **renamed}, OPENRLHF_CONVERSIONS)


ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
VERL_DEFAULTS: Mapping[str, Any] = {
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    f"{ROLLOUT}.n": 1,
    f"{ROLLOUT}.name": "vllm",
    f"{ROLLOUT}.tensor_model_parallel_size": 2,
    f"{ACTOR}.ppo_mini_batch_size": 256,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": None,
    f"{ACTOR}.optim.lr": 1e-6,
    f"{ACTOR}.optim.weight_decay": 0.01,
    f"{ACTOR}.clip_ratio_c": 3.0,
    f"{ACTOR}.use_kl_loss": False,
    "critic.optim.lr": 1e-5,
    "critic.cliprange_value": 0.5,
    "algorithm.adv_estimator": "gae",
    "algorithm.lam": 1.0,
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_ctrl.kl_coef": 0.001,
    "trainer.total_epochs": 30,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
}


def _verl_micro_batch(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the micro-batch; verl has no default, so it's the completions of a prompt."""
    return {"micro_batch_size": int(value or given.get(f"{ACTOR}.ppo_micro_batch_size") or given[f"{ROLLOUT}.n"])}


def _verl_accumulation(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the micro-batches per optimizer step; verl's mini-batch counts prompts."""
    per_prompt = int(given[f"{ROLLOUT}.n"])
    micro = _verl_micro_batch(given[f"{ACTOR}.ppo_micro_batch_size_per_gpu"], given)["micro_batch_size"]
    return _accumulation(int(value) * per_prompt, micro, int(given["data.train_batch_size"]) * per_prompt)


def _verl_kl(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weight of the KL, which verl has in the reward, in the loss, or nowhere."""
    if given["algorithm.use_kl_in_reward"]:
        return {"kl_coef": value}
    return {"kl_coef": given.get(f"{ACTOR}.kl_loss_coef", 0.001) if given[f"{ACTOR}.use_kl_loss"] else 0.0}


def _verl_rollout(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if int(given[f"{ROLLOUT}.tensor_model_parallel_size"]) > 1:
        return {"rollout": "ray://auto"}
    return {"rollout": {"vllm": "vllm", "hf": "transformers"}.get(value, "auto")}


def _verl_estimator(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    unscaled = value == "grpo" and given.get("algorithm.norm_adv_by_std_in_grpo") is False
    return _estimator(value, scaled=not unscaled)


def _verl_trackers(value: Any, _: Any = None) -> dict[str, Any]:
    trackers = value if isinstance(value, list) else [value]
    return {"report_to": [name for name in trackers if name != "console"]}


def _verl_reward(path: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    name = given.get("custom_reward_function.name", "compute_score")
    raise ConfigError(
        f"write {name} of {path} as a function of prompts and completions (docs/rewards.md), and give FILE.py:FUNCTION as rewards"
    )


VERL_CORRECTIONS = {"token": "tis", "sequence": "sequence_truncate"}


def _verl_correction(level: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the correction of the engine's log-probabilities; verl's weights have an upper bound only."""
    if level in (None, "null"):
        return {}
    high = float(given.get("algorithm.rollout_correction.rollout_is_threshold", 2.0))
    return {"importance_correction": _one_of(VERL_CORRECTIONS, level), "importance_low": 0.0, "importance_high": high}


VERL_CONVERSIONS: Mapping[str, Convert] = {
    "data.train_files": lambda value, _: (
        {} if value is None else {"data": ",".join(value) if isinstance(value, list) else value}
    ),
    "data.train_batch_size": lambda value, _: {"batch_size": int(value)},
    "data.filter_overlong_prompts": lambda value, _: {"long_prompts": "drop"} if value else {},
    "data.truncation": NOTHING,
    "data.shuffle": NOTHING,
    "data.seed": lambda value, _: {} if value is None else {"seed": int(value)},
    f"{ROLLOUT}.name": _verl_rollout,
    f"{ROLLOUT}.top_k": lambda value, _: {"top_k": max(0, int(value))},
    f"{ACTOR}.ppo_mini_batch_size": _verl_accumulation,
    f"{ACTOR}.ppo_micro_batch_size": NOTHING,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": _verl_micro_batch,
    f"{ACTOR}.ppo_epochs": lambda value, _: {"num_iterations": int(value)},
    f"{ACTOR}.clip_ratio": lambda value, _: {"clip_low": float(value), "clip_high": float(value)},
    f"{ACTOR}.loss_agg_mode": _loss_aggregation,
    f"{ACTOR}.use_kl_loss": NOTHING,
    f"{ACTOR}.kl_loss_coef": NOTHING,
    f"{ACTOR}.optim.lr_warmup_steps": lambda value, _: {"warmup_steps": max(0, int(value))},
    f"{MODEL}.lora_rank": lambda value, _: _lora(value),
    "custom_reward_function.path": _verl_reward,
    "custom_reward_function.name": NOTHING,
    "reward_model.enable": NOTHING,
    "algorithm.adv_estimator": _verl_estimator,
    "algorithm.use_kl_in_reward": NOTHING,
    "algorithm.kl_ctrl.kl_coef": _verl_kl,
    "algorithm.rollout_correction.rollout_is": _verl_correction,
    "algorithm.rollout_correction.rollout_is_threshold": NOTHING,
    "algorithm.norm_adv_by_std_in_grpo": NOTHING,
    "algorithm.filter_groups.max_num_gen_batches": lambda value, _: (
        {"max_num_gen_batches": int(value)} if int(value) > 0 else {}
    ),
    "trainer.logger": _verl_trackers,
    "trainer.save_freq": _steps("save_every"),
    "trainer.test_freq": _steps("eval_every"),
    "trainer.total_training_steps": lambda value, _: {"max_steps": int(value or 0)},
    "trainer.resume_mode": NOTHING,
    "trainer.val_before_train": NOTHING,
}


def _from_verl(training: Training) -> Translation:
    return _from_table(training, VERL, {**VERL_DEFAULTS, **training.given}, VERL_CONVERSIONS)
