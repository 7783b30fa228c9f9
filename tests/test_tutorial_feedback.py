"""docs/tutorials/feedback.md as a user follows it, command by command."""

from __future__ import annotations

import re

import pytest
from tutorials import BLOCK, FOLDER, follow

from reinforcepp.data import read_preferences

TUTORIAL = (FOLDER / "feedback.md").read_text(encoding="utf-8")
COMMANDS = [text for kind, _, text in BLOCK.findall(TUTORIAL) if kind == "bash"]


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.full)], ids=["in process", "by a shell"]
)
def followed(request, tmp_path_factory):
    """The folder in which every command ran, and the output of each, in one line."""
    folder = tmp_path_factory.mktemp("tutorial")
    outputs = follow("feedback", folder, in_process=request.param)
    return folder, [" ".join(output.split()) for output in outputs]


def test_each_step_has_one_command_that_succeeds(followed):
    assert len(COMMANDS) == len(re.findall(r"^## \d\.", TUTORIAL, re.MULTILINE)) == 7
    folder, outputs = followed
    assert (folder / "models" / "export" / "README.md").is_file()
    assert "(reward " in outputs[5]


def test_the_feedback_is_stored_as_pairs_for_the_reward_model(followed):
    folder, outputs = followed
    pairs = read_preferences(folder / "feedback.jsonl").pairs
    assert len(pairs) == outputs[0].count("Saved to feedback.jsonl") >= 3
    assert any("Question: And how do I read its speed?" in pair.prompt for pair in pairs)
    assert f"{len(pairs)} usable pairs" in outputs[2]


def test_the_tutorial_states_the_actual_outcome(followed):
    _, outputs = followed
    assert "warning: too-little" in outputs[1]
    assert "too few held-out pairs" in outputs[2]
    assert "inconclusive" in outputs[4]
