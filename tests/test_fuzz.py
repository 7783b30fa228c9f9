"""A few hundred of the cases of benchmarks/fuzz.py, which says what is tried."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_bad_input_ends_in_a_named_error(tmp_path):
    output = tmp_path / "fuzz.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "benchmarks" / "fuzz.py", "--cases", "50", "--output", output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["tracebacks"] == result["hangs"] == 0, result["failures"]
    assert result["cases"] >= 390
    for kind in ("csv", "damaged csv", "settings", "rewards"):
        found = result["kinds"][kind]
        assert found["results"] and found["named_errors"], f"{kind}: both outcomes must occur, or little was tried"
