"""TRL's names for settings, in Python, YAML, flags, argument parsers and attributes."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from reinforcepp import ReinforceConfig, RewardModelConfig, SftConfig
from reinforcepp.algorithm.estimators import ESTIMATORS
from reinforcepp.commands import cli
from reinforcepp.config import TrainConfig, trl_conversions, trl_names
from reinforcepp.config.foreign_names import OPENRLHF, VERL
from reinforcepp.config.values import accepted_values
from reinforcepp.errors import ConfigError

EQUIVALENT = [
    ({"beta": 0.3}, {"kl_coef": 0.3}),
    ({"max_completion_length": 7}, {"max_new_tokens": 7}),
    ({"delta": 3.0}, {"dual_clip": 3.0}),
    ({"save_total_limit": 2}, {"keep_last": 2}),
    ({"resume_from_checkpoint": "run/step"}, {"resume": "run/step"}),
    ({"epsilon": 0.3}, {"clip_low": 0.3, "clip_high": 0.3}),
    ({"epsilon_high": 0.4}, {"clip_high": 0.4}),
    ({"epsilon_high": 0.4, "epsilon": 0.3}, {"clip_low": 0.3, "clip_high": 0.4}),
    ({"epsilon": 0.3, "clip_high": 0.4}, {"clip_low": 0.3, "clip_high": 0.4}),
    ({"bf16": True}, {"mixed_precision": "bf16"}),
    ({"fp16": True, "bf16": False}, {"mixed_precision": "fp16"}),
    ({"bf16": False}, {"mixed_precision": "no"}),
    ({"max_steps": -1}, {"max_steps": 0}),
    ({"save_steps": 5}, {"save_every": 5}),
    ({"save_strategy": "no", "save_steps": 5}, {"save_every": 0}),
    ({"eval_strategy": "steps"}, {"eval_every": 10}),
    ({"eval_strategy": "steps", "eval_steps": 5}, {"eval_every": 5}),
    ({"eval_strategy": "no", "eval_steps": 5}, {"eval_every": 0}),
    ({"save_strategy": "epoch"}, {"save_every": -1}),
    ({"eval_strategy": "epoch"}, {"eval_every": -1}),
    ({"metric_for_best_model": "reward", "eval_steps": 5}, {"keep_best": "eval_reward", "eval_every": 5}),
    (
        {"metric_for_best_model": "eval_kl", "greater_is_better": False, "eval_steps": 5},
        {"keep_best": "-eval_kl", "eval_every": 5},
    ),
    ({"use_vllm": False}, {"rollout": "transformers"}),
    ({"use_vllm": True}, {"rollout": "vllm"}),
    ({"vllm_mode": "colocate"}, {}),
    (
        {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "h", "vllm_server_port": 9},
        {"rollout": "vllm://h:9"},
    ),
    (
        {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "https://h:9/"},
        {"rollout": "vllm+https://h:9"},
    ),
    ({"vllm_importance_sampling_correction": False}, {"importance_correction": "off"}),
    (
        {"vllm_importance_sampling_correction": True},
        {"importance_correction": "sequence_mask", "importance_low": 0, "importance_high": 3},
    ),
    (
        {"vllm_importance_sampling_mode": "sequence_truncate", "vllm_importance_sampling_clip_max": 2.5},
        {"importance_correction": "sequence_truncate", "importance_low": 0, "importance_high": 2.5},
    ),
    (
        {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 2.5},
        {"importance_correction": "icepop", "importance_low": 0, "importance_high": 2.5},
    ),
    (
        {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_min": 0.25},
        {"importance_correction": "tis", "importance_low": 0.25, "importance_high": 3},
    ),
    ({"model_init_kwargs": '{"attn_implementation": "eager"}'}, {"attn_implementation": "eager"}),
    ({"model_init_kwargs": '{"dtype": "bfloat16"}'}, {"mixed_precision": "bf16"}),
    ({"model_init_kwargs": '{"dtype": "float32"}'}, {}),
    ({"model_init_kwargs": '{"dtype": "auto", "revision": "main", "device_map": null}'}, {}),
    ({"eval_strategy": "steps", "logging_steps": 2}, {"eval_every": 2, "logging_steps": 2}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"tf32": False}, {}),
    (
        {"model_init_kwargs": '{"revision": "main", "attn_implementation": null}'},
        {},
    ),
    ({"dataloader_num_workers": 2, "pad_to_multiple_of": "8"}, {}),
    ({"pad_to_multiple_of": 8}, {}),
    (
        {"per_device_train_batch_size": 4, "num_generations": 2},
        {"batch_size": 2, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "num_generations": 2},
    ),
]


def words_of(settings):
    """Return settings as flags, with the dashes that TRL's users also write."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


