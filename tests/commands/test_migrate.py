"""`reinforcepp migrate`: trainings of TRL, OpenRLHF and verl become settings of `reinforcepp train`."""

import re
import textwrap

import pytest
import yaml

from reinforcepp.commands import cli
from reinforcepp.commands.migrate.reading import read_training
from reinforcepp.commands.migrate.translation import (
    OPENRLHF_CONVERSIONS,
    OPENRLHF_DEFAULTS,
    SCRIPT_NAMES,
    TRL_DEFAULTS,
    VERL_CONVERSIONS,
    VERL_DEFAULTS,
    translate,
)
from reinforcepp.config import TrainConfig, read_yaml
from reinforcepp.config.aliases import aliases_of
from reinforcepp.config.foreign_names import OPENRLHF, VERL
from reinforcepp.config.values import accepted_values


@pytest.fixture
def migrate(tmp_path, capsys):
    """Return a function that writes a source and returns the settings that `migrate` prints, and the whole text."""

    def run(name, source, *flags):
        (tmp_path / name).write_text(textwrap.dedent(source))
        assert cli.main(["migrate", str(tmp_path / name), *flags]) == 0
        text = capsys.readouterr().out
        (tmp_path / "out.yaml").write_text(text)
        TrainConfig(**read_yaml(str(tmp_path / "out.yaml"), TrainConfig))
        return yaml.safe_load(text), text

    return run


TRL_SCRIPT = """
import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import think_format_reward as well_formed

STEPS = 40
dataset = load_dataset("trl-lib/DeepMath-103K", split="train").map(lambda row: row)

def short(completions, **kwargs):
    return [-len(c) for c in completions]

args = GRPOConfig(
    "out", learning_rate=2e-6, max_steps=STEPS, beta=0.04, epsilon=0.1, epsilon_high=0.3, num_generations=4,
    per_device_train_batch_size=4, gradient_accumulation_steps=2, model_init_kwargs={"dtype": torch.bfloat16},
    max_completion_length=compute_length(), dataloader_num_workers=2,
)
trainer = GRPOTrainer("Qwen/Qwen3-0.6B", [well_formed, short], args, dataset, peft_config=LoraConfig(r=4))
raise RuntimeError("the script must not run")
"""


def test_a_script_of_trl(migrate, tmp_path):
    settings, text = migrate("grpo_train.py", TRL_SCRIPT)
    expected = {
        "model": "Qwen/Qwen3-0.6B",
        "data": "trl-lib/DeepMath-103K",
        "rewards": ["trl.rewards:think_format_reward", f"{tmp_path}/grpo_train.py:short"],
        "output_dir": "out",
        "estimator": "grpo",
        "learning_rate": 2e-6,
        "lr_scheduler_type": "linear",
        "max_steps": 40,
        "kl_coef": 0.04,
        "use_bias_correction_kl": True,
        "clip_low": 0.1,
        "clip_high": 0.3,
        "num_generations": 4,
        "batch_size": 2,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "max_new_tokens": 512,
        "num_train_epochs": 3,
        "save_every": 500,
        "rollout": "transformers",
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 8,
    }
    assert settings == {name: value for name, value in expected.items() if value != getattr(TrainConfig, name)}
    assert "# max_completion_length: the source doesn't show its value (compute_length())" in text
    assert "# train_dataset.map: the script changes the rows" in text
    assert "kl_coef: 0.04  # beta\n" in text


def test_a_script_of_trl_that_reads_flags_gives_those_of_its_documented_command(migrate):
    settings, _ = migrate(
        "ppo.py",
        '''
        """
        python examples/scripts/ppo/ppo.py --dataset_name my/data --output_dir ppo \\
            --per_device_train_batch_size 16 --gradient_accumulation_steps 2 --num_mini_batches 2 --total_episodes 1000 \\
            --model_name_or_path EleutherAI/pythia-1b --reward_model_path my/reward --missing_eos_penalty 1.0
        """
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
        script_args, args, model_args = parser.parse_args_into_dataclasses()
        trainer = PPOTrainer(args=args, model=policy, train_dataset=data)
        ''',
    )
    assert settings["model"] == "EleutherAI/pythia-1b" and settings["reward_model"] == "my/reward"
    assert (settings["estimator"], settings["temperature"], settings["num_iterations"]) == ("ppo", 0.7, 4)
    assert (settings["batch_size"], settings["micro_batch_size"]) == (64, 16)
    assert settings["gradient_accumulation_steps"] == 2 and settings["max_steps"] == 16
    assert settings["truncation_penalty"] == 1.0 and settings["max_new_tokens"] == 53


