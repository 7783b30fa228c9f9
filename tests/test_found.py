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
def test_no_fault_is_open(tmp_path):
    rows = result_of("found", tmp_path)["rows"]
    assert [(row["id"], row["problem"]) for row in rows if row["verdict"] == "open"] == []