@pytest.mark.parametrize(("theirs", "ours"), EQUIVALENT, ids=lambda settings: ",".join(settings))
def test_names_of_trl_give_the_same_settings_everywhere(theirs, ours, tmp_path):
    expected = ReinforceConfig(**ours)
    assert ReinforceConfig(**theirs) == expected
    file = tmp_path / "settings.yaml"
    file.write_text("".join(f"{name}: {value!r}\n" for name, value in theirs.items()), encoding="utf-8")
    assert cli.parse("train", words_of(theirs)) == TrainConfig(**ours)
    assert cli.parse("train", ["--config", str(file)]) == TrainConfig(**ours)


READS = {
    "beta": 0.3,
    "epsilon": 0.25,
    "epsilon_high": 0.4,
    "save_strategy": "epoch",
    "eval_strategy": "steps",
    "eval_steps": 5,
    "metric_for_best_model": "eval_reward",
    "greater_is_better": True,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 3,
    "generation_batch_size": 12,
    "bf16": True,
    "fp16": False,
    "use_vllm": True,
    "logging_steps": 2,
    "eval_delay": 0,
}


def test_attributes_have_the_values_of_trl():
    given = {name: value for name, value in READS.items() if name not in ("generation_batch_size", "eval_delay")}
    args = ReinforceConfig(**given, gradient_accumulation_steps=3)
    assert {name: getattr(args, name) for name in READS} == READS
    assert (args.do_eval, args.train_batch_size, args.n_gpu) == (True, 4, int(torch.cuda.is_available()))
    assert (args.dataloader_num_workers, args.eval_batch_size) == (0, 8)
    assert not hasattr(args, "bleu")
    assert ReinforceConfig().metric_for_best_model is None


def test_early_stopping_of_transformers_reads_the_settings():
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

    args = ReinforceConfig(metric_for_best_model="kl", greater_is_better=False, eval_strategy="steps")
    stop, state, control = EarlyStoppingCallback(1), TrainerState(best_metric=1.0), TrainerControl()
    stop.on_train_begin(args, state, control)
    stop.on_evaluate(args, state, control, metrics={"eval_kl": 0.5})
    assert not control.should_training_stop
    stop.on_evaluate(args, state, control, metrics={"eval_kl": 2.0})
    assert control.should_training_stop


@pytest.mark.parametrize(
    ("given", "every"), [({}, 10), ({"logging_steps": 25}, 25), ({"logging_steps": 25, "eval_steps": 5}, 5)]
)
def test_evaluations_are_due_with_the_logs_if_eval_steps_is_missing(given, every):
    assert RewardModelConfig(eval_strategy="steps", **given).eval_every == every


def test_the_dtype_of_a_reward_model_is_that_of_its_weights():
    config = RewardModelConfig(model_init_kwargs={"dtype": "bfloat16"})
    assert (config.dtype, config.mixed_precision) == ("bfloat16", "auto")


def test_settings_without_effect_are_reported_once(capsys):
    for _ in range(2):
        RewardModelConfig(dataset_num_proc=4)
    assert (
        capsys.readouterr().err
        == "dataset_num_proc has no effect here, because prompts are tokenized before the training.\n"
    )


