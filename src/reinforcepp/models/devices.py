"""Whether this process computes on a GPU, and why PyTorch can't use the one that the node has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from reinforcepp.errors import ConfigError, first_line, option

OLDEST_DRIVER = {12: 525, 13: 580}
"""Oldest major version of NVIDIA's Linux driver for each major version of CUDA.

Source: CUDA Toolkit release notes, table "CUDA Toolkit and Minimum Required Driver Version for CUDA Minor Version
Compatibility". scripts/setup_venv.sh has the same table.
"""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg")
"""Files through which processes reach an NVIDIA GPU, on Linux and on WSL."""
VERSION = re.compile(r"\d+(?:\.\d+)+")
VISIBLE = "CUDA_VISIBLE_DEVICES"
TRUE = ("1", "true", "yes", "on", "y", "t")


def hide_gpus() -> None:
    """Make this process and those that it starts compute on the CPU. Call it before PyTorch looks for GPUs."""
    os.environ[VISIBLE] = ""


def choose_device(use_cpu: bool = False) -> None:
    """Hide the GPUs if the user wants the CPU; otherwise check that PyTorch can use a GPU if the node has an NVIDIA driver.

    ``accelerate launch --cpu`` and an empty ``CUDA_VISIBLE_DEVICES`` also mean the CPU.

    Raises:
        ConfigError: PyTorch can't use the GPU, or has already used it although the user wants the CPU.
    """
    import torch

    if use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE:
        hide_gpus()
        if torch.accelerator.is_available():
            raise ConfigError(
                f"{option('device', 'cpu')}: PyTorch already uses the {torch.accelerator.current_accelerator()} device of this "
                f"process. Start Python with an empty {VISIBLE} in the environment."
            )
    elif not torch.accelerator.is_available() and (problem := _gpu_problem(torch)):
        raise ConfigError(
            f"{problem} To compute on the CPU instead, add {option('device', 'cpu')} or set {VISIBLE} to an empty value."
        )


def quiet_deepspeed() -> None:
    """Keep DeepSpeed, which other libraries import if it is installed, from warning that this node has no GPU."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _gpu_problem(torch: Any) -> str:
    """Return why PyTorch can't use the NVIDIA GPU of this node and the fix; empty if there is none or the user hides it."""
    visible = os.environ.get(VISIBLE)
    if visible is not None and visible.strip().lower() in ("", "-1", "none", "nodevfiles"):
        return ""
    driver = driver_version()
    if not driver:
        return ""
    found = f"This node has an NVIDIA driver ({driver}), but "
    if torch.version.cuda is None:
        return (
            f"{found}the installed PyTorch ({torch.__version__}) is built for CPUs. Install the CUDA packages: make venv "
            "PACKAGES=cuda, or pip install -r requirements-reinforce.txt."
        )
    cuda = torch.version.cuda
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0)
    if int(driver.split(".")[0]) < oldest:
        return (
            f"{found}the installed PyTorch is built for CUDA {cuda}, which needs driver {oldest} or later. Update the driver, "
            "or install a PyTorch for an older CUDA."
        )
    if not any(map(os.path.exists, DEVICE_FILES)):
        return f"{found}this container or job has no GPU. Start it with one: docker run --gpus all, or sbatch --gpus 1."
    if visible is not None:
        return f"{found}none of its GPUs is {VISIBLE}={visible}. Correct it; nvidia-smi lists the GPUs."
    try:
        torch.cuda.init()
        reason = "it found no GPU"
    except (AssertionError, RuntimeError) as error:
        reason = first_line(error)
    return f"{found}PyTorch can't use a GPU ({reason}). Check that nvidia-smi lists one, and restart after a driver update."


def driver_version() -> str:
    """Return the version of the NVIDIA driver that runs this node's GPUs; empty without one."""
    try:
        found = VERSION.search(DRIVER_FILE.read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found is None and (command := shutil.which("nvidia-smi")):  # WSL has only this
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return ""
        found = VERSION.search(answer)
    return found[0] if found else ""


def compiler_problem(*, on_gpu: bool) -> str:
    """Return what this node lacks to compile kernels by Triton (GPU) or Inductor (CPU), and the fix; empty if nothing."""
    if sys.platform != "linux":
        return ""
    variable, usual, language = ("CC", ("gcc", "clang", "cc"), "C") if on_gpu else ("CXX", ("g++",), "C++")
    chosen = os.environ.get(variable)
    missing = []
    if not any(map(shutil.which, [chosen] if chosen else usual)):
        missing.append(f"{variable}={chosen}" if chosen else f"a {language} compiler")
    headers = [sysconfig.get_config_var("INCLUDEPY"), sysconfig.get_path("include")]
    if not any(Path(folder, "Python.h").is_file() for folder in headers if folder):
        missing.append("Python.h")
    if not missing:
        return ""
    packages = f"build-essential python{sysconfig.get_python_version()}-dev"
    return (
        f"this node lacks {' and '.join(missing)} to compile kernels. On Debian and Ubuntu, run apt install {packages}"
    )


def check_compiler(setting: str) -> None:
    """Check that this node can compile the kernels that ``setting`` needs.

    Raises:
        ConfigError: The compiler or the headers of Python are missing.
    """
    import torch

    if problem := compiler_problem(on_gpu=torch.accelerator.is_available()):
        raise ConfigError(f"{setting}: {problem}.")
