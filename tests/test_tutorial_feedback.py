"""docs/tutorials/feedback.md as a user follows it, command by command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from reinforcepp.data import read_preferences
from scripts import ROOT, SOURCE

TUTORIAL = (ROOT / "docs" / "tutorials" / "feedback.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder in which every command was run, and what each of them said."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "bin").mkdir()
    command = folder / "bin" / "reinforcepp"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m reinforcepp "$@"\n')
    command.chmod(0o755)
    own = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(SOURCE)}
    own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    said = []
    for script in COMMANDS:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=os.environ | own,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, script + done.stdout + done.stderr
        said.append(" ".join((done.stdout + done.stderr).split()))
    return folder, said


def test_every_step_has_one_command_and_they_go_through(followed):
    assert len(COMMANDS) == len(re.findall(r"^## \d\.", TUTORIAL, re.MULTILINE)) == 7
    folder, said = followed
    assert (folder / "models" / "export" / "README.md").is_file()
    assert "(reward " in said[5]


def test_the_feedback_becomes_pairs_for_the_reward_model(followed):
    folder, said = followed
    pairs = read_preferences(folder / "feedback.jsonl").pairs
    assert len(pairs) == said[0].count("added to feedback.jsonl") >= 3
    assert any("Question: And how do I read its speed?" in pair.prompt for pair in pairs)
    assert f"{len(pairs)} usable pairs" in said[2]


def test_what_the_tutorial_says_of_the_outcome_is_so(followed):
    _, said = followed
    assert "warning: too-little" in said[1]
    assert "Too few held-out pairs to tell" in said[2]
    assert "no difference shown" in said[4]
