"""SIGKILL at random moments, those of writing included, and resume: see benchmarks/kill.py, which does the work."""

import pytest

from scripts import result_of


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return result_of("kill", tmp_path_factory.mktemp("kill"), "--points", "20")


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_a_killed_run_that_is_resumed_writes_what_an_undisturbed_one_writes(killed, kind):
    found = killed[kind]
    assert found["killed"] >= 15, "most of the kills must have met a running training"
    assert found["identical"] == found["points"] == 20, [row for row in found["rows"] if not row["identical"]]
    writes = {kill["write"] for row in found["rows"] for kill in row["kills"] if "write" in kill and kill["killed"]}
    assert len(writes) >= 5, "some must have come while files were written"
