"""The committed outcomes cover all attacks."""

import ast
import json
from pathlib import Path

HERE = Path(__file__).parent
RESULT = HERE.parents[1] / "benchmarks" / "results" / "security.json"


def attacks() -> set[str]:
    """Return the names of the tests that are attacks."""
    names = set()
    for file in HERE.glob("test_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("mark.attack" in ast.unparse(d) for d in node.decorator_list):
                names.add(f"tests/security/{file.name}::{node.name}")
    return names


def test_every_attack_failed_before_and_is_fixed_now():
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    assert {row["test"].partition("[")[0] for row in rows} == attacks()
    assert [row for row in rows if not row["fixed"]] == []
