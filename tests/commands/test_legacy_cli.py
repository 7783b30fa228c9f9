"""The documented commands, word for word, and how the flags of ``reinforce_cli.py`` map to the commands."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from warm import warm_python

from reinforcepp.commands import cli
from reinforcepp.commands import legacy_cli as classic
from reinforcepp.config import GenerateConfig, RewardModelConfig, TrainConfig
from scripts import ROOT

COMMANDS = {
    "train_reward": "python reinforce_cli.py --mode train_reward --model_name distilgpt2 "
    "--data_path example_feedback_diverse.csv --reward_model_path models/reward_model",
    "train_rlhf": "python reinforce_cli.py --mode train_rlhf --model_name distilgpt2 "
    "--data_path example_feedback_diverse.csv --reward_model_path models/reward_model "
    "--rlhf_model_path models/rlhf_model --learning_rate 1e-5 --kl_coef 0.1 --batch_size 8",
    "generate": "python reinforce_cli.py --mode generate --model_name distilgpt2 --rlhf_model_path models/rlhf_model "
    '--prompt "How do I check the IP address of my Linux machine?"',
}


# --- word for word ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A clone as far as the commands see it, beside a folder ``distilgpt2``."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "reinforce_cli.py").symlink_to(ROOT / "reinforce_cli.py")
    shutil.copy(ROOT / "example_feedback_diverse.csv", folder)
    tiny.save(folder / "distilgpt2", n_positions=512, seed=1)  # this one does not end its answer at once
    return folder


@pytest.fixture(scope="module")
def done(folder) -> dict[str, subprocess.CompletedProcess]:
    """The outputs of the three commands, run one after the other; the last two are forks of a process with loaded libraries."""
    results = {}
    for mode, command in COMMANDS.items():
        _, *arguments = shlex.split(command)
        python = sys.executable if mode == "train_reward" else warm_python()
        results[mode] = subprocess.run([python, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
    return results


@pytest.mark.parametrize("mode", COMMANDS)
def test_the_documented_command_succeeds(done, mode):
    assert done[mode].returncode == 0, done[mode].stderr
    assert "Traceback" not in done[mode].stderr
    assert "error" not in done[mode].stderr.lower().replace("calibration error", "")


@pytest.mark.parametrize("mode", ["train_reward", "train_rlhf", "generate"])
def test_no_library_warns_on_the_way(done, mode):
    assert "warn" not in done[mode].stderr.lower()


def test_the_reward_model_and_its_card(done, folder):
    from reinforcepp.rewards.trained import load_reward_model

    card = json.loads((folder / "models/reward_model/reward_model.json").read_text())
    assert (card["base_model"], card["data"]) == ("distilgpt2", "example_feedback_diverse.csv")
    assert (card["train_pairs"], card["heldout_pairs"]) == (22, 2)
    assert 0 <= card["figures"]["accuracy"] <= 1
    assert len(card["fingerprint"]) == 8
    scores = load_reward_model(str(folder / "models/reward_model"))(["Why?", "Why?"], ["Because of DNS.", "No idea."])
    assert len(set(scores)) == 2
    assert "24 usable pairs" in done["train_reward"].stderr
    assert "accuracy" in done["train_reward"].stderr


def test_the_policy_was_trained_on_every_prompt(done, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = folder / "models/rlhf_model"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]  # 22 prompts, 8 at a time
    assert metrics[-1]["epoch"] == 1.0
    assert {"reward", "kl", "entropy", "completions/mean_length", "num_tokens"} <= metrics[0].keys()
    timings = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    assert len(timings) == 3 and {"step_time", "time/rollout", "time/update"} <= timings[0].keys()
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert {k: settings[k] for k in ("learning_rate", "kl_coef", "batch_size", "max_new_tokens", "seed")} == {
        **{"learning_rate": 1e-5, "kl_coef": 0.1, "batch_size": 8},
        **{"max_new_tokens": 384, "seed": 42},
    }
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder / "distilgpt2", run))
    assert before.keys() == after.keys()
    assert not before["transformer.wte.weight"].equal(after["transformer.wte.weight"])
    assert AutoTokenizer.from_pretrained(run).chat_template
    assert "reward" in done["train_rlhf"].stderr


def test_the_answer_and_only_the_answer_is_on_standard_output(done):
    assert done["generate"].stdout.strip()
    assert done["generate"].stderr.startswith("Completions come from ") and done["generate"].stderr.count("\n") == 1
    assert "How do I check" not in done["generate"].stdout


# --- how flags map ----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """``asked("--mode ...")`` returns the command and the configuration without running them."""
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr(cli, "run", lambda command, config: calls.append((command, config)) or 0)

    def ask(command: str):
        assert classic.main(shlex.split(command)) == 0
        return calls.pop()

    return ask


def test_defaults_of_this_interface(asked):
    data = "example_feedback_diverse.csv"
    assert asked("--mode train_reward") == ("reward", RewardModelConfig(model="distilgpt2", data=data))
    assert asked("--mode train_rlhf") == (
        "train",
        TrainConfig(model="distilgpt2", data=data, output_dir="models/rlhf_model"),
    )
    assert asked("--mode generate --prompt hi") == ("generate", GenerateConfig(model="models/rlhf_model", prompt="hi"))


def test_every_documented_flag_is_taken(asked):
    columns = "--prompt_column p --chosen_column c --rejected_column r"
    sizes = "--batch_size 8 --mini_batch_size 4 --gradient_accumulation_steps 2 --max_length 300 --seed 7"
    paths = "--model_name m --data_path d --reward_model_path rm"
    shared = {"prompt_column": "p", "chosen_column": "c", "rejected_column": "r", "seed": 7, "max_length": 300}
    shared |= {"batch_size": 8, "micro_batch_size": 4, "gradient_accumulation_steps": 2, "model": "m", "data": "d"}
    _, reward = asked(f"--mode train_reward {paths} {columns} {sizes}")
    assert reward == RewardModelConfig(output_dir="rm", **shared)
    lengths = "--max_prompt_length 100 --max_new_tokens 200"
    _, train = asked(f"--mode train_rlhf {paths} --rlhf_model_path o {columns} {sizes} {lengths} --learning_rate 2e-6")
    assert train == TrainConfig(
        reward_model="rm", output_dir="o", max_prompt_length=100, max_new_tokens=200, learning_rate=2e-6, **shared
    )
    sampling = "--temperature 0.5 --top_p 0.8 --top_k 20 --repetition_penalty 1.2"
    _, generate = asked(f"--mode generate --rlhf_model_path o --prompt 'a b' {lengths} {sampling} --seed 7")
    assert generate == GenerateConfig(
        **{"model": "o", "prompt": "a b", "max_prompt_length": 100, "max_new_tokens": 200, "seed": 7},
        **{"temperature": 0.5, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.2},
    )


@pytest.mark.parametrize(
    ("flags", "model"),
    [
        ("--model_name a --rlhf_model_path b", "b"),
        ("--rlhf_model_path b --model_name a", "b"),
        ("--model_name=a --rlhf_model_path=b", "b"),
        ("--model_name a", "a"),
        ("", "models/rlhf_model"),
        ("--model c", "c"),
    ],
)
def test_the_trained_model_answers(asked, flags, model):
    assert asked(f"--mode generate {flags} --prompt hi")[1].model == model


@pytest.mark.parametrize(
    "flags",
    [
        "--model_name m --batch_size 4",
        "--model_name=m --batch_size=4",
        "--model-name m --batch-size 4",
        "--model m --batch_size 4",
    ],
)
def test_ways_to_write_a_flag(asked, flags):
    config = asked(f"{flags} --mode train_rlhf")[1]
    assert (config.model, config.batch_size) == ("m", 4)


def test_switches(asked):
    assert asked("--mode train_rlhf --overwrite")[1].overwrite
    assert not asked("--mode=train_rlhf --no_overwrite")[1].overwrite


def test_a_file_wins_over_the_defaults_and_flags_over_the_file(asked, tmp_path):
    (tmp_path / "s.yaml").write_text("model: from_file\ndata: from_file.csv\nbatch_size: 4\n")
    _, config = asked(f"--mode train_rlhf --config {tmp_path / 's.yaml'} --data_path flag.csv")
    assert (config.model, config.data, config.batch_size) == ("from_file", "flag.csv", 4)
    assert config.output_dir == "models/rlhf_model"


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("", ["--mode is missing", "train_reward, train_rlhf, generate"]),
        ("--mode", ["--mode is missing"]),
        ("--mode trian_rlhf", ["'trian_rlhf'", "Did you mean 'train_rlhf'"]),
        ("--mode train_rlhf --bacth_size 3", ["--bacth_size", "Did you mean '--batch_size'"]),
        ("--mode train_rlhf --data_pth x.csv", ["--data_pth", "Did you mean '--data_path'"]),
        ("--mode train_rlhf --rlhf-model-pth x", ["Did you mean '--rlhf_model_path'"]),
        ("--mode train_reward --kl_coef 0.1", ["train_reward", "--kl_coef", "belongs to train_rlhf"]),
        ("--mode train_reward --temperature 1", ["belongs to train_rlhf and generate"]),
        (
            "--mode generate --data_path x.csv --prompt hi",
            ["--data_path", "belongs to train_sft and train_reward and train_rlhf"],
        ),
        ("--mode generate --prompt How do I", ["'do'", "quotes"]),
        ("--mode train_rlhf --batch_size -1", ["batch_size", "greater than 0", "-1"]),
    ],
)
def test_errors_use_the_flag_names_of_this_interface(command, named, capsys, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda *_: pytest.fail("it was run"))
    assert classic.main(shlex.split(command)) == 2
    out, err = capsys.readouterr()
    assert [word for word in named if word not in err] == []
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_help_names_every_mode_and_its_flags(capsys):
    assert classic.main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in ("train_reward", "train_rlhf", "generate", "--rlhf_model_path", "--kl_coef", "--repetition_penalty"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 110
    with pytest.raises(SystemExit) as stop:
        classic.main(["--mode", "train_rlhf", "--help"])
    assert stop.value.code == 0
    assert "bias the policy ratio" in " ".join(capsys.readouterr().out.replace("│", " ").split())
