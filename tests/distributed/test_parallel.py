"""Several ranks train like one, print once, and stop together, in real processes with gloo."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from warm import warm_python

import scripts
from reinforcepp.distributed import deepspeed as zero
from reinforcepp.distributed import ranks as distributed
from reinforcepp.errors import ConfigError
from reinforcepp.models.loading import load_policy
from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.completion_log import read_completions
from reinforcepp.training.checkpoint import Checkpoint

REWARD = """
import os, signal
calls = 0

def out_of_memory(*_, **named):
    import torch
    raise torch.OutOfMemoryError("tried to allocate 1.5 GiB")

def fails(prompts, completions, log_metric, log_extra, **_):
    global calls
    calls += 1
    log_metric("rank", int(os.environ["RANK"]))
    log_extra("rank", [os.environ["RANK"]] * len(prompts))
    open(os.environ["MARK"] + "-{RANK} of {WORLD_SIZE}".format(**os.environ), "w").close()
    how = os.environ["HOW"] if os.environ["RANK"] == "1" and calls == 2 else ""
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "runs out of memory":
        import torch
        torch.Tensor.backward = out_of_memory
    return [float(len(text) % 5) for text in completions]
"""
SHARDED = {
    "FSDP2": scripts.FSDP2,
    "ZeRO 3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
BACKENDS = ["DDP", "FSDP2"] + ["ZeRO 2", "ZeRO 3"] * (importlib.util.find_spec("deepspeed") is not None)
FLAGS = ["--max_steps", "2", "--max_new_tokens", "6", "--max_prompt_length", "40", "--batch_size", "3"]
FLAGS += ["--keep_last", "2"]
WAYS = ["does well", "does well by accelerate", "is killed", "runs out of memory"]
WAYS += ["does well by accelerate with DeepSpeed"] * ("ZeRO 3" in BACKENDS)
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
# --multi_gpu (below) is what it finds out where there are GPUs; without any it would start one process
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
DEEPSPEED = ["--use_deepspeed", "--zero_stage", "2"]


def training(launcher, model, data, folder, python=sys.executable):
    """The documented command under a launcher."""
    named = {"--mode": "train_rlhf", "--model_name": model, "--data_path": data, "--rlhf_model_path": folder}
    command = [python, *launcher, str(scripts.ROOT / "reinforce_cli.py"), *FLAGS, "--eval_prompts", "0"]
    return [*command, "--rollout", "transformers", *(str(word) for pair in named.items() for word in pair)]


# --- equality -------------------------------------------------------------------------------------------------------


def check_equality(rows, launches):
    """Equal advantages, weights and metrics for each backend and number of ranks; resumed runs make 3 steps and no more."""
    assert [(row["backend"], row["processes"]) for row in rows] == launches
    for row in rows:
        assert row["max_advantage_gap"] <= 1e-6 and row["max_weight_gap"] <= 1e-5, row
        assert row["max_metric_gap"] <= 1e-3, row
        if (row["backend"], row["processes"]) != ("DDP", 2):
            assert row["scenarios"]["goes on"]["steps"] == 3, row


def test_two_ranks_train_as_one_and_resume_each_others_checkpoints(tmp_path):
    rows = scripts.result_of("equality", tmp_path, "--small")["rows"]
    check_equality(rows, [("DDP", 1), ("DDP", 2), ("FSDP2", 2)])


@pytest.mark.full
def test_any_number_of_ranks_trains_alike_on_any_backend_and_resumes_others_checkpoints(tmp_path):
    rows = scripts.result_of("equality", tmp_path)["rows"]
    check_equality(rows, [(backend, processes) for backend in BACKENDS for processes in (1, 2, 3)])


AGREE = """
import os
from reinforcepp.distributed.ranks import Ranks, init_process_group
from reinforcepp.rollout.selection import EngineChoice, agree_on_engine
init_process_group(60)
ranks = Ranks()
own = EngineChoice("vllm", "can") if ranks.index == 0 else EngineChoice("transformers", "can't")
print(agree_on_engine(own, ranks).name, flush=True)
"""


@pytest.mark.full
def test_ranks_agree_on_an_engine(tmp_path):
    (tmp_path / "agree.py").write_text(AGREE)
    command = [sys.executable, *TORCHRUN, str(tmp_path / "agree.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["transformers"] * 2, done.stderr


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("backend", sorted(SHARDED.keys() & set(BACKENDS)))
def test_each_rank_saves_and_loads_its_shards(tmp_path, model_folder, pairs_csv, backend):
    """In bfloat16, so that there are float32 weights among the parts; the run that goes on ends like the other one."""
    environment = os.environ | SHARDED[backend] | {"OMP_NUM_THREADS": "1"}
    for name, rest in (
        ("whole", ["--save_every", "1"]),
        ("again", ["--resume", str(tmp_path / "whole/checkpoints/step-000001"), "--save_every", "1"]),
    ):
        command = training(TORCHRUN, model_folder, pairs_csv, tmp_path / name)
        command += ["--rewards", "rule:length?max=20", "--mixed_precision", "bf16", "--learning_rate", "1e-5", *rest]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    parts = sorted((tmp_path / "whole/checkpoints/step-000001/policy_optimizer").iterdir())
    assert len(parts) == 2
    masters = [[weight for name, weight in load_file(part).items() if name.endswith("/master")] for part in parts]
    begin = enumerate(load_policy(str(model_folder)).parameters())
    learnt = Checkpoint(tmp_path / "whole/checkpoints/step-000001").tensors("policy_optimizer")
    moved = max(float((learnt[f"{index}/master"] - weight.detach()).abs().max()) for index, weight in begin)
    assert moved <= 1.1e-5  # a step of the learning rate and no more: they began with all digits
    sizes = [sum(weight.numel() for weight in own) for own in masters]
    assert {weight.dtype for own in masters for weight in own} == {torch.float32} and min(sizes) > 0
    assert sum(sizes) == load_policy(str(tmp_path / "whole")).num_parameters()
    one, other = (Checkpoint(tmp_path / name / "checkpoints/step-000002") for name in ("whole", "again"))
    for name in ("model", "policy_optimizer"):
        own, again = one.tensors(name), other.tensors(name)
        assert own.keys() == again.keys() and all(torch.equal(own[key], again[key]) for key in own), name


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes isn't installed")
def test_adapters_on_4_bit_weights_train_alike_in_shards(tmp_path, model_folder, pairs_csv):
    def learnt(name, launcher, environment):
        command = [*training(launcher, model_folder, pairs_csv, tmp_path / name), "--learning_rate", "1e-4"]
        command += ["--rewards", f"{reward}:spread", "--use_peft", "--load_in_4bit"]
        given = os.environ | environment | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return load_file(tmp_path / name / "adapter_model.safetensors")

    reward = tmp_path / "reward.py"
    reward.write_text("def spread(completion_ids, **_):\n    return [sum(ids) % 7 / 7 for ids in completion_ids]\n")
    one = learnt("one", [], {})
    assert max(float(weight.abs().max()) for name, weight in one.items() if "lora_B" in name) > 1e-4
    for backend in sorted(SHARDED.keys() & set(BACKENDS)):
        several = learnt(backend.replace(" ", "_"), TORCHRUN, SHARDED[backend])
        # Adam divides each gradient by its own size, so rounding moves a small one's weight by a part of the learning rate,
        # 1e-4, and how large a part depends on the CPU. A lost shard or row moves most weights by all of it.
        assert max(float((one[name] - several[name]).abs().max()) for name in one) <= 1e-5, backend


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_gpus(tmp_path, model_folder, pairs_csv, backend):
    """As many processes as there are GPUs train two steps, and the run that goes on from the first ends with the same weights."""
    environment = os.environ | SHARDED.get(backend, {})
    if backend == "ZeRO 2":
        environment |= SHARDED["ZeRO 3"] | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(torch.cuda.device_count())]
    for name, rest in (("whole", []), ("again", ["--resume", str(tmp_path / "whole/checkpoints/step-000001")])):
        command = training(launcher, model_folder, pairs_csv, tmp_path / name)
        command += ["--rewards", "rule:length?max=20", "--mixed_precision", "bf16", "--save_every", "1", *rest]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.allclose(one[key].float(), other[key].float(), atol=1e-4) for key in one)


# --- the documented command ------------------------------------------------------------------------------------------


@pytest.fixture
def launched(tmp_path, model_folder, pairs_csv):
    """Return a function: train on two ranks in one of WAYS, return the run folder, the exit code, and the log."""

    def run(how):
        (tmp_path / "own.py").write_text(REWARD)
        launcher = TORCHRUN
        if "accelerate" in how:
            launcher = [*ACCELERATE, *(DEEPSPEED if "DeepSpeed" in how else ["--multi_gpu"])]
        rewards = ["--rewards", f"{tmp_path / 'own.py'}:fails"]
        python = warm_python() if how == "does well" else sys.executable
        command = [*training(launcher, model_folder, pairs_csv, tmp_path / how, python), *rewards]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HOW": how, "MARK": str(tmp_path / how)}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=900)
        return tmp_path / how, done.returncode, done.stderr

    return run


WELL = [how if how == "does well" else pytest.param(how, marks=pytest.mark.full) for how in WAYS if "does well" in how]


@pytest.mark.parametrize("how", WELL)
def test_rank_0_alone_prints_and_writes(launched, how):
    folder, code, text = launched(how)
    assert code == 0, text
    assert sorted(path.name for path in folder.parent.glob(f"{how}-*")) == [f"{how}-{rank} of 2" for rank in (0, 1)]
    for words in ("8 prompts", "training 2/2", "Saved policy to", "Doctor: "):
        assert text.count(words) == 1, text
    assert (folder / "model.safetensors").is_file() and len(read_metrics(folder)) == 2
    answers = read_completions(folder / "completions")
    assert [row["step"] for row in answers] == [1, 1, 1, 2, 2, 2]
    assert {row["extra/rank"] for row in answers} == {"0", "1"}
    assert [metrics["rank"] for metrics in read_metrics(folder)] == [0.5, 0.5]
    assert sorted(path.name for path in (folder / "completions").iterdir()) == [
        "step-000001.parquet",
        "step-000002.parquet",
    ]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("is killed", "error: Another rank exited without an error message"),
        pytest.param(
            "runs out of memory",
            "Memory ran out in a pass of",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_failing_rank_stops_all_ranks_with_one_error(launched, how, words):
    folder, code, text = launched(how)
    assert code != 0
    assert text.count(words) == 1 and text.count("error: ") == 1, text
    assert text.count("Traceback (most recent call last)") == 1, text  # the launcher's own
    assert len(read_metrics(folder)) == 1
    assert not (folder / "model.safetensors").exists()


def test_a_node_with_another_version_is_an_error(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "own_version", lambda: "0.1.0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        distributed._compare_versions()
    monkeypatch.setattr(distributed, "own_version", lambda: "0.0.9")
    with pytest.raises(ConfigError, match=r"Rank 0 runs reinforcepp 0\.1\.0, but .* runs 0\.0\.9"):
        distributed._compare_versions()


# --- settings of DeepSpeed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, torch.float32, "ZeRO stage 1"),
        ({}, torch.float32, "ZeRO stage 0"),
        ({"zero_optimization": {"stage": 2}}, torch.float16, "mixed_precision: fp16 .* DeepSpeed"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, torch.float32, "sets offload_param"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            torch.float32,
            "offload_optimizer",
        ),
        ({"zero_optimization": {"stage": 2}, "scheduler": {}}, torch.float32, "sets scheduler"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {}}, torch.float32, "sets optimizer"),
    ],
)
def test_unsupported_deepspeed_settings_are_errors(config, dtype, message):
    with pytest.raises(ConfigError, match=message):
        zero.complete_config(config, dtype)


def test_settings_of_the_training_override_deepspeed_settings():
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": 7.0, "fp16": {"enabled": True}, "prescale": 1}
    zero.complete_config(config, torch.bfloat16)
    assert config["bf16"] == {"enabled": True} and config["fp16"] == {"enabled": False}
    assert config["gradient_clipping"] == 0 and config["prescale"] == 1
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"


def test_the_precision_in_the_launchers_file_is_ignored_and_an_unusable_file_is_an_error(monkeypatch, tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert "bf16" not in zero.launcher_plugin().deepspeed_config
    file.write_text(json.dumps({"bf16": {"enabled": True}}))
    with pytest.raises(ConfigError, match=r"DeepSpeed configuration can't be used: .*ZeRO"):
        zero.launcher_plugin()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"DeepSpeed configuration can't be used: .*none\.json"):
        zero.launcher_plugin()


def test_without_deepspeed_the_error_names_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"isn't installed.*pip install 'deepspeed>=0\.19,<0\.20'"):
        zero.prepare_deepspeed(cpu=True)


# --- callbacks --------------------------------------------------------------------------------------------------------

CALLBACKS = '''
import os, sys
from pathlib import Path
from transformers import TrainerCallback
from reinforcepp import ReinforceConfig, ReinforceTrainer

rank, folder = os.environ["RANK"], Path(sys.argv[2])

class Asks(TrainerCallback):
    """On rank 1 only: a checkpoint after step 1, and the end of the training after step 2."""

    def on_step_end(self, args, state, control, **_):
        if rank == "1":
            control.should_save |= state.global_step == 1
            control.should_training_stop |= state.global_step == 2

    def on_save(self, args, state, control, **_):
        (folder / f"saved-{rank}").write_text(str(state.global_step))

args = ReinforceConfig(output_dir=str(folder / "run"), max_steps=4, batch_size=2, max_new_tokens=4, max_prompt_length=40,
                       save_every=0, keep_last=1, eval_prompts=0, rollout="transformers", learning_rate=1e-3)
rows = [{"prompt": f"Why is host {i} up?"} for i in range(8)]
trainer = ReinforceTrainer(sys.argv[1], lambda completions, **_: [float(len(text)) for text in completions], args, rows,
                           callbacks=[Asks])
(folder / f"steps-{rank}").write_text(str(trainer.train().global_step))
'''


def test_a_callback_of_any_rank_saves_and_stops_all_ranks(tmp_path, model_folder):
    script = tmp_path / "callbacks.py"
    script.write_text(CALLBACKS)
    done = scripts.forked(2, script, model_folder, tmp_path)
    assert done.returncode == 0, done.stderr
    written = {path.name: path.read_text() for path in tmp_path.glob("*-[01]")}
    assert written == {"saved-0": "1", "saved-1": "1", "steps-0": "2", "steps-1": "2"}
    assert (tmp_path / "run/checkpoints/step-000001").is_dir() and len(read_metrics(tmp_path / "run")) == 2


# --- gradients ------------------------------------------------------------------------------------------------------

GRADIENTS = """
import sys
import torch
from torch.profiler import profile
from transformers import AutoModelForCausalLM