def test_a_resumed_run_can_change_settings_under_their_names_in_trl():
    args = ReinforceConfig(resume=True, allow_changes="beta,epsilon,max_steps")
    assert args.allowed_changes == ["kl_coef", "clip_low", "clip_high", "max_steps"]


def test_flags_override_a_file_under_every_name(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("beta: 0.3\nepsilon: 0.3\nbatch_size: 2\ngradient_accumulation_steps: 2\n", encoding="utf-8")
    flags = ["--kl_coef", "0.5", "--epsilon_high", "0.4", "--per_device_train_batch_size", "4"]
    assert cli.parse("train", ["--config", str(file), *flags]) == TrainConfig(
        kl_coef=0.5, clip_low=0.3, clip_high=0.4, batch_size=8, micro_batch_size=4, gradient_accumulation_steps=2
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": "much"}, r"^beta must be a number, not 'much'"),
        ({"beta": -1}, r"kl_coef must be at least 0, not -1. \(beta is kl_coef here.\)"),
        ({"beta": 0.1, "kl_coef": 0.2}, "beta and kl_coef: both are given, but beta is another name of kl_coef"),
        ({"bf16": 1}, "^bf16 must be True or False"),
        ({"bf16": True, "fp16": True}, "both are true"),
        ({"epsilon": 0.1, "clip_low": 0.2}, "epsilon and clip_low: both are given"),
        ({"save_strategy": "sometimes"}, "^save_strategy must be one of no, steps, epoch, best, not 'sometimes'"),
        ({"save_steps": 0.5}, "save_steps: 0.5 is a fraction"),
        ({"save_steps": 5, "num_iterations": 2}, "save_steps: 5 isn't a multiple of 2"),
        ({"per_device_train_batch_size": 4, "batch_size": 2}, r"both are given, but batch_size \(prompts\) is"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"per_device_train_batch_size": 3, "num_generations": 2}, "aren't a multiple of num_generations 2"),
        ({"tf32": True}, "^tf32: True isn't supported"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "model_init_kwargs: device_map 'auto' isn't supported"),
        ({"model_init_kwargs": "eager"}, "isn't a JSON object"),
        ({"metric_for_best_model": "loss"}, "evaluations of a policy measure no loss"),
        ({"greater_is_better": True}, "needs metric_for_best_model"),
        ({"reward_clip_range": [1, 0]}, "reward_clip_range must be LOW HIGH"),
        ({"bleu": 1}, "ReinforceConfig: setting 'bleu' not found"),
    ],
)
def test_problems_name_the_setting_as_given(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReinforceConfig(**settings)


def test_replace_keeps_working_and_an_assignment_names_it():
    args = ReinforceConfig(beta=0.2, epsilon=0.3, per_device_train_batch_size=4)
    assert dataclasses.replace(args, max_steps=5).max_steps == 5
    assert dataclasses.replace(args, beta=0.1, epsilon=0.1) == dataclasses.replace(
        args, kl_coef=0.1, clip_low=0.1, clip_high=0.1
    )
    with pytest.raises(ConfigError, match=r"dataclasses.replace can't change batches by TRL's names"):
        dataclasses.replace(args, per_device_train_batch_size=2)
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"args = dataclasses.replace\(args, max_steps=5\)"):
        args.max_steps = 5


def test_a_subclass_has_no_fields_of_parsers():
    @dataclasses.dataclass(frozen=True)
    class Mine(ReinforceConfig):
        beta: float = 0.7

    assert {field.name for field in dataclasses.fields(Mine)} == {*vars(ReinforceConfig()), "beta"}
    assert (Mine(epsilon=0.3).clip_low, Mine().beta) == (0.3, 0.7)


def trl_batch(world, **settings):
    """Return TRL's (completions per generation, per optimizer step and device, optimizer steps per generation)."""
    from trl import GRPOConfig

    args = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **settings)
    device_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return args.generation_batch_size, device_step * world, args.generation_batch_size / (device_step * world)


