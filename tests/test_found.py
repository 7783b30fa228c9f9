"""The checks of faults that were found on real models and data."""

import json

import pytest

from scripts import ROOT, benchmark, result_of


def test_every_entry_has_a_result():
    recorded = json.loads((ROOT / "benchmarks/results/found.json").read_text(encoding="utf-8"))["rows"]
    for area in ("model", "data", "template", "python"):
        benchmark(f"found.{area}_entries")
    entries = {entry.id for entry in benchmark("found.inputs").ENTRIES}
    assert {row["id"] for row in recorded} == entries and len(recorded) == len(entries)
    assert {row["verdict"] for row in recorded} <= {"fixed", "refused", "open"}


@pytest.mark.full
def test_every_verdict_is_as_recorded(tmp_path):
    recorded = json.loads((ROOT / "benchmarks/results/found.json").read_text(encoding="utf-8"))["rows"]
    verdicts = {row["id"]: (row["verdict"], row.get("problem")) for row in result_of("found", tmp_path)["rows"]}
    expected = {row["id"]: row["verdict"] for row in recorded}
    assert {id: found for id, found in verdicts.items() if found[0] != expected[id]} == {}
