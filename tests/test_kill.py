"""SIGKILL at random moments, those of writing included, and resume: see benchmarks/kill.py, which does the work."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_killed_run_that_is_resumed_writes_what_an_undisturbed_one_writes(tmp_path):
    output = tmp_path / "kill.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "benchmarks" / "kill.py", "--points", "20", "--output", output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    for kind in ("policy", "reward"):
        found = result[kind]
        assert found["killed"] >= 15, "most of the kills must have met a running training"
        assert found["identical"] == found["points"] == 20, [row for row in found["rows"] if not row["identical"]]
        writes = {kill["write"] for row in found["rows"] for kill in row["kills"] if "write" in kill and kill["killed"]}
        assert len(writes) >= 5, "some must have come while files were written"
