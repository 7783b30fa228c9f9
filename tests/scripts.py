"""Runs a script of benchmarks/ as a user does, and reads the result it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def result_of(name: str, folder: Path, *flags: str) -> dict[str, Any]:
    """What ``python benchmarks/NAME.py *flags`` writes, with one thread and into ``folder``."""
    output = folder / f"{name}.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *flags, "--output", output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())
