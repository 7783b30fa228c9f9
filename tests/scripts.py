"""Runs commands as a user does: scripts of benchmarks/, whose results it reads, and what several processes do together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
"""What tells a training under a launcher to work in shards."""


def result_of(name: str, folder: Path, *flags: str) -> dict[str, Any]:
    """What ``python benchmarks/NAME.py *flags`` writes, with one thread and into ``folder``."""
    output = folder / f"{name}.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *flags, "--output", output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def launched(processes: int, *command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python *command`` with one thread, under torchrun if there are to be several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    search = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")])
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search, "RAY_worker_niceness": "0"} | environment
    words = [sys.executable, *(launcher if processes > 1 else []), *map(str, command)]
    return subprocess.run(words, env=given, capture_output=True, text=True, timeout=300)
