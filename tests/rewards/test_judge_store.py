"""The file of a judge, shared by processes that are killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from reinforcepp.rewards.judge.store import BudgetSpent, Spending, VerdictStore
from scripts import SOURCE

WRITER = """
import sys
from pathlib import Path
from reinforcepp.rewards.judge.store import BudgetSpent, Spending, VerdictStore

store, name = VerdictStore(Path(sys.argv[1])), sys.argv[2]
for number in range(int(sys.argv[3])):
    try:
        store.reserve("m", 2.0, None, float(sys.argv[4]))
    except BudgetSpent:
        sys.exit(3)
    assert store.put(f"both {number}", {"score": name})["score"] in ("a", "b", "c")
    store.put(f"{name} {number}", {"score": 1})
    store.settle("m", 2.0, Spending(1, 100, 10, 1.0))
    print(number, flush=True)
"""


def writer(path, name, count, budget=1e9):
    command = [sys.executable, "-c", WRITER, str(path), name, str(count), str(budget)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE, text=True)


@pytest.mark.full
def test_several_processes_write_a_new_file_and_none_loses_a_verdict(tmp_path):
    path = tmp_path / "v.sqlite"
    running = [writer(path, name, 150) for name in "abc"]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    store = VerdictStore(path)
    assert store.spent("m") == Spending(450, 45_000, 4_500, 450.0)
    assert all(store.get(f"{name} {number}") == {"score": 1} for name in "abc" for number in range(150))


@pytest.mark.full
def test_processes_that_share_a_budget_never_exceed_it(tmp_path):
    path = tmp_path / "v.sqlite"
    running = [writer(path, name, 150, budget=100) for name in "abc"]
    assert [process.wait(60) for process in running] == [3, 3, 3]
    assert 97 <= VerdictStore(path).spent("m").dollars <= 100


@pytest.mark.full
def test_a_killed_process_loses_no_verdict_and_frees_no_budget(tmp_path):
    path = tmp_path / "v.sqlite"
    for _ in range(4):
        process = writer(path, "a", 100_000)
        while int(process.stdout.readline()) < 20:
            pass
        process.send_signal(signal.SIGKILL)
        last = int([20, *process.stdout.read().split("\n")[:-1]][-1])
        process.wait()
        store = VerdictStore(path)
        assert all(store.get(f"a {number}") for number in range(last + 1))
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    spent = store.spent("m")
    assert spent.dollars >= spent.requests, "a request in progress counts with the most that it can cost"
    assert spent.input_tokens in range(100 * (spent.requests - 4), 100 * spent.requests + 1, 100)


def test_the_first_verdict_stays(tmp_path):
    one, other = VerdictStore(tmp_path / "v"), VerdictStore(tmp_path / "v")
    assert one.put("k", {"score": 1}) == {"score": 1} and other.put("k", {"score": 2}) == {"score": 1}
    assert one.get("other") is None and one.spent("m") == Spending()


def test_a_refused_request_is_not_recorded():
    store = VerdictStore(None)
    store.reserve("m", 4.0, 2, 5.0)
    with pytest.raises(BudgetSpent, match=r"records \$4\.0000 of \$5, and the next request can cost up to \$4\.0000"):
        store.reserve("m", 4.0, 2, 5.0)
    store.settle("m", 4.0, Spending(1, 7, 3, 1.0))
    store.reserve("m", 4.0, 2, 5.0)
    assert store.spent("m") == Spending(2, 7, 3, 5.0)
    with pytest.raises(BudgetSpent, match="records 2 of 2 requests"):
        store.reserve("m", 0.0, 2, 5.0)
