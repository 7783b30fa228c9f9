"""The code of TRL users: how much of it changes is as recorded in benchmarks/results/trl_compat.json."""

import json
from collections import Counter
from functools import cache
from typing import Any

import pytest

from scripts import ROOT, benchmark, result_of

FAST = (
    "train-str-model",
    "eval_dataset-dict_of_dataset",
    "reward-conversational-prompts",
    "steps_per_generation",
    "max_grad_norm-weight_decay",
    "callback-stops-training",
    "evaluate-returns-metrics",
    "save_model-dir-and-reload",
    "config-is-mutable",
    "reward-margin-column",
)


@cache
def behaviors() -> dict[str, Any]:
    benchmark("trl_compat_behaviors")  # whose modules the script imports later
    return {behavior.id: behavior for behavior in benchmark("trl_compat").all_behaviors()}


@cache
def recorded() -> dict[str, dict[str, str]]:
    result = json.loads((ROOT / "benchmarks/results/trl_compat.json").read_text(encoding="utf-8"))
    return {row["behavior"]: row for row in result["rows"]}


def test_recorded_levels():
    rows = recorded()
    assert list(rows) == list(behaviors()) and len(rows) == 195
    levels = Counter(row["level"] for row in rows.values())
    assert levels.keys() <= {"unchanged", "names", "small change", "impossible"}
    assert levels["unchanged"] >= 120 and levels["impossible"] <= 12
    assert all(row["level"] == "unchanged" or row["change"] for row in rows.values())
    assert all(row["trl"] == "passed" or row["trl"].startswith("not run: ") for row in rows.values())


def worse(row: dict[str, str]) -> bool:
    levels = benchmark("trl_compat").LEVELS
    return levels.index(row["level"]) > levels.index(recorded()[row["behavior"]]["level"])


@pytest.mark.parametrize("behavior", FAST)
def test_level_is_at_least_as_recorded(behavior):
    row = benchmark("trl_compat").run(behaviors()[behavior], "reinforcepp")
    assert not worse(row), row["problem"]


@pytest.mark.full
def test_every_level_is_at_least_as_recorded(tmp_path):
    rows = result_of("trl_compat", tmp_path, "--library", "reinforcepp")["rows"]
    # accuracy_reward needs a package that isn't in the requirements.
    found = [row for row in rows if "math_verify" not in row.get("problem", "")]
    assert {row["behavior"]: row["problem"] for row in found if worse(row)} == {}