from reinforcepp import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks, init_process_group
from reinforcepp.training.learner import Learner

init_process_group(60)
found = {}
for precision in ("no", "bf16"):
    config = ReinforceConfig(mixed_precision=precision, max_grad_norm=0.1)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    ranks = Ranks()
    learner = Learner(model, ranks, config, learning_rate=1e-3, steps=8)
    rows = list(torch.randint(0, 300, (8, 1, 6), generator=torch.Generator().manual_seed(0)))
    local = ranks.local_slice(rows)
    for _ in range(2):
        with profile() as profiled:
            for number, row in enumerate(local, 1):
                with learner.learning(last=number == len(local)):
                    learner.backward(learner.model(input_ids=row).logits.float().square().mean() / len(rows))
            norm = learner.clip()
        learner.step(norm)
    reductions = sum(event.name == "c10d::allreduce_" for event in profiled.events())
    weights = learner._masters.masters
    found[precision] = {"norm": norm, "reductions": reductions, "weights": [w.detach() for w in weights]}
torch.save(found, f"{sys.argv[2]}/{ranks.index}-{ranks.count}.pt")
"""


@pytest.mark.full
def test_ranks_reduce_gradients_once_per_optimizer_step_and_equal_one_rank(tmp_path, model_folder):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    for ranks in (1, 2):
        done = scripts.forked(ranks, script, model_folder, tmp_path)
        assert done.returncode == 0, done.stderr
    one, *two = (torch.load(tmp_path / name) for name in ("0-1.pt", "0-2.pt", "1-2.pt"))
    for precision, alone in one.items():
        assert alone["reductions"] == 0
        for rank in two:
            # Without DDP, the weights are reduced together, after one reduction that finds those with a gradient.
            assert rank[precision]["reductions"] == (1 if precision == "no" else 2)
            assert rank[precision]["norm"] == pytest.approx(alone["norm"], rel=1e-5)
            torch.testing.assert_close(rank[precision]["weights"], alone["weights"], rtol=0, atol=1e-5)
