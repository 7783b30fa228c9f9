"""Train with one injected problem each, and soundly with five seeds: the doctor finds each problem and no other."""

from __future__ import annotations

import pytest

import scripts

pytestmark = pytest.mark.full  # test_rules.py has each rule on recorded metrics


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return scripts.result_of("doctor", tmp_path_factory.mktemp("doctor"), "--steps", "8", "--seeds", "5")


def test_every_fault_is_found(result):
    assert result["injected"] >= 18
    assert [row for row in result["faulty"] if not row["found"]] == []


def test_sound_runs_of_five_seeds_raise_no_alarm(result):
    assert result["healthy_runs"] == 5 and [row for row in result["healthy"] if row["findings"]] == []
