"""Every verb with every family of models, by both engines: the committed table is what happens."""

import importlib.util
import json

import pytest
import tiny

import scripts

TABLE = json.loads((scripts.ROOT / "benchmarks/results/families.json").read_text(encoding="utf-8"))["families"]


def test_the_table_has_all_families_and_only_one_gap():
    assert list(TABLE) == ["gpt2", *tiny.FAMILIES]
    gaps = {
        (family, engine)
        for family, verbs in TABLE.items()
        for engines in verbs.values()
        for engine, said in engines.items()
        if said != "passed"
    }
    assert gaps == {("phi", "vllm")}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM isn't installed")
def test_each_verb_does_what_the_table_says(tmp_path):
    assert scripts.result_of("families", tmp_path)["families"] == TABLE
