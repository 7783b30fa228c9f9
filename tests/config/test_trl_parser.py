"""The configurations in the argument parsers of transformers and TRL."""

import dataclasses

import pytest
from transformers import HfArgumentParser
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from reinforcepp import ReinforceConfig, RewardModelConfig, SftConfig
from reinforcepp.commands.table import COMMANDS
from reinforcepp.config import TrainConfig, as_dict
from reinforcepp.errors import ConfigError
from reinforcepp.training.setup import with_peft_config

CONFIGS = [ReinforceConfig, *(command.config for command in COMMANDS.values())]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_defaults_are_those_of_the_class(config_class):
    (parsed,) = HfArgumentParser(config_class).parse_args_into_dataclasses([])
    assert parsed == config_class()


def test_values_have_the_types_of_the_settings():
    words = "--learning-rate 1e-5 --report_to wandb mlflow --reward_weights 1 0.5 --warmup_steps 0.1 --dual_clip 3"
    words += " --no_log_completions --overwrite"
    (parsed,) = HfArgumentParser(ReinforceConfig).parse_args_into_dataclasses(words.split())
    assert parsed == ReinforceConfig(
        learning_rate=1e-5,
        report_to=("wandb", "mlflow"),
        warmup_steps=0.1,
        dual_clip=3.0,
        reward_weights=(1.0, 0.5),
        log_completions=False,
        overwrite=True,
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "false"], False),
        (["--resume", "run/step-000002"], "run/step-000002"),
    ],
)
def test_resume_takes_a_truth_value_or_a_path(words, expected):
    (parsed,) = HfArgumentParser(ReinforceConfig).parse_args_into_dataclasses(words)
    assert parsed.resume == expected


def test_lists_of_names_of_the_command():
    words = [
        "--rewards",
        "rule:length?max=9",
        "a.py:f",
        "--columns",
        "prompt=q",
        "--use_peft",
        "--lora_target_modules",
        "q",
        "v",
    ]
    (parsed,) = HfArgumentParser(TrainConfig).parse_args_into_dataclasses(words)
    assert (parsed.rewards, parsed.columns) == (("rule:length?max=9", "a.py:f"), ("prompt=q",))
    assert parsed.lora_target_modules == ("q", "v")


@pytest.mark.parametrize("order", [(ScriptArguments, ReinforceConfig, ModelConfig), (ModelConfig, ReinforceConfig)])
def test_trl_parser_gives_shared_names_to_model_config(order, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("report_to: tensorboard\nbatch_size: 4\nlora_r: 4\n", encoding="utf-8")
    words = ["--config", str(file), "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--batch_size", "2"]
    parsed = {type(part): part for part in TrlParser(order).parse_args_and_config(words)}
    args, model_args = parsed[ReinforceConfig], parsed[ModelConfig]
    assert args == ReinforceConfig(report_to=("tensorboard",), batch_size=2)
    _, adapted = with_peft_config("model", args, get_peft_config(model_args))
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ("q_proj", "v_proj"), "lora_dropout": 0.05}
    assert adapted == dataclasses.replace(args, **lora)


@pytest.mark.parametrize("config_class", [ReinforceConfig, RewardModelConfig, SftConfig])
def test_trl_parser_takes_flags_as_scripts_of_trl_write_them(config_class):
    words = "--model_name_or_path m --dataset_name d --dtype bfloat16 --use_peft --bf16 --per_device_train_batch_size 4"
    args, model_args = TrlParser((ScriptArguments, config_class, ModelConfig)).parse_args_and_config(words.split())[1:]
    assert args == config_class(mixed_precision="bf16", per_device_train_batch_size=4)
    assert (model_args.dtype, model_args.use_peft) == ("bfloat16", True)


def test_an_instance_has_all_fields():
    config = ReinforceConfig(use_peft=True, lora_r=2, attn_implementation="eager")
    assert dataclasses.replace(config, seed=1) == ReinforceConfig(
        use_peft=True, lora_r=2, attn_implementation="eager", seed=1
    )
    assert as_dict(config)["lora_r"] == 2
    assert "lora_r" in {field.name for field in dataclasses.fields(TrainConfig)}


def test_a_peft_config_without_a_setting_raises():
    from peft import IA3Config, LoraConfig

    with pytest.raises(ConfigError, match="peft_config: IA3Config isn't supported"):
        with_peft_config("model", ReinforceConfig(), IA3Config())
    with pytest.raises(ConfigError, match="peft_config and use_peft are both given"):
        with_peft_config("model", ReinforceConfig(use_peft=True), LoraConfig())
    assert with_peft_config("model", ReinforceConfig(), LoraConfig(r=3))[1].lora_target_modules == ("all-linear",)
