"""Kill trainings with SIGKILL, also during writes, and resume them: benchmarks/kill.py does the work."""

import pytest

from scripts import result_of


@pytest.fixture(scope="module")
def killed_at_random(tmp_path_factory):
    return result_of("kill", tmp_path_factory.mktemp("kill"), "--points", "20")


@pytest.fixture(scope="module")
def killed_at_each_write(tmp_path_factory):
    return result_of("kill", tmp_path_factory.mktemp("kill"), "--each_write")


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_a_run_killed_in_any_write_function_resumes_to_the_same_files(killed_at_each_write, kind):
    found = killed_at_each_write[kind]
    kills = [kill for row in found["rows"] for kill in row["kills"]]
    assert all(kill["killed"] for kill in kills) and len({kill["function"] for kill in kills}) == len(kills) == 5
    assert found["identical"] == found["points"], [row for row in found["rows"] if not row["identical"]]


def test_a_run_killed_in_an_episode_resumes_to_the_same_files(killed_at_each_write):
    found = killed_at_each_write["environment"]
    assert [kill["function"] for row in found["rows"] for kill in row["kills"] if kill["killed"]] == ["Guess.step"]
    assert found["identical"] == found["points"] == 1


@pytest.mark.full
@pytest.mark.parametrize("kind", ["policy", "reward", "environment"])
def test_a_run_killed_at_random_moments_resumes_to_the_same_files(killed_at_random, kind):
    found = killed_at_random[kind]
    assert found["killed"] >= 15, "most of the kills must have met a running training"
    assert found["identical"] == found["points"] == 20, [row for row in found["rows"] if not row["identical"]]
    writes = {kill["write"] for row in found["rows"] for kill in row["kills"] if "write" in kill and kill["killed"]}
    assert len(writes) >= 5, "some must have come while files were written"
