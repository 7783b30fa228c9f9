"""Reward functions in TRL's signature: what they are given and what they may return."""

import asyncio
import csv
from concurrent.futures import ThreadPoolExecutor

import pytest

from reinforcepp.data import load_prompts, resolve_data
from reinforcepp.errors import ConfigError, RewardError, TrainingDiverged
from reinforcepp.rewards.functions import RewardScores, drop_unscored, function_name, score_with, unique_names
from reinforcepp.rewards.sources import load_rewards
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
    assert judge([row.prompt] * 2, ["", "Buy a new router."]) == [0.0, 0.0] and function_name(judge) == "judge"
    train = resolve_data("builtin:network").train
    with open(train, encoding="utf-8", newline="") as file:
        pairs = list(csv.DictReader(file))[:20]
    chosen = judge([p["prompt"] for p in pairs], [p["chosen"] for p in pairs])
    rejected = judge([p["prompt"] for p in pairs], [p["rejected"] for p in pairs])
    assert all(a > b for a, b in zip(chosen, rejected, strict=True))


# --- not scored -------------------------------------------------------------------------------------------------------


def test_none_is_not_scored_and_the_other_functions_still_count():
    scores = score_with([lambda completions: [None, 2.0], length], COMPLETIONS, [10.0, 1.0])
    assert scores.total == [2.0, 21.0] and scores.known == [2.0, 21.0]
    assert scores.by_function == {"<lambda>": [None, 2.0], "length": [2.0, 1.0]}


def test_what_no_function_scores_has_no_sum_and_pays_no_penalty():
    scores = score_with([lambda completions: [1.0, None]], COMPLETIONS, truncation_penalty=5.0)
    assert scores.total == [1.0, None] and scores.known == [1.0]


def test_only_what_was_cut_off_pays_the_penalty():
    assert score_with([length], COMPLETIONS, [2.0], truncation_penalty=0.5).total == [4.0, 1.5]


def of_prompts(*keys):
    return [Completion(Prompt(f"{key}?", (1,), key), (5,), (-1.0,), f"{i}", "stop") for i, key in enumerate(keys)]


def kept(completions, totals, **settings):
    rest, scores = drop_unscored(
        completions, RewardScores(totals, {"f": totals, "g": [None] * len(totals)}), **settings
    )
    assert scores.by_function == {"f": scores.total, "g": [None] * len(rest)}
    assert scores.skipped == len(completions) - len(rest)
    return [c.text for c in rest], scores.total


def test_what_is_not_scored_is_taken_out():
    assert kept(of_prompts(0, 1, 2), [1.0, None, 0.0], grouped=False) == (["0", "2"], [1.0, 0.0])
    assert kept(of_prompts(0, 0), [1.0, 2.0], grouped=True) == (["0", "1"], [1.0, 2.0])


def test_what_is_left_alone_goes_where_samples_are_compared():
    rows, totals = of_prompts(0, 0, 0, 1, 1, 2, 2), [1.0, None, 2.0, None, 3.0, 4.0, 5.0]
    assert kept(rows, totals, grouped=True) == (["0", "2", "5", "6"], [1.0, 2.0, 4.0, 5.0])
    assert kept(rows, totals, grouped=False)[1] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_nothing_may_be_left_of_one_process_share():
    for totals, grouped in (([None, None], False), ([None, 1.0], True)):
        assert kept(of_prompts(0, 0), totals, grouped=grouped) == ([], [])
    assert kept([], [], grouped=True) == ([], [])


# --- names ------------------------------------------------------------------------------------------------------------


def test_functions_of_one_name_are_logged_each_on_its_own():
    def length_1(completions):
        return [0.0, 0.0]

    assert unique_names([length, length_1, length, length]) == ["length", "length_1", "length_2", "length_3"]
    assert list(score_with([length, length], COMPLETIONS).by_function) == ["length", "length_1"]


# --- what goes wrong in them ------------------------------------------------------------------------------------------


def test_an_exception_becomes_one_sentence_with_name_and_place():
    def broken(completions):
        return [1 / 0 for _ in completions]

    with pytest.raises(
        RewardError, match=r"function broken failed \(.*test_functions\.py, line \d+\): ZeroDivision"
    ) as told:
        score_with([broken], COMPLETIONS)
    assert isinstance(told.value.__cause__, ZeroDivisionError) and "\n" not in str(told.value)


def test_errors_of_ours_stay_what_they_are():
    def ours(completions):
        raise ConfigError("mend it")

    with pytest.raises(ConfigError, match=r"^mend it$"):
        score_with([ours], COMPLETIONS)


def test_a_column_that_isnt_there_is_named():
    def graded(completions, topics):
        return [0.0, 0.0]

    with pytest.raises(
        ConfigError, match=r"graded wants 'topics', which the data has no column for.*Did you mean 'topic'"
    ):
        score_with([graded], COMPLETIONS)


def test_a_function_gets_only_what_it_names():
    def little(completions, topic="none"):
        return [float(t == "y") for t in topic]

    assert score_with([little], COMPLETIONS).total == [0.0, 1.0]


# --- async ------------------------------------------------------------------------------------------------------------


def test_async_functions_run_at_the_same_time_in_one_loop():
    loops, order = set(), []
    gate = []

    async def first(completions):
        loops.add(asyncio.get_running_loop())
        gate.append(asyncio.Event())
        order.append("first waits")
        await asyncio.wait_for(gate[0].wait(), 30)  # only the other can let it go on
        return [1.0, None]

    class Second:
        async def __call__(self, completions, **_):
            loops.add(asyncio.get_running_loop())
            while not gate:
                await asyncio.sleep(0)
            order.append("second goes on")
            gate[0].set()
            return [10.0, 20.0]

    scores = score_with([first, length, Second()], COMPLETIONS)
    assert scores.total == [13.0, 21.0] and len(loops) == 1 and order == ["first waits", "second goes on"]
    assert list(scores.by_function) == ["first", "length", "Second"]


def test_async_functions_work_within_a_loop_that_runs():
    async def slow(completions):
        await asyncio.sleep(0)
        return [1.0, 2.0]

    async def notebook():
        return score_with([slow], COMPLETIONS).total

    with ThreadPoolExecutor(1) as elsewhere:  # the main thread may have a loop that runs: the browser's, for one
        assert elsewhere.submit(asyncio.run, notebook()).result() == [1.0, 2.0]


def test_an_exception_in_an_async_function_names_it():
    async def late(completions):
        raise KeyError("x")

    with pytest.raises(RewardError, match=r"function late failed.*KeyError"):
        score_with([late], COMPLETIONS)


def test_what_all_processes_ask_together_comes_first_and_also_without_completions():
    """Or one whose own function fails, or that has no completion, would leave the others waiting."""
    called = []

    class Together:
        collective = True

        def __call__(self, prompts, completions, **_):
            called.append(f"together, {len(completions)}")
            return [10.0] * len(completions)

    def own(prompts, completions, **_):
        called.append("own")
        return [1.0] * len(completions)

    rewards = load_rewards([own, Together()])
    scores = rewards.score(COMPLETIONS)
    assert called == [f"together, {len(COMPLETIONS)}", "own"]
    assert list(scores.by_function) == ["own", "Together"] and scores.by_function["own"][0] == 1.0
    assert rewards.score([]).total == [] and called[2:] == ["together, 0"]