def test_a_configuration_of_trl(migrate, tmp_path, capsys):
    source = "learning_rate: 1e-5\nbeta: 0.05\nmax_completion_length: 64\n"
    settings, _ = migrate("rloo.yaml", source, "--source", "trl-rloo")
    assert settings["learning_rate"] in (1e-5, "1e-5") and "kl_coef" not in settings  # our default, too
    assert (settings["estimator"], settings["loss_type"], settings["num_generations"]) == ("rloo", "rloo", 2)
    assert settings["max_new_tokens"] == 64 and settings["batch_size"] == 4
    assert cli.main(["migrate", str(tmp_path / "rloo.yaml")]) == 2
    assert "--source trl-ppo" in capsys.readouterr().err


def test_a_command_of_trl(migrate):
    settings, _ = migrate("run.sh", "accelerate launch -m trl.scripts.rloo --beta 0.2 --use_peft --lora_r=4\n")
    assert settings["kl_coef"] == 0.2 and settings["use_peft"] is True and settings["lora_r"] == 4
    settings, _ = migrate("run.sh", "trl grpo --model_name_or_path m --num_generations 4 --no-bf16 > log.txt\n")
    assert settings["estimator"] == "grpo" and settings["model"] == "m" and settings["num_generations"] == 4


@pytest.mark.parametrize(
    "names",
    [
        (
            "actor.model_name_or_path",
            "rollout.batch_size",
            "train.batch_size",
            "algo.kl.init_coef",
            "actor.eps_clip_low_high",
        ),
        ("pretrain", "rollout_batch_size", "train_batch_size", "init_kl_coef", "eps_clip_low_high"),
    ],
    ids=["present", "old"],
)
def test_a_command_of_openrlhf(migrate, names):
    model, rollout, train, kl, clip = names
    settings, text = migrate(
        "train.sh",
        f"""
        set -x
        MODEL="meta-llama/Llama-3.1-8B"   # the start
        SAVE=${{OUTPUT:-checkpoints}}/run
        ARGS=(
           --{rollout} $((64 * 2))
           # --{rollout} 7
           --rollout.n_samples_per_prompt 4
        )
        ray job submit --address="http://127.0.0.1:8265" -- python3 -m openrlhf.cli.train_ppo_ray \\
           --{model} $MODEL "${{ARGS[@]}}" --{train} 128 --train.micro_batch_size 8 \\
           --{kl} 1e-3 --{clip} 0.2 0.28 --algo.advantage.estimator group_norm --ckpt.output_dir $SAVE \\
           --algo.dynamic_filtering_enable --reward.overlong_buffer_len 64 \\
           --reward.remote_url http://host:5000/score --data.prompt_dataset my/prompts,b.jsonl --data.prompt_probs 0.7,0.3 \\
           --data.input_key question \\
           --data.label_key answer --ds.lora.rank 8 --vllm.num_engines 2 --logger.wandb.key SECRET --ds.zero_stage 3 \\
           --ckpt.path $UNKNOWN/x &> log.txt
        """,
    )
    assert settings["model"] == "meta-llama/Llama-3.1-8B" and settings["output_dir"] == "checkpoints/run"
    assert (settings["batch_size"], settings["num_generations"], settings["micro_batch_size"]) == (128, 4, 8)
    assert settings["gradient_accumulation_steps"] == 16  # 128 completions per optimizer step
    assert float(settings["kl_coef"]) == 1e-3 and (settings.get("clip_low", 0.2), settings["clip_high"]) == (0.2, 0.28)
    assert settings["data"] == "my/prompts,b.jsonl" and settings["interleave_probs"] == [0.7, 0.3]
    assert settings["dynamic_sampling"] is True and "rule:soft_overlong_punishment?" in text
    assert settings["estimator"] == "grpo" and settings["rewards"] == ["http://host:5000/score"]
    assert settings["prompt_column"] == "question" and settings["columns"] == ["label=answer"]
    assert settings["rollout"] == "ray://auto" and settings["rollout_workers"] == 2
    assert settings["lora_r"] == 8 and settings["report_to"] == ["wandb"] and "SECRET" not in text
    assert settings["mixed_precision"] == "bf16" and settings["lr_scheduler_type"] == "cosine_with_min_lr"  # defaults
    assert "value_clip" not in settings  # only ppo
    assert "# ds.zero_stage: " in text and "$UNKNOWN/x" in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("level off", {"correction": "off"}),
        ("level token mode clip threshold 0.5 5.0", {"correction": "tis", "high": 5.0}),  # 0.5 is the default
        ("level token threshold 3.0", {"correction": "icepop", "low": 0.0, "high": 3.0}),
        ("level seq gating binary_kl threshold 0.005", {"correction": "binary_kl", "max_kl": 0.005}),
        ("level seq threshold 0.5 2.0", {}),
        ("level token gating tv threshold 0.05", {}),
    ],
)
def test_flash_reinforce_and_the_corrections_of_openrlhf(migrate, flags, expected):
    words = re.sub("(level|mode|gating|threshold) ", r"--algo.advantage.is_correction_\1 ", flags)
    settings, text = migrate(
        "train.sh",
        "python -m openrlhf.cli.train_ppo_ray --algo.advantage.estimator flash_reinforce "
        f"--actor.loss_agg_mode seq-mean-token-mean --rollout.batch_size 128 {words}",
    )
    assert (settings["estimator"], settings["loss_type"]) == ("flash_reinforce", "grpo")
    prefix = "importance_"
    assert {name.removeprefix(prefix): settings[name] for name in settings if name.startswith(prefix)} == expected
    assert ("isn't available, only token with ratio" in text) == (not expected)


