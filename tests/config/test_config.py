"""Settings: what is refused, what the derived values are, and how a YAML file and flags come together."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import itertools
import pickle
import re
import typing
from pathlib import Path

import numpy as np
import pytest
from transformers import SchedulerType

from reinforcepp.commands import cli
from reinforcepp.commands.table import COMMANDS
from reinforcepp.config import (
    DemoConfig,
    GenerateConfig,
    ReinforceConfig,
    RewardModelConfig,
    TrainConfig,
    as_dict,
)
from reinforcepp.config.base import Config
from reinforcepp.config.values import accepted_values
from reinforcepp.errors import ConfigError, command_line, option, setting
from scripts import SOURCE

# Zero means "off", "none" or "as long as there is data" here; everywhere else it is a mistake.
KEEPING = {"save_every", "max_skipped_updates", "watchdog_seconds"}
OPTIMIZER = {"warmup_ratio", "warmup_steps", "adam_beta1", "adam_beta2", "weight_decay"}
TRAINING = OPTIMIZER | {
    *(
        "seed",
        "heldout_fraction",
        "max_steps",
        "kl_coef",
        "entropy_coef",
        "negative_token_fraction",
        "top_entropy_quantile",
        "gamma",
        "top_k",
        "min_p",
    ),
    *(
        "rollout_workers",
        "reward_workers",
        "staleness",
        "truncation_penalty",
        "reward_length_power",
        "eval_prompts",
        "eval_every",
        "gae_lambda",
        "importance_low",
        "ratio_limit",
        "lora_dropout",
    ),
    *("collapse_length", "collapse_entropy", "collapse_distinct"),
    "max_bad_rows",
    *KEEPING,
}
ZERO_IS_FINE = {
    "sft": {*OPTIMIZER, "seed", "max_steps", "heldout_fraction", "lora_dropout", "max_bad_rows", *KEEPING},
    "reward": {
        *OPTIMIZER,
        "seed",
        "max_steps",
        "eval_every",
        "heldout_fraction",
        "center_rewards_coefficient",
        "lora_dropout",
        "max_bad_rows",
        *KEEPING,
    },
    "train": TRAINING,
    "generate": {"seed", "temperature", "top_k", "min_p"},
    "chat": {"seed", "temperature", "top_k", "min_p"},
    "compare": {"seed", "heldout_fraction", "temperature", "top_k", "max_prompts", "tie_margin"},
    "compare-algorithms": TRAINING,
    "plan": {*TRAINING, "gpus"},
    "lint": {"seed", "heldout_fraction"},
    "serve": set(),
    "label": {"gold_every", "repeat_every", "port", "max_prompts", "seed"},
    "report": {"samples"},
    "serve-reward": {"port"},
    "demo": {"seed"},
}


def numeric_fields(verb: str, *kinds: type) -> list[str]:
    hints, settings = typing.get_type_hints(COMMANDS[verb].config), accepted_values(COMMANDS[verb].config)
    single = {name: hints[name] for name in settings if typing.get_origin(hints[name]) is not tuple}
    return [name for name, hint in single.items() if {hint, *typing.get_args(hint)} & set(kinds)]


NUMBERS = [(verb, name) for verb in COMMANDS for name in numeric_fields(verb, int, float)]
FLOATS = [(verb, name) for verb in COMMANDS for name in numeric_fields(verb, float)]


def refusal(verb: str, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        COMMANDS[verb].config(**settings)
    return str(caught.value)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_lists_of_numeric_settings_are_not_empty():
    without = {"doctor", "export", "migrate", "push", "recipes", "label export", "label import", "label agreement"}
    assert {verb for verb, _ in NUMBERS} == set(COMMANDS) - without
    assert ("train", "learning_rate") in FLOATS
    assert ("train", "gradient_accumulation_steps") in NUMBERS
    assert ("train", "overwrite") not in NUMBERS


@pytest.mark.parametrize(("verb", "name"), NUMBERS)
def test_negative_numbers_are_refused(verb, name):
    message = refusal(verb, **{name: -2})  # -1 is TRL's default of max_steps
    assert name in message
    assert "-2" in message


@pytest.mark.parametrize(("verb", "name"), NUMBERS)
def test_zero_is_refused_where_it_means_nothing(verb, name):
    if name in ZERO_IS_FINE[verb]:
        assert getattr(COMMANDS[verb].config(**{name: 0}), name) == 0
    else:
        assert name in refusal(verb, **{name: 0})


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_choice_is_one_of_those_there_are(verb):
    hints = typing.get_type_hints(COMMANDS[verb].config)
    for name, hint in ((name, hints[name]) for name in accepted_values(COMMANDS[verb].config)):
        if typing.get_origin(hint) is typing.Literal:
            message = refusal(verb, **{name: f"{typing.get_args(hint)[0]}x"})
            assert f"{name} must be one of" in message and f"Did you mean {typing.get_args(hint)[0]!r}?" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("verb", "name"), FLOATS)
def test_what_is_no_finite_number_is_refused(verb, name, value):
    message = refusal(verb, **{name: value})
    assert name in message
    assert str(value) in message


@pytest.mark.parametrize(
    ("verb", "name"), [("train", "output_dir"), ("train", "reward_model"), ("reward", "data"), ("lint", "fix")]
)
def test_a_home_folder_of_nobody_is_refused(verb, name):
    message = refusal(verb, **{name: "~no-such-user/x.csv"})
    assert f"{name}: ~no-such-user/x.csv" in message and "home folder ~no-such-user" in message
    COMMANDS[verb].config(**({"data": "x.csv"} | {name: "~/x.csv"}))


@pytest.mark.parametrize("name", ["system_prompt", "chat_template"])
def test_a_text_can_begin_with_a_tilde(name):
    assert getattr(TrainConfig(**{name: "~~~ Rules"}), name) == "~~~ Rules"
    with pytest.raises(ConfigError, match=f"{name} is empty"):
        TrainConfig(**{name: " "})


@pytest.mark.parametrize("verb", [verb for verb in COMMANDS if hasattr(COMMANDS[verb].config, "seed")])
def test_seeds_that_some_library_refuses_are_refused_here(verb):
    assert "4294967295" in refusal(verb, seed=2**32)
    assert COMMANDS[verb].config(seed=2**32 - 1).seed == 2**32 - 1


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("top_p", 1.0, 1.01),
        ("gamma", 1.0, 1.01),
        ("clip_low", 0.99, 1.0),
        ("dual_clip", 1.2, 1.0),
        ("heldout_fraction", 0.99, 1.0),
        ("vllm_gpu_memory_utilization", 1.0, 1.01),
    ],
)
def test_upper_and_lower_bounds(name, good, bad):
    assert getattr(TrainConfig(**{name: good}), name) == good
    assert name in refusal("train", **{name: bad})


# --- settings that contradict each other ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "settings", "named"),
    [
        ("train", {"overwrite": True, "resume": True}, ["overwrite", "resume"]),
        (
            "train",
            {"max_prompt_length": 200, "max_new_tokens": 313, "max_length": 512},
            ["200", "313", "max_length", "512"],
        ),
        ("train", {"estimator": "reinforce_plus_plus_baseline"}, ["num_generations", "2"]),
        ("train", {"estimator": "reinforce_plus_plus_baseline", "num_generations": 4, "gamma": 0.9}, ["gamma", "1"]),
        ("train", {"estimator": "flash_reinforce", "gamma": 0.9}, ["gamma: 0.9", "flash_reinforce"]),
        ("train", {"estimator": "flash_reinforce", "batch_size": 1}, ["batch_size", "flash_reinforce"]),
        ("train", {"discount_per": "turns"}, ["discount_per: turns", "gamma"]),
        ("train", {"disable_dropout": False}, ["disable_dropout", "lora_dropout"]),
        ("train", {"cast_lm_head_to_fp32": True, "mixed_precision": "bf16"}, ["16 bits"]),
        ("sft", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, ["same gradients"]),
        ("train", {"use_bias_correction_kl": True}, ["reinforce_plus_plus", "baseline or grpo"]),
        ("train", {"scale_rewards": "none", "estimator": "rloo", "num_generations": 2}, ["scale_rewards", "grpo"]),
        ("train", {"normalize_advantages": True}, ["normalize_advantages", "rloo"]),
        ("train", {"multi_objective_aggregation": "normalize_then_sum"}, ["multi_objective_aggregation", "grpo"]),
        (
            "train",
            {
                "multi_objective_aggregation": "normalize_then_sum",
                "estimator": "grpo",
                "num_generations": 2,
                "reward_clip": 1.0,
            },
            ["reward_clip", "normalize_then_sum"],
        ),
        (
            "train",
            {
                "multi_objective_aggregation": "normalize_then_sum",
                "estimator": "grpo",
                "num_generations": 2,
                "reward_length_power": 1.0,
            },
            ["reward_length_power", "normalize_then_sum"],
        ),
        ("train", {"loss_type": "rloo", "importance_sampling_level": "sequence"}, ["geometric mean", "rloo"]),
        ("train", {"loss_type": "sapo", "dual_clip": 3.0}, ["dual_clip", "sapo"]),
        ("train", {"clip_high": 0.5, "dual_clip": 1.4}, ["dual_clip: 1.4", "1.5"]),
        ("train", {"micro_batch_size": 4, "gradient_accumulation_steps": 4}, ["4 x", "16", "8", "batch_size"]),
        ("train", {"micro_batch_size": 16, "gradient_accumulation_steps": 1}, ["16", "8"]),
        ("train", {"importance_low": 3.0}, ["importance_high: 2.0", "importance_low 3.0"]),
        ("train", {"model": "runs/a", "output_dir": "runs/a"}, ["output_dir", "model", "runs/a"]),
        ("train", {"reward_model": "m/rm", "output_dir": "m"}, ["output_dir", "reward_model", "m/rm"]),
        ("train", {"data": "m/x.csv", "output_dir": "./m/../m"}, ["output_dir", "data"]),
        ("train", {"model": " "}, ["model", "empty"]),
        ("train", {"reward_model": ""}, ["reward_model", "empty"]),
        ("train", {"output_dir": ""}, ["output_dir", "empty"]),
        ("reward", {"model": "a", "output_dir": "a"}, ["output_dir", "model"]),
        ("reward", {"data": ""}, ["data", "empty"]),
        ("reward", {"output_dir": ""}, ["output_dir", "empty"]),
        ("reward", {"micro_batch_size": 3}, ["3", "8", "batch_size"]),
        ("reward", {"gradient_accumulation_steps": 3}, ["3", "8", "batch_size"]),
        ("reward", {"batch_size": 2, "gradient_accumulation_steps": 4}, ["4", "2", "batch_size"]),
        ("generate", {"prompt": "a", "prompts_file": "b"}, ["prompt", "prompts_file"]),
        ("generate", {"prompt": " \n"}, ["prompt", "empty"]),
        ("generate", {"model": ""}, ["model", "empty"]),
        ("generate", {"prompts_file": "a.txt", "output": "a.txt"}, ["prompts_file", "output", "a.txt"]),
        ("demo", {"output_dir": ""}, ["output_dir", "empty"]),
    ],
)
def test_contradictions_are_refused_with_both_sides_named(verb, settings, named):
    message = refusal(verb, **settings)
    assert [word for word in named if word not in message] == []


def test_a_model_beside_the_output_is_fine():
    assert TrainConfig(model="runs/a", reward_model="runs/rm", output_dir="runs/ab").output_dir == "runs/ab"


# --- derived values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "completions", "micro", "per_update"),
    [
        ({}, 8, 8, 8),
        ({"batch_size": 64}, 64, 8, 64),
        ({"batch_size": 3}, 3, 3, 3),
        ({"batch_size": 4, "num_generations": 6}, 24, 8, 24),
        ({"batch_size": 64, "micro_batch_size": 16}, 64, 16, 64),
        ({"batch_size": 64, "micro_batch_size": 16, "gradient_accumulation_steps": 2}, 64, 16, 32),
        ({"batch_size": 64, "gradient_accumulation_steps": 1}, 64, 8, 8),
        ({"batch_size": 10, "micro_batch_size": 4, "gradient_accumulation_steps": 2}, 10, 4, 8),
        ({"batch_size": 2, "micro_batch_size": 16}, 2, 16, 2),
    ],
)
def test_batch_sizes_of_policy_training(settings, completions, micro, per_update):
    config = ReinforceConfig(**settings)
    sizes = (config.completions_per_step, config.effective_micro_batch_size, config.optimizer_batch_size)
    assert sizes == (completions, micro, per_update)


@pytest.mark.parametrize(
    ("settings", "micro", "accumulation"),
    [
        ({}, 8, 1),
        ({"batch_size": 7}, 7, 1),
        ({"micro_batch_size": 2}, 2, 4),
        ({"gradient_accumulation_steps": 4}, 2, 4),
        ({"gradient_accumulation_steps": 8}, 1, 8),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 4}, 2, 4),
        ({"batch_size": 12, "micro_batch_size": 3, "gradient_accumulation_steps": 4}, 3, 4),
    ],
)
def test_batch_sizes_of_reward_training(settings, micro, accumulation):
    config = RewardModelConfig(**settings)
    assert (config.effective_micro_batch_size, config.accumulation) == (micro, accumulation)
    assert config.effective_micro_batch_size * config.accumulation == config.batch_size


def test_rollouts_sample_the_full_distribution_by_default_and_generation_does_not():
    train, generate = TrainConfig(), GenerateConfig()
    assert (train.temperature, train.top_p, train.top_k) == (1.0, 1.0, 0)
    assert (generate.temperature, generate.top_p, generate.top_k) == (0.7, 0.9, 50)


FROM_PYTHON = {
    "learning_rate": "1e-5",
    "max_grad_norm": "2",
    "seed": np.int64(3),
    "batch_size": 8.0,
    "kl_coef": np.float32(0.5),
}


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        *(({name: value}, float(value)) for name, value in FROM_PYTHON.items()),
        ({"report_to": "none"}, ()),
        ({"report_to": None}, ()),
        ({"report_to": ["none"]}, ()),
        ({"report_to": "tensorboard"}, ("tensorboard",)),
        ({"lora_target_modules": "all-linear"}, ("all-linear",)),
        ({"reward_weights": [1, "0.5"]}, (1.0, 0.5)),
        ({"reward_weights": None}, ()),
        ({"output_dir": Path("runs/a")}, "runs/a"),
        ({"resume": Path("runs/a")}, "runs/a"),
        ({"lr_scheduler_type": SchedulerType.COSINE}, "cosine"),
        ({"kl_limit": None}, None),
        ({"warmup_steps": 0.5}, 0.5),
    ],
)
def test_values_from_python_are_stored_as_plain_values_of_their_type(given, stored):
    (name,) = given
    value = getattr(ReinforceConfig(**given), name)
    assert value == stored and type(value) in (bool, int, float, str, tuple, type(None))


@pytest.mark.parametrize(("given", "shown"), [(3.0, "3"), ("3", "3"), ("2.50", "2.5")])
def test_a_whole_number_of_epochs_or_steps_is_shown_as_one(given, shown):
    config = ReinforceConfig(num_train_epochs=given, warmup_steps=3.0)
    assert (str(config.num_train_epochs), str(config.warmup_steps)) == (shown, "3")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_generations": 2.5}, "a whole number, not 2.5"),
        ({"seed": 1.5}, "a whole number"),
        ({"batch_size": True}, "a whole number, not True"),
        ({"batch_size": "eight"}, "a whole number, not 'eight'"),
        ({"kl_coef": None}, "a number, not None"),
        ({"kl_coef": [0.1]}, "a number"),
        ({"log_completions": "no"}, "True or False, not 'no'"),
        ({"overwrite": 1}, "True or False"),
        ({"output_dir": 3}, "text, not 3"),
        ({"chat_template": 3}, "text or None"),
        ({"estimator": [1]}, "one of "),
        ({"report_to": 3}, "a list of names"),
        ({"report_to": ["wandb", 3]}, "a list of names"),
        ({"reward_weights": [1, "high"]}, "a list of numbers, as in [1, 0.5]"),
        ({"reward_weights": [1, float("nan")]}, "a list of numbers"),
        ({"warmup_steps": 1.5}, "fraction"),
        ({"output_dir": "caf\udce9"}, "isn't valid UTF-8"),
        ({"lora_target_modules": ["q_proj", "caf\udce9"]}, "isn't valid UTF-8"),
        ({"system_prompt": "\ud83d"}, "isn't valid UTF-8"),
    ],
)
def test_values_of_another_type_raise_with_the_name_of_the_setting(given, expected):
    (name,) = given
    with pytest.raises(ConfigError, match=f"^{name}.* {re.escape(expected)}"):
        ReinforceConfig(**given)


@pytest.mark.parametrize("config_class", [*(command.config for command in COMMANDS.values()), ReinforceConfig])
def test_every_setting_checks_its_type(config_class):
    """No text, number, truth value or list is of type complex."""
    for field in dataclasses.fields(config_class):
        with pytest.raises(ConfigError, match=f"^{field.name} must be "):
            config_class(**{field.name: 1j})


def test_messages_name_flags_on_the_command_line_and_arguments_in_python(capsys):
    with pytest.raises(ConfigError, match=r"Add resume=True\."):
        TrainConfig(allow_changes="seed")
    assert cli.main(["train", "--allow_changes", "seed"]) == 2
    assert "Add --resume." in capsys.readouterr().err
    assert (setting("columns"), option("use_peft")) == ("columns", "use_peft=True")
    with command_line():
        assert (setting("columns"), option("use_peft")) == ("--columns", "--use_peft")
    with pytest.raises(ConfigError, match=r"Use rollout='transformers', or auto"):
        TrainConfig(load_in_4bit=True, use_peft=True, rollout="vllm")


def test_a_fraction_of_warmup_steps_is_rounded_up():
    assert [ReinforceConfig(warmup_steps=steps).warmup_of(25) for steps in (0, 0.1, 1, 7)] == [0, 3, 1, 7]


def test_documented_defaults():
    train = TrainConfig()
    assert (train.max_length, train.max_prompt_length, train.max_new_tokens, train.seed) == (None, None, 384, 42)
    assert (train.prompt_column, train.chosen_column, train.rejected_column) == ("prompt", "chosen", "rejected")


@pytest.mark.parametrize("config_class", [*(command.config for command in COMMANDS.values()), ReinforceConfig])
def test_configurations_are_frozen_and_plain(config_class):
    config = config_class()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert config_class(**as_dict(config)) == config


def test_the_demo_uses_no_engine_that_has_to_be_installed():
    assert DemoConfig().rollout == "transformers"


# --- renamed settings ---------------------------------------------------------------------------------------------------

WITH_OLD_NAMES = [
    ReinforceConfig,
    *(COMMANDS[verb].config for verb in ("sft", "reward", "train", "plan", "compare-algorithms")),
]


@pytest.mark.parametrize("config_class", WITH_OLD_NAMES)
def test_python_accepts_the_old_name_of_a_setting(config_class):
    config = config_class(mini_batch_size=4)
    assert config == config_class(micro_batch_size=4)
    assert config.micro_batch_size == config.mini_batch_size == 4
    assert not hasattr(config, "macro_batch_size")
    assert hash(config) == hash(config_class(micro_batch_size=4))


@pytest.mark.parametrize("config_class", WITH_OLD_NAMES)
def test_the_old_name_leaves_dataclass_functions_intact(config_class):
    config = config_class(mini_batch_size=4)
    assert dataclasses.replace(config, batch_size=4) == config_class(batch_size=4, micro_batch_size=4)
    assert dataclasses.replace(config, micro_batch_size=2).micro_batch_size == 2
    assert dataclasses.replace(config_class(), mini_batch_size=2).micro_batch_size == 2
    assert as_dict(config)["micro_batch_size"] == 4
    assert "mini_batch_size" not in as_dict(config)
    assert pickle.loads(pickle.dumps(config)) == copy.copy(config) == config
    for name in ("micro_batch_size", "mini_batch_size"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, 8)


def test_an_old_and_a_current_name_together_are_an_error(parsed):
    named = r"mini_batch_size and micro_batch_size"
    with pytest.raises(ConfigError, match=named):
        ReinforceConfig(mini_batch_size=4, micro_batch_size=4)
    with pytest.raises(ConfigError, match=rf"settings\.yaml.*{named}"):
        parsed("mini_batch_size: 4\nmicro_batch_size: 4\n")
    with pytest.raises(ConfigError, match=named):
        cli.parse("train", ["--mini_batch_size", "4", "--micro-batch-size=4"])


@pytest.mark.parametrize("flags", ["--mini_batch_size 4", "--mini-batch-size 4", "--mini_batch_size=4"])
def test_the_command_line_accepts_the_old_name_of_a_setting(flags):
    assert cli.parse("train", flags.split()) == TrainConfig(micro_batch_size=4)


def test_words_that_yaml_reads_as_false_are_choices(parsed):
    config = parsed("mixed_precision: no\npadding_free: off\nimportance_correction: off\nsave_strategy: no")
    assert (config.mixed_precision, config.padding_free, config.importance_correction) == ("no", "off", "off")
    assert config.save_every == 0
    assert parsed("use_cpu: no").use_cpu is False
    with pytest.raises(ConfigError, match=r"padding_free must be one of auto, off, not True"):
        parsed("padding_free: on")


def test_a_file_accepts_the_old_name_of_a_setting(parsed):
    assert parsed("mini_batch_size: 4") == TrainConfig(micro_batch_size=4)
    assert parsed("mini_batch_size: 4", "train", "--micro_batch_size", "2").micro_batch_size == 2
    assert parsed("micro_batch_size: 4", "train", "--mini_batch_size", "2").micro_batch_size == 2
    with pytest.raises(ConfigError, match="'mini_batch_size'"):
        parsed("mini_batch_size: 4", "generate")
    with pytest.raises(ConfigError, match="--mini_batch_size"):
        cli.parse("generate", ["--mini_batch_size", "4"])


# --- YAML and flags ---------------------------------------------------------------------------------------------------


@pytest.fixture
def parsed(tmp_path):
    """``parsed(yaml, "train", *flags)`` is the configuration that the command would run with."""

    def parse(yaml: str, verb: str = "train", *flags: str):
        path = tmp_path / "settings.yaml"
        path.write_text(yaml, encoding="utf-8")
        return cli.parse(verb, ["--config", str(path), *flags])

    return parse


def test_the_file_replaces_defaults_and_flags_replace_the_file(parsed):
    config = parsed("batch_size: 32\nkl_coef: 0.2\n", "train", "--kl_coef", "0.3")
    assert (config.batch_size, config.kl_coef, config.gamma) == (32, 0.3, 1.0)


def test_flags_win_wherever_they_stand(parsed, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("batch_size: 32\nresume: true\n")
    config = cli.parse("train", ["--batch_size", "16", f"--config={path}", "--no_resume"])
    assert (config.batch_size, config.resume) == (16, False)


def test_dashes_and_underscores_in_flags_are_the_same():
    assert cli.parse("train", ["--batch-size", "16"]).batch_size == 16


def test_kinds_of_values(parsed):
    config = parsed(
        "learning_rate: 1e-5\nkl_coef: 0\noverwrite: true\nresume: false\nreward_clip: null\ndual_clip: 3\n"
        "micro_batch_size:\nmodel: 'my model'\noutput_dir: -x\nestimator: reinforce_plus_plus\nmax_steps: 7\n"
    )
    assert config == TrainConfig(
        learning_rate=1e-5, kl_coef=0.0, overwrite=True, dual_clip=3.0, model="my model", output_dir="-x", max_steps=7
    )
    assert isinstance(config.learning_rate, float)
    assert isinstance(config.kl_coef, float)


def test_texts_that_look_like_flags_stay_texts(parsed):
    assert parsed("prompt: '--help me: = now'", "generate").prompt == "--help me: = now"


@pytest.mark.parametrize(
    ("yaml", "named"),
    [
        ("bacth_size: 3", ["settings.yaml", "'bacth_size'", "Did you mean 'batch_size'"]),
        ("1: 3", ["settings.yaml", "setting 1 not found"]),
        ("config: other.yaml", ["setting 'config' not found"]),
        ("prompt: hello", ["setting 'prompt' not found"]),  # a setting of another verb
        ("- batch_size", ["settings.yaml", "name: value"]),
        ("batch_size", ["settings.yaml", "name: value"]),
        ("", ["settings.yaml", "name: value"]),
        ("batch_size: [1, 2]", ["settings.yaml", "batch_size", "single value", "[1, 2]"]),
        ("model: {a: 1}", ["model", "single value"]),
        ("model:", ["model", "no value"]),
        ("batch_size: true", ["batch_size", "True"]),
        ("num_generations: 2.5", ["settings.yaml", "num_generations", "a whole number", "2.5"]),
        ("seed: many", ["settings.yaml", "seed", "a whole number", "'many'"]),
        ("log_completions: 'no'", ["settings.yaml", "log_completions", "true or false", "'no'"]),
        ("report_to: 3", ["settings.yaml", "report_to", "a list of names", "3"]),
        ("reward_weights: [1, [2]]", ["reward_weights", "a list of numbers", "[1, [2]]"]),
        ("reward_weights: [1, 2]", ["reward_weights: 2 weights for 1 rewards"]),
        ("overwrite: 1", ["overwrite", "true or false", "1"]),
        ("overwrite: 'yes'", ["overwrite", "true or false", "'yes'"]),
        ("learning_rate: .nan", ["learning_rate", "finite", "nan"]),
        ("learning_rate: -.inf", ["learning_rate", "finite", "-inf"]),
        ("batch_size: -3", ["batch_size", "-3"]),
        ("a: b: c", ["settings.yaml", "YAML", "line 1"]),
        ("\tbatch_size: 3", ["settings.yaml", "YAML", "line 1"]),
        ("model: a\x8f", ["settings.yaml", "YAML", "x008f"]),
    ],
)
def test_mistakes_in_the_file_are_named(parsed, yaml, named):
    with pytest.raises(ConfigError) as caught:
        parsed(yaml)
    assert [word for word in named if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_values_in_the_file_have_their_types(parsed):
    text = "learning_rate: 1e-5\nreport_to: none\nkl_limit: null\nwarmup_steps: 0.1\nlora_target_modules: all-linear"
    config = parsed(text)
    assert (config.learning_rate, config.report_to, config.kl_limit, config.warmup_steps) == (1e-5, (), None, 0.1)
    assert parsed("report_to: null").report_to == ()
    assert parsed("report_to: tensorboard").report_to == ("tensorboard",)
    weighted = parsed("rewards: [rule:length, rule:repetition]\nreward_weights: [-1, 5e-1]")
    assert weighted.reward_weights == (-1.0, 0.5) and parsed("reward_weights: 2").reward_weights == (2.0,)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(ConfigError, match=r"Configuration file .*none\.yaml"):
        cli.parse("train", ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ConfigError, match="directory"):
        cli.parse("train", ["--config", str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml"):
        cli.parse("train", ["--config", str(tmp_path / "latin.yaml")])
    with pytest.raises(ConfigError, match=r"--config.*missing"):
        cli.parse("train", ["--config"])
    with pytest.raises(ConfigError, match="Configuration file"):
        cli.parse("train", ["--config="])


# --- help ---------------------------------------------------------------------------------------------------------------


def test_every_setting_has_a_short_description():
    """``--help`` shows the docstring under a field: a capitalized fragment of at most 80 characters."""
    checked = 0
    for path in (SOURCE / "reinforcepp" / "config").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.ClassDef) and issubclass(vars_of(path).get(node.name, object), Config)):
                continue
            for field, text in itertools.pairwise([*node.body, ast.Pass()]):
                if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                    assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), ast.unparse(field)
                    description = str(text.value.value)
                    assert len(description) <= 80 and "\n" not in description and description[0] != " ", description
                    checked += 1
    assert checked > 150


def vars_of(path):
    return vars(importlib.import_module(f"reinforcepp.config.{path.stem}".removesuffix(".__init__")))
