"""Reward functions in TRL's signature: what they are given and what they may return."""

import csv

import pytest

from reinforcepp.data import load_prompts, resolve_data
from reinforcepp.errors import ConfigError, TrainingDiverged
from reinforcepp.rewards import load_rewards, name_of, score_with
from reinforcepp.types import Completion, Prompt

COMPLETIONS = [
    Completion(Prompt("a?", (1,), 0, {"topic": "x"}), (5, 0), (-1.0, -1.0), "aa", "stop"),
    Completion(Prompt("b?", (1,), 1, {"topic": "y"}), (6,), (-1.0,), "b", "length"),
]


def length(prompts, completions, **kwargs):
    return [len(c) for c in completions]


def topic(completions, prompts, topic):
    return [float(t == "x") for t in topic]


def test_scores_are_added_up_and_kept_apart():
    scores = score_with([length, topic], COMPLETIONS)
    assert scores.total == [3.0, 1.0]
    assert scores.by_function == {"length": [2.0, 1.0], "topic": [1.0, 0.0]}


def test_columns_are_aligned_with_completions():
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0, 0.0]

    score_with([spy], COMPLETIONS)
    assert seen == {
        "prompts": ["a?", "b?"],
        "completions": ["aa", "b"],
        "topic": ["x", "y"],
        "completion_ids": [[5, 0], [6]],
        "finish_reason": ["stop", "length"],
    }


def test_two_functions_of_one_name_are_both_counted():
    assert score_with([length, length], COMPLETIONS).total == [4.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ConfigError, "1 scores for 2 completions"),
        (None, ConfigError, "list of numbers"),
        (["high", "low"], ConfigError, "list of numbers"),
        ([1.0, float("nan")], TrainingDiverged, "gave nan"),
        ([float("inf"), 1.0], TrainingDiverged, "gave inf"),
    ],
)
def test_anything_else_is_an_error_that_names_the_function(returned, error, message):
    def wrong(prompts, completions):
        return returned

    with pytest.raises(error, match=f"wrong.*{message}"):
        score_with([wrong], COMPLETIONS)


def test_the_gold_judge_is_a_reward_by_its_name():
    (judge,) = load_rewards("builtin:judge").functions
    (row,) = load_prompts("builtin:network", heldout_fraction=0, seed=0)[2][:1]
    assert judge([row.prompt] * 2, ["", "Buy a new router."]) == [0.0, 0.0] and name_of(judge) == "judge"
    train = resolve_data("builtin:network").train
    with open(train, encoding="utf-8", newline="") as file:
        pairs = list(csv.DictReader(file))[:20]
    chosen = judge([p["prompt"] for p in pairs], [p["chosen"] for p in pairs])
    rejected = judge([p["prompt"] for p in pairs], [p["rejected"] for p in pairs])
    assert all(a > b for a, b in zip(chosen, rejected, strict=True))
