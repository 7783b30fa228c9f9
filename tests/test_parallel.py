"""Several processes train as one does, tell it once, and end together, in real processes with gloo."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import scripts
from reinforcepp.checkpoint import Checkpoint
from reinforcepp.cli import main
from reinforcepp.models import load_policy
from reinforcepp.observe import read_metrics
from reinforcepp.observe.answers import read_answers

REWARD = """
import os, signal
calls = 0

def out_of_memory(*_, **named):
    import torch
    raise torch.OutOfMemoryError("tried to allocate 1.5 GiB")

def fails(prompts, completions, **_):
    global calls
    calls += 1
    open(os.environ["MARK"] + "-{RANK} of {WORLD_SIZE}".format(**os.environ), "w").close()
    how = os.environ["HOW"] if os.environ["RANK"] == "1" and calls == 2 else ""
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "runs out of memory":
        import torch
        torch.Tensor.backward = out_of_memory
    return [float(len(text) % 5) for text in completions]
"""
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FLAGS = ["--max_steps", "2", "--max_new_tokens", "6", "--max_prompt_length", "40", "--batch_size", "3"]
WAYS = ("does well", "does well by accelerate", "is killed", "runs out of memory")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
# --multi_gpu is what it finds out where there are GPUs; without any it would start one process
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def training(launcher, model, data, folder):
    """The documented command under a launcher."""
    named = {"--mode": "train_rlhf", "--model_name": model, "--data_path": data, "--rlhf_model_path": folder}
    command = [sys.executable, *launcher, str(scripts.ROOT / "reinforce_cli.py"), *FLAGS, "--eval_prompts", "0"]
    return [*command, "--rollout", "transformers", *(str(word) for pair in named.items() for word in pair)]


# --- equality -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return scripts.result_of("equality", tmp_path_factory.mktemp("equality"))["rows"]


def test_any_number_of_processes_trains_alike(rows):
    assert [(row["backend"], row["processes"]) for row in rows] == [
        (backend, processes) for backend in ("DDP", "FSDP2") for processes in (1, 2, 3)
    ]
    for row in rows:
        assert row["max_advantage_gap"] <= 1e-6 and row["max_weight_gap"] <= 1e-5, row
        assert row["max_metric_gap"] <= 1e-3, row


def test_a_training_goes_on_with_another_number_of_processes(rows):
    resumed = {
        (row["backend"], row["processes"]): found["steps"]
        for row in rows
        for name, found in row["scenarios"].items()
        if name == "goes on"
    }
    others = [("DDP", 1), ("DDP", 3), ("FSDP2", 1), ("FSDP2", 2), ("FSDP2", 3)]
    assert resumed == dict.fromkeys(others, 3)  # and no more: it did not begin again


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_each_process_writes_its_part_and_reads_it_again(tmp_path, model_folder, pairs_csv):
    """In bfloat16, so that there are float32 weights among the parts; the run that goes on ends like the other one."""
    environment = os.environ | SHARDED | {"OMP_NUM_THREADS": "1"}
    for name, rest in (
        ("whole", ["--save_every", "1"]),
        ("again", ["--resume", str(tmp_path / "whole/checkpoints/step-000001"), "--save_every", "1"]),
    ):
        command = training(TORCHRUN, model_folder, pairs_csv, tmp_path / name)
        command += ["--rewards", "rule:length?max=20", "--mixed_precision", "bf16", *rest]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    parts = sorted((tmp_path / "whole/checkpoints/step-000001/policy_optimizer").iterdir())
    assert len(parts) == 2
    masters = [[weight for name, weight in load_file(part).items() if name.endswith("/master")] for part in parts]
    sizes = [sum(weight.numel() for weight in own) for own in masters]
    assert {weight.dtype for own in masters for weight in own} == {torch.float32} and min(sizes) > 0
    assert sum(sizes) == load_policy(str(tmp_path / "whole")).num_parameters()
    one, other = (Checkpoint(tmp_path / name / "checkpoints/step-000002") for name in ("whole", "again"))
    for name in ("model", "policy_optimizer"):
        own, again = one.tensors(name), other.tensors(name)
        assert own.keys() == again.keys() and all(torch.equal(own[key], again[key]) for key in own), name


# --- the documented command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory, model_folder, pairs_csv):
    """For each of WAYS the run folder, exit code and what was printed; two processes each, of which the second one ..."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "own.py").write_text(REWARD)
    started = {}
    for how in WAYS:
        launcher = ACCELERATE if "accelerate" in how else TORCHRUN
        command = [
            *training(launcher, model_folder, pairs_csv, folder / how),
            "--rewards",
            f"{folder / 'own.py'}:fails",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HOW": how, "MARK": str(folder / how)}
        started[how] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    told = {how: process.communicate(timeout=300)[1] for how, process in started.items()}
    return {how: (folder / how, started[how].returncode, text) for how, text in told.items()}


@pytest.mark.parametrize("how", ["does well", "does well by accelerate"])
def test_it_is_told_once_and_one_process_writes(launched, how):
    folder, code, text = launched[how]
    assert code == 0, text
    assert sorted(path.name for path in folder.parent.glob(f"{how}-*")) == [f"{how}-{rank} of 2" for rank in (0, 1)]
    for words in ("8 prompts", "training 2/2", "Saved the trained model", "Doctor: "):
        assert text.count(words) == 1, text
    assert (folder / "model.safetensors").is_file() and len(read_metrics(folder)) == 2
    answers = read_answers(folder / "completions")
    assert [row["step"] for row in answers] == [1, 1, 1, 2, 2, 2]
    assert sorted(path.name for path in (folder / "completions").iterdir()) == [
        "step-000001.parquet",
        "step-000002.parquet",
    ]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("is killed", "error: Another process of this training ended without a word"),
        ("runs out of memory", "error: Memory ran out while training on 3 completions at a time"),
    ],
)
def test_one_that_fails_ends_all_with_its_own_words(launched, how, words):
    folder, code, text = launched[how]
    assert code != 0
    assert text.count(words) == 1 and text.count("error: ") == 1, text
    assert text.count("Traceback (most recent call last)") == 1, text  # the launcher's own
    assert len(read_metrics(folder)) == 1
    assert not (folder / "model.safetensors").exists()


def test_a_reward_model_is_trained_by_one_process(monkeypatch, capsys, tmp_path, pairs_csv):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["reward", "--data", str(pairs_csv), "--output_dir", str(tmp_path / "run")]) == 2
    assert "is trained by one process, but the launcher has started 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
