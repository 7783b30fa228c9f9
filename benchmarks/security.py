"""Run the attacks of tests/security on an older tree and on this one, and write what happened to results/security.json.

The older tree gets the tests of this one, so both meet the same attacks. Each of ``rows`` has the ``id`` of the weakness, the
``attack``, its outcomes ``before`` and ``after``, and the ``test``. It is fixed if the test fails on the older tree and passes on
this one.

python benchmarks/security.py [--before REVISION] [TEST ...]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from results import write_result

ROOT = Path(__file__).parents[1]
BEFORE = "4c6d31e"
"""The last revision before the attacks were tried."""


def main() -> None:
    """Run the attacks and write the outcomes; exit with 1 if one isn't fixed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="Revision of the older tree")
    parser.add_argument("tests", nargs="*", help="Files or tests of tests/security to run; writes no result")
    asked = parser.parse_args()
    after = run_attacks(ROOT, asked.tests)
    with tempfile.TemporaryDirectory() as folder:
        older = Path(folder) / "older"
        git("worktree", "add", "--detach", str(older), asked.before)
        try:
            shutil.rmtree(older / "tests")
            shutil.copytree(ROOT / "tests", older / "tests", ignore=shutil.ignore_patterns("__pycache__"))
            before = run_attacks(older, asked.tests)
        finally:
            git("worktree", "remove", "--force", str(older))
    rows = [row(test, before.get(test, {}), found) for test, found in after.items()]
    rows.sort(key=lambda row: (row["id"], row["test"]))
    for each in rows:
        print(
            f"{each['id']:3} {'fixed' if each['fixed'] else 'OPEN '} {each['test']}: {each['before']} -> {each['after']}"
        )
    if not asked.tests:
        fixed = sum(each["fixed"] for each in rows)
        write_result("security", {"before_revision": asked.before, "attacks": len(rows), "fixed": fixed, "rows": rows})
    sys.exit(not all(each["fixed"] for each in rows))


def row(test: str, before: dict[str, str], after: dict[str, str]) -> dict[str, Any]:
    """Return the row of a test; its outcome is a test's own record, or the first line of an error that came earlier."""
    return {
        "id": after.get("id", "?"),
        "attack": after.get("attack", "?"),
        "before": before.get("outcome", before.get("error", "not run")),
        "after": after.get("outcome", after.get("error", "not run")),
        "test": test,
        "fixed": before.get("result") == "failed" and "outcome" in before and after.get("result") == "passed",
    }


def run_attacks(tree: Path, tests: list[str]) -> dict[str, dict[str, str]]:
    """Return the outcome of each attack on the tree, by test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "attack",
            f"--junitxml={report}",
            *(tests or ["tests/security"]),
        ]
        command += ["-W", "ignore", "-o", "junit_family=xunit1", "-p", "no:cacheprovider", f"--basetemp={folder}/tests"]
        environment = os.environ | {"PYTHONPATH": str(tree / "src")}
        subprocess.run(command, cwd=tree, env=environment, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return dict(outcome(case, folder) for case in cases)


def outcome(case: ElementTree.Element, folder: str) -> tuple[str, dict[str, str]]:
    """Return a test's name and what it recorded."""
    found = {each.get("name", ""): each.get("value", "") for each in case.iter("property")}
    problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    found["result"] = {None: "passed", "failure": "failed"}.get(problem if problem is None else problem.tag, "not run")
    if problem is not None:
        found["error"] = (problem.get("message") or problem.tag).splitlines()[0][:200]
    file = (case.get("classname") or "").replace(".", "/")
    return f"{file}.py::{case.get('name')}", {name: value.replace(folder, "FOLDER") for name, value in found.items()}


def git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
