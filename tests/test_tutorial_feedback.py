"""docs/tutorials/feedback.md as a user follows it, command by command."""

from __future__ import annotations

import re

import pytest
from tutorials import BLOCK, FOLDER, follow

pytest.importorskip("sqlalchemy")

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


def test_each_step_has_one_block_that_succeeds(followed):
    assert len(COMMANDS) == len(re.findall(r"^## \d\.", TUTORIAL, re.MULTILINE)) == 7
    assert (followed[0] / "models" / "export" / "README.md").is_file()


def test_the_votes_are_pairs_for_the_reward_model(followed):
    folder, outputs = followed
    first = int(re.search(r"(\d+) votes", outputs[0])[1])
    assert 12 <= first <= 22, "20 prompts; those with equal responses are skipped, and some units are repeated"
    assert "Ada" in outputs[1]
    pairs = read_preferences(folder / "feedback.db").pairs
    assert sum(len(pair.chosen) > len(pair.rejected) for pair in pairs) > 0.9 * len(pairs)
    again = int(re.search(r"(\d+) votes", outputs[5])[1])
    assert again >= 4
    assert len(pairs) > first - 4


def test_the_tutorial_states_the_actual_outcome(followed):
    _, outputs = followed
    assert "warning: too-little" in outputs[1]
    assert "too few held-out pairs" in outputs[2]
    assert "inconclusive" in outputs[4].lower()