@pytest.mark.parametrize(("level", "correction"), [("token", "tis"), ("sequence", "sequence_truncate")])
def test_the_correction_of_verl(migrate, level, correction):
    given = f"algorithm.rollout_correction.rollout_is={level} algorithm.rollout_correction.rollout_is_threshold=3.0"
    settings, _ = migrate("train.sh", f"python -m verl.trainer.main_ppo {given}")
    found = [settings[f"importance_{name}"] for name in ("correction", "low", "high")]
    assert found == [correction, 0, 3]


def test_a_command_and_a_configuration_of_verl(migrate):
    settings, _ = migrate(
        "train.sh",
        """
        python3 -m verl.trainer.main_ppo algorithm.adv_estimator=reinforce_plus_plus data.train_batch_size=64 \\
            data.train_files="['$HOME/a.parquet', '$HOME/b.parquet']" data.max_response_length=$((1024 * 2)) \\
            actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.rollout.n=4 \\
            actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 actor_rollout_ref.model.path=Qwen/Qwen2-7B \\
            algorithm.filter_groups.enable=True algorithm.filter_groups.max_num_gen_batches=5 \\
            algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=0.002 +trainer.test_freq=5 $@
        """,
    )
    assert settings["data"] == "~/a.parquet,~/b.parquet" and settings["max_new_tokens"] == 2048
    assert (settings["batch_size"], settings["num_generations"]) == (64, 4)
    assert settings["gradient_accumulation_steps"] == 8  # 16 prompts x 4 completions per optimizer step / 8
    assert settings["dynamic_sampling"] is True and settings["max_num_gen_batches"] == 5
    assert settings["kl_coef"] == 0.002 and settings["eval_every"] == 5 and settings["save_every"] == 0
    assert settings["dual_clip"] == 3.0 and settings["rollout"] == "ray://auto"  # defaults: two GPUs per engine

    settings, _ = migrate(
        "ppo.yaml",
        """
        algorithm: {adv_estimator: grpo, norm_adv_by_std_in_grpo: false}
        actor_rollout_ref:
          actor: {use_kl_loss: true, kl_loss_coef: 0.01, loss_agg_mode: seq-mean-token-mean}
          rollout: {n: 8, name: hf, tensor_model_parallel_size: 1}
        """,
    )
    assert (settings["estimator"], settings["kl_coef"], settings["loss_type"]) == ("grpo", 0.01, "grpo")
    assert settings["rollout"] == "transformers" and settings["scale_rewards"] == "none"