@pytest.mark.parametrize("world", [1, 2])
def test_batches_are_those_of_trl(world, monkeypatch):
    from transformers import TrainingArguments

    for module in (trl_conversions, trl_names):  # accelerate would start the processes of WORLD_SIZE
        monkeypatch.setattr(module, "started", lambda: world)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda args: world))
    refused = 0
    sizes = {
        "per_device_train_batch_size": (None, 2, 3),
        "gradient_accumulation_steps": (None, 2, 3),
        "steps_per_generation": (None, 4, 6),
        "generation_batch_size": (None, 12, 16),
        "num_generations": (2, 4),
    }
    for values in itertools.product(*sizes.values()):
        settings = {name: value for name, value in zip(sizes, values, strict=True) if value is not None}
        if not settings.keys() & {"per_device_train_batch_size", "steps_per_generation", "generation_batch_size"}:
            continue
        try:
            generation, update, updates = trl_batch(world, **settings)
        except ValueError:
            updates = 0.5
        if not float(updates).is_integer():  # an optimizer step over two generation batches isn't supported
            refused += 1
            with pytest.raises(ConfigError):
                ReinforceConfig(**settings)
            continue
        config = ReinforceConfig(**settings)
        assert (config.completions_per_step, config.optimizer_batch_size) == (generation, update)
        assert config.updates_per_step == updates
        assert config.per_device_train_batch_size == settings.get("per_device_train_batch_size", 8)
        assert config.steps_per_generation == generation / world / config.per_device_train_batch_size
        counted = ReinforceConfig(
            **settings, max_steps=6 * int(updates), save_steps=2 * int(updates), logging_steps=int(updates)
        )
        assert (counted.max_steps, counted.save_every, counted.logging_steps) == (6, 2, 1)
    assert refused > 50


@pytest.mark.parametrize("config_class", [RewardModelConfig, SftConfig])
def test_batches_of_supervised_trainings(config_class, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = config_class(per_device_train_batch_size=3, gradient_accumulation_steps=4, save_steps=3, bf16=True)
    assert (config.batch_size, config.micro_batch_size, config.save_every) == (24, 3, 3)
    assert config.per_device_train_batch_size == 3
    assert config_class(per_device_train_batch_size=3).batch_size == 6
    with pytest.raises(ConfigError, match="are settings of policy training"):
        config_class(steps_per_generation=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --init_kl_coef 0.1", "OpenRLHF's init_kl_coef is --kl_coef here"),
        ("train --actor.eps_clip 0.1", "OpenRLHF's actor.eps_clip is --clip_low here (and --clip_high"),
        (
            "train actor_rollout_ref.actor.optim.lr=1e-6",
            "verl's actor_rollout_ref.actor.optim.lr is --learning_rate here",
        ),
        ("train --zero_stage 3", "a setting of OpenRLHF without an equivalent here: give it to the launcher"),
        ("lint --device cpu", "Setting --device not found. It is a setting of "),
        ("sft --max_new_tokens 4", "Setting --max_new_tokens not found. It is a setting of train, generate, "),
        ("sft --beta 0.1", "It is a setting of train, compare-algorithms, plan."),
        ("train --max_completion_lengths 4", "Did you mean '--max_completion_length'?"),
    ],
)
def test_an_unknown_setting_of_another_library_is_explained(words, message, capsys):
    assert cli.main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_settings_of_other_libraries_have_counterparts_here():
    counterparts = {foreign.setting for foreign in (*OPENRLHF.values(), *VERL.values())} - {None}
    assert counterparts <= set(accepted_values(TrainConfig))
    assert {value for foreign in VERL.values() for value in foreign.values.values()} <= set(ESTIMATORS)


def test_output_dir_can_be_a_path():
    assert ReinforceConfig(output_dir=Path("runs") / "a").output_dir == "runs/a"
