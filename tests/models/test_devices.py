"""Which device computes: the check of driver, PyTorch and GPU, the setting use_cpu, and the compiler of kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from types import SimpleNamespace

import pytest
import torch

import reinforcepp
from reinforcepp import ConfigError, GenerateConfig, ReinforceConfig, RewardModelConfig, SftConfig
from reinforcepp.commands.cli import main
from reinforcepp.commands.table import COMMANDS
from reinforcepp.config.plan import PlanConfig
from reinforcepp.config.shared import DeviceConfig
from reinforcepp.models import devices
from reinforcepp.rollout.vllm import compat
from scripts import ROOT

DRIVER = "NVRM version: NVIDIA UNIX {}  {}  Release Build\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
ON_THE_CPU = ["lint", "doctor", "report", "migrate", "recipes", "export", "push"]
ON_THE_CPU += ["label export", "label import", "label agreement"]
"""Commands that need no GPU."""
ARGUMENTS = {"label": ["builtin:tiny"]}
"""Arguments with which a command loads a model, if it does so only then."""


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node with an NVIDIA driver and a CUDA build of PyTorch that finds no GPU; each part can be changed."""

    def change(driver="580.65.06", module="x86_64 Kernel Module", cuda="13.0", visible=None, devices_exist=True):
        (tmp_path / "version").write_text(DRIVER.format(module, driver) if driver else "")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(devices, "DEVICE_FILES", (str(tmp_path / ("version" if devices_exist else "absent")),))

    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi
    change()
    return change


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cuda": None}, ["580.65.06", r"built for CPUs", "make venv PACKAGES=cuda"]),
        ({"driver": "535.161.08"}, [r"535\.161\.08", r"CUDA 13\.0", "driver 580 or later", "Update the driver"]),
        ({"driver": "570.86", "module": "Open Kernel Module for x86_64"}, [r"570\.86", "580"]),
        ({"driver": "520.1", "cuda": "12.8"}, [r"520\.1", r"CUDA 12\.8", "525"]),
        ({"devices_exist": False}, ["no GPU", "docker run --gpus all"]),
        ({"visible": "9"}, ["CUDA_VISIBLE_DEVICES=9", "nvidia-smi"]),
        ({}, ["found no GPU", "nvidia-smi"]),
    ],
)
def test_a_gpu_that_cannot_be_used_stops_the_command(node, changes, expected):
    node(**changes)
    with pytest.raises(ConfigError) as caught:
        devices.choose_device()
    message = str(caught.value)
    assert all(re.search(text, message) for text in [*expected, "device='cpu'"]), message


def test_the_reason_of_cuda_is_shown(node, monkeypatch):
    def fail():
        raise RuntimeError("Unexpected error from cudaGetDeviceCount()")

    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(ConfigError, match="Unexpected error from cudaGetDeviceCount"):
        devices.choose_device()


@pytest.mark.parametrize("changes", [{"driver": ""}, {"visible": ""}, {"visible": "-1"}, {"visible": "NoDevFiles"}])
def test_without_a_driver_or_with_hidden_gpus_the_cpu_computes(node, changes):
    node(**changes)
    devices.choose_device()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == changes.get("visible")


@pytest.mark.parametrize("how", ["setting", "accelerate launch --cpu"])
def test_the_user_chooses_the_cpu(node, monkeypatch, how):
    if how != "setting":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    devices.choose_device(use_cpu=how == "setting")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    devices.choose_device()  # within the same process


def test_a_gpu_in_use_cannot_be_hidden(node, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"device='cpu': PyTorch already uses the cuda .*empty CUDA_VISIBLE_DEVICES"):
        devices.choose_device(use_cpu=True)
    devices.choose_device()


def test_nvidia_smi_has_the_version_where_the_kernel_shows_none(node, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "none")
    assert devices.driver_version() == ""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 566.36\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert devices.driver_version() == "566.36"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVML library version: 535.183\nexit 18\n")
    assert devices.driver_version() == ""


def test_tests_see_no_gpu_unless_they_are_about_gpus():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


# --- commands and functions -------------------------------------------------------------------------------------------


def test_every_command_checks_the_device_or_needs_none():
    without = [name for name, command in COMMANDS.items() if not issubclass(command.config, DeviceConfig)]
    assert sorted(without) == sorted(ON_THE_CPU)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ON_THE_CPU])
