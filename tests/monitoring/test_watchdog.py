"""A training that hangs ends with the stacks of all threads."""

import faulthandler
import os
import subprocess
import sys
import time

import pytest

from reinforcepp.monitoring.watchdog import GRACE_SECONDS, STACKS, Watchdog
from scripts import SOURCE

PROGRAM = """
import sys, threading, time
from pathlib import Path
from reinforcepp.monitoring.watchdog import Watchdog

def waits_for_ever():
    time.sleep(600)

with Watchdog(Path(sys.argv[1]), 0.4) as watchdog:
    watchdog.beat("rollout of step 7")
    threading.Thread(target=waits_for_ever, daemon=True).start()
    time.sleep(600)
"""


def test_a_hang_ends_with_an_explanation(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "No progress for 0.4 seconds in the phase 'rollout of step 7'" in done.stderr
    assert str(tmp_path / STACKS) in done.stderr and "watchdog_seconds" in done.stderr
    stacks = (tmp_path / STACKS).read_text()
    assert "rollout of step 7" in stacks
    assert "waits_for_ever" in stacks and "<module>" in stacks, "the stacks of all threads"


def test_the_first_rank_of_each_node_mentions_the_other_ranks(tmp_path):
    for local, words in (
        ("0", "It might wait for ranks that hang or whose nodes are unreachable."),
        ("1", ""),
    ):
        several = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": local}
        environment = os.environ | {"PYTHONPATH": str(SOURCE)} | several
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and (words in done.stderr if words else not done.stderr)


def test_its_timer_is_off_after_the_block(tmp_path, monkeypatch):
    timers = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: timers.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: timers.append(None))
    with Watchdog(tmp_path, 60) as watchdog:
        watchdog._last -= 5
        watchdog.beat("update")
    watchdog.beat("over")
    assert timers == pytest.approx([60 + GRACE_SECONDS, 60 + GRACE_SECONDS, None], abs=1)


def test_progress_keeps_it_quiet(tmp_path):
    with Watchdog(tmp_path, 0.3) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            watchdog.beat("update")
    assert list(tmp_path.iterdir()) == []


def test_outside_its_block_and_at_0_it_does_not_watch(tmp_path):
    with Watchdog(tmp_path, 0.2):
        pass
    with Watchdog(tmp_path, 0):
        time.sleep(0.5)
    assert list(tmp_path.iterdir()) == []
