"""Every command with every model family on both engines, against the committed table."""

import json

import pytest
import tiny

import scripts
from reinforcepp.rollout.vllm.compat import node_problem

TABLE = json.loads((scripts.ROOT / "benchmarks/results/families.json").read_text(encoding="utf-8"))["families"]


def test_the_table_has_all_families_and_only_one_gap():
    assert list(TABLE) == ["gpt2", *tiny.FAMILIES]
    gaps = {
        (family, engine)
        for family, verbs in TABLE.items()
        for engines in verbs.values()
        for engine, outcome in engines.items()
        if outcome != "passed"
    }
    assert gaps == {("phi", "vllm")}


FOUR = ("gpt2", "llama", "gemma", "phi")
"""Default tier: learned positions, the common architecture, a tied and scaled one, and the one that vLLM can't run here."""


@pytest.mark.skipif(bool(node_problem()), reason=node_problem())
@pytest.mark.parametrize(
    "family", [name if name in FOUR else pytest.param(name, marks=pytest.mark.full) for name in TABLE]
)
def test_each_command_has_the_outcome_in_the_table(family, tmp_path):
    assert scripts.benchmark("families").outcomes(family, tmp_path) == TABLE[family]
