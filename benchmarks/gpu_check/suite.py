"""The tests that need a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from common import Node, Skipped, run_python

TESTS = Path(__file__).parents[2] / "tests"


def gpu_tests(node: Node) -> dict[str, Any]:
    """``pytest -m gpu`` on the files that have such tests."""
    if not node.on_gpu:
        raise Skipped("the tests need a GPU")
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    done = run_python("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rs", *files, timeout=300)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    if not counts.get("passed"):
        raise Skipped("all tests were skipped")
    return counts