def test_without_a_kl_in_verl_there_is_none(migrate):
    settings, _ = migrate("t.sh", "python -m verl.trainer.main_ppo algorithm.adv_estimator=gae")
    assert settings["kl_coef"] == 0 and settings["estimator"] == "ppo" and settings["value_clip"] == 0.5


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("train.sh", "python train.py --epochs 3\n", "found no training with TRL"),
        ("train.py", "print('GRPO')\n", "found no training with TRL"),
        ("train.py", "def f(:\n", "line 1: not valid Python"),
        ("train.yaml", "a: [\n", "not valid YAML"),
        ("train.yaml", "- 1\n", "found no training with TRL"),
    ],
)
def test_sources_without_a_training_are_refused(tmp_path, capsys, name, source, message):
    (tmp_path / name).write_text(source)
    assert cli.main(["migrate", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["migrate", str(tmp_path / "missing.sh")]) == 2


def test_a_value_that_is_not_in_the_source_is_reported_although_it_has_a_default(migrate):
    script = """
    from trl import RLOOConfig, RLOOTrainer

    args = RLOOConfig("out", learning_rate=pick(), num_generations=count, push_to_hub=True)
    RLOOTrainer(model="m", args=args)
    """
    settings, text = migrate("train.py", script)
    assert "# learning_rate: the source doesn't show its value (pick())" in text
    assert "# num_generations: the source doesn't show its value (count)" in text
    assert settings["push_to_hub"] is True and "# push_to_hub: " not in text


def test_a_setting_that_needs_a_change_is_reported(tmp_path, capsys):
    (tmp_path / "t.sh").write_text("trl rloo --num_generations 1 --per_device_train_batch_size 4\n")
    assert cli.main(["migrate", str(tmp_path / "t.sh"), "--output", str(tmp_path / "t.yaml")]) == 0
    assert "# Change before training: estimator: rloo compares" in (tmp_path / "t.yaml").read_text()
    assert "need a change" in capsys.readouterr().err


def test_defaults_of_trl_are_those_of_the_installed_one():
    from trl import GRPOConfig, RLOOConfig

    for name, config_class in (("trl-rloo", RLOOConfig), ("trl-grpo", GRPOConfig)):
        theirs = config_class(bf16=False)
        differing = {
            setting: (value, getattr(theirs, setting))
            for setting, value in TRL_DEFAULTS[name].items()
            if setting != "bf16" and getattr(theirs, setting) != value
        }
        assert differing == {}


def test_the_tables_name_only_settings_that_exist():
    known = accepted_values(TrainConfig).keys() | aliases_of(TrainConfig).keys()
    for table in (OPENRLHF, VERL):
        assert {foreign.setting for foreign in table.values()} - {None} <= known
    assert set(SCRIPT_NAMES.values()) <= known
    assert set(OPENRLHF_DEFAULTS) | set(OPENRLHF_CONVERSIONS) <= OPENRLHF.keys() | {"actor.min_lr_ratio"}
    assert set(VERL_DEFAULTS) | set(VERL_CONVERSIONS) <= VERL.keys() | {"algorithm.norm_adv_by_std_in_grpo"}


def test_no_conversion_fails_on_the_default_of_its_framework(tmp_path):
    for text in ("python -m openrlhf.cli.train_ppo_ray", "python -m verl.trainer.main_ppo"):
        (tmp_path / "t.sh").write_text(text)
        translation = translate(read_training(tmp_path / "t.sh", None))
        assert translation.notes == {}
        TrainConfig(**translation.settings)
