"""L2: texts of a policy or of data that make a regular expression run for years.

Each attack runs in a separate process, which is stopped after a few seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from forks import SECONDS, attacked

from scripts import SOURCE

LENGTH = 200_000
NESTED, TEXT = "(a|aa)+$", "a" * 100 + "b"


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(
            "regex", marks=pytest.mark.attack("L2", "a completion on which the pattern of rule:regex backtracks")
        ),
        pytest.param(
            "exact_match",
            marks=pytest.mark.attack("L2", "a completion on which the pattern of rule:exact_match backtracks"),
        ),
    ],
)
def test_a_rule_has_a_time_limit(rule, outcome):
    found = attacked(f"""
from reinforcepp.config import reward_rules
reward_rules.MATCH_TIMEOUT_SECONDS = 0.05
reward_rules.make_rule("{rule}?pattern={NESTED}")([""], ["{TEXT}"], answer=["a"])
""")
    outcome(found)
    assert found.startswith("RewardError: Reward rule")


DIALOGUE = "from reinforcepp.data.dialogues import parse_dialogue; parse_dialogue({!r} * {} + 'x')"
SHARED = "from reinforcepp.data.dialogues import split_shared_prompt as split; text = {!r} * {}; split(text + 'x', text + 'y')"
NORMALIZE = "from reinforcepp.data.rows import normalize; normalize({!r} * {})"
WORDS = "from reinforcepp.config.reward_rules import make_rule; make_rule('repetition')([''], [{!r} * {}])"
SPECIAL = "from reinforcepp.models.special_tokens import unmarked; unmarked({!r} * {})"
CSV = "from reinforcepp.data.csv_dialect import find_dialect; find_dialect('sep= \\n' + {!r} * {} + 'x', ',')"
SCRIPT = """
import pathlib, tempfile
from reinforcepp.commands.migrate.reading import read_training
path = pathlib.Path(tempfile.mkdtemp()) / "train.sh"
path.write_text("trl grpo --model a\\n" + {!r} * {})
read_training(path, None)
"""


@pytest.mark.parametrize(
    ("code", "unit", "start"),
    [
        pytest.param(code, unit, start, marks=pytest.mark.attack("L2", f"{LENGTH:,} characters: {attack}"), id=attack)
        for code, unit, start, attack in [
            (DIALOGUE, "\n", "Human:", "a dialogue with a run of line breaks"),
            (DIALOGUE, " ", "<|im_start|>user\n", "a turn with a run of spaces"),
            (DIALOGUE, "[INST]", "", "a dialogue of openings"),
            (DIALOGUE, "\n### Input:\n", "### Instruction:\n", "an instruction with many inputs"),
            (SHARED, "\U0001f1e6", "", "a pair that begins with letters of flags"),
            (NORMALIZE, "\u0301\u0327", "a", "a letter with combining marks out of order"),
            (WORDS, "\U0001f1e6", "", "a completion of letters of flags"),
            (SPECIAL, "\ufdd0", "", "a text of the mark before special tokens"),
            (SCRIPT, "\n", "", "a script of empty lines"),
        ]
    ],
)
def test_no_text_takes_long(code, unit, start, outcome):
    found = attacked(code.replace("{!r} * {}", f"{start!r} + {unit!r} * {LENGTH // len(unit)}"))
    outcome(found)
    assert found.startswith("ended")


@pytest.mark.attack("L2", "1,000,000 spaces in a CSV file whose first line names the space as separator")
def test_no_separator_takes_long(outcome):
    found = attacked(CSV.format(" ", 1_000_000))
    outcome(found)
    assert found.startswith("ended")


HANGS = f"""
import re, sys
from pathlib import Path
from reinforcepp.monitoring import watchdog
watchdog.GRACE_SECONDS = 0.1

def reward(completions):
    return [bool(re.search({NESTED!r}, text)) for text in completions]

with watchdog.Watchdog(Path(sys.argv[1]), 0.2):
    reward([{TEXT!r}])
"""


@pytest.mark.attack("L2", "a completion on which a reward function backtracks, which stops every Python thread")
def test_the_watchdog_ends_a_call_that_holds_the_lock(tmp_path, outcome):
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        outcome(f"still running after {SECONDS} s, with a limit of 0.2 s")
        raise
    outcome(f"exit code {done.returncode}: {done.stderr.splitlines()[0]}")
    assert done.returncode == 1
    assert "Timeout (0:00:00" in done.stderr and "in reward" in done.stderr, "the stacks of all threads"
    assert list(tmp_path.iterdir()) == []