def test_a_command_stops_if_the_gpu_cannot_be_used(node, capsys, name):
    node(driver="535.161.08")
    assert main([name, *ARGUMENTS.get(name, [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: This node has an NVIDIA driver (535.161.08)") and "--device cpu" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "flags", [["--use_cpu"], ["--device", "cpu"], ["--config", "plan.yaml"], ["--device", "h100"]], ids=" ".join
)
def test_flags_and_files_choose_the_cpu(node, tmp_path, monkeypatch, capsys, flags):
    node(driver="535.161.08")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text("device: cpu\nmodel: absent\n")
    for command in ("plan",) if "h100" in flags else ("plan", "reward", "serve-reward"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert main([command, *flags, *([] if "--config" in flags else ["--model", "absent"])]) == 2
        assert "absent" in capsys.readouterr().err  # after the check of the device
        if command != "plan":
            assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_names_of_the_setting():
    assert ReinforceConfig(device="cpu").use_cpu and SftConfig(use_cpu=True).use_cpu
    assert not RewardModelConfig(device="auto").use_cpu and not GenerateConfig(model="x").use_cpu
    with pytest.raises(ConfigError, match="both are given"):
        ReinforceConfig(device="cpu", use_cpu=True)
    assert PlanConfig(device="h100").uses_this_node is False and PlanConfig().uses_this_node


ROWS = [{"prompt": "Hi", "chosen": "a", "rejected": "b", "completion": "a"}] * 2


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: reinforcepp.ReinforceTrainer("builtin:tiny", len, ReinforceConfig(output_dir=folder), ROWS),
        lambda folder: reinforcepp.train_reward_model(RewardModelConfig(output_dir=folder)),
        lambda folder: reinforcepp.sft(SftConfig(output_dir=folder), "builtin:tiny", ROWS),
        lambda folder: reinforcepp.generate("builtin:tiny", "Hi"),
        lambda folder: reinforcepp.compare("builtin:tiny", "builtin:tiny"),
        lambda folder: reinforcepp.plan("builtin:tiny"),
    ],
    ids=["ReinforceTrainer", "train_reward_model", "sft", "generate", "compare", "plan"],
)
def test_functions_check_the_device(node, tmp_path, call):
    node(cuda=None)
    with pytest.raises(ConfigError, match="built for CPUs"):
        call(str(tmp_path / "run"))


# --- the install ------------------------------------------------------------------------------------------------------


def setup(folder, smi="exit 9", **environment):
    """Run scripts/setup_venv.sh in ``folder`` with this nvidia-smi, up to the creation of the environment."""
    for path in [*ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml", ROOT / "scripts/setup_venv.sh"]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    programs = {
        "python": '[ "$1" = -c ]',  # new enough, and can't create an environment
        "df": "printf 'head\\n/ 1 1 99999999 1 /\\n'",
        "nvidia-smi": smi,
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    given = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")} | environment
    command = ["sh", str(folder / "scripts/setup_venv.sh")]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize("packages", ["", "cuda", "plain"])
def test_the_install_stops_at_an_old_driver(tmp_path, packages):
    shown = setup(tmp_path, "echo 535.161.08", PACKAGES=packages)
    assert "driver is version 535.161.08" in shown and "CUDA 13, which needs 580 or later" in shown
    assert "PACKAGES=cpu" in shown and "IGNORE_DRIVER=1" in shown and "can't create an environment" not in shown


@pytest.mark.parametrize(
    "changes",
    [
        {"smi": "echo 580.65.06"},
        {"smi": "echo 1000.1"},
        {"smi": "echo 535.161.08", "PACKAGES": "cpu"},
        {"smi": "echo 535.161.08", "IGNORE_DRIVER": "1"},
    ],
)
def test_the_install_continues(tmp_path, changes):
    assert "can't create an environment" in setup(tmp_path, **changes)


def test_the_install_and_the_commands_have_the_same_table():
    script = (ROOT / "scripts/setup_venv.sh").read_text()
    assert {
        int(cuda): int(oldest) for cuda, oldest in re.findall(r"(\d+)\) oldest=(\d+) ;;", script)
    } == devices.OLDEST_DRIVER
    (locked,) = re.findall(r"^nvidia-cudnn-cu(\d+)==", (ROOT / "requirements-reinforce.txt").read_text(), re.MULTILINE)
    assert int(locked) in devices.OLDEST_DRIVER


# --- the compiler -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Return a function that gives this node only some programs, and the header Python.h or not."""
    monkeypatch.setattr(devices.sys, "platform", "linux")
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))

    def have(*names):
        for name in names:
            (tmp_path / name).touch(0o755)

    return have


@pytest.mark.parametrize(
    ("have", "on_gpu", "missing"),
    [
        ([], True, "a C compiler and Python.h"),
        (["gcc"], True, "lacks Python.h to"),
        (["Python.h"], True, "a C compiler to"),
        (["gcc", "Python.h"], False, r"a C\+\+ compiler to"),
    ],
)
def test_a_missing_compiler_is_named_with_its_packages(tools, have, on_gpu, missing):
    tools(*have)
    problem = devices.compiler_problem(on_gpu=on_gpu)
    assert re.search(missing, problem) and f"build-essential python{sysconfig.get_python_version()}-dev" in problem


def test_a_complete_compiler_is_no_problem(tools, monkeypatch):
    tools("clang", "g++", "Python.h")
    assert not devices.compiler_problem(on_gpu=True) and not devices.compiler_problem(on_gpu=False)
    monkeypatch.setenv("CXX", "other")
    assert "CXX=other" in devices.compiler_problem(on_gpu=False)


def test_a_training_with_torch_compile_needs_a_compiler(tools, tmp_path):
    args = {"output_dir": str(tmp_path / "run"), "torch_compile": True}
    with pytest.raises(ConfigError, match=r"torch_compile: this node lacks a C\+\+ compiler"):
        reinforcepp.ReinforceTrainer("builtin:tiny", len, ReinforceConfig(**args), ROWS)
    with pytest.raises(ConfigError, match=r"torch_compile: this node lacks a C\+\+ compiler"):
        reinforcepp.sft(SftConfig(**args), "builtin:tiny", ROWS)


def test_vllm_on_a_gpu_needs_a_compiler(tools, monkeypatch):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "a C compiler" in compat.node_problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compat, "built_for_cpu", lambda: True)
    assert compat.node_problem() == ""
