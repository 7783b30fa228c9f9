"""Reward functions in TRL's signature: arguments and return values."""

import asyncio
import csv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
from transformers import TrainerState

from reinforcepp.config import RewardScoringConfig
from reinforcepp.data import load_prompts, resolve_data
from reinforcepp.errors import ConfigError, RewardError, TrainingDiverged
from reinforcepp.rewards.functions import (
    BatchLog,
    RewardScores,
    drop_unscored,
    function_name,
    join_scores,
    score_with,
    unique_names,
)
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


def test_scores_are_summed_and_kept_by_function():
    scores = score_with([length, topic], COMPLETIONS)
    assert scores.total == [3.0, 1.0]
    assert scores.by_function == {"length": [2.0, 1.0], "topic": [1.0, 0.0]}


ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "b?"}]
CONVERSATION = replace(
    COMPLETIONS[1], prompt=Prompt("Be brief.\n\nb?", (1,), 1, {"topic": "y"}, "<think>", tuple(ASKED))
)


@pytest.mark.parametrize("plain", [False, True])
def test_functions_get_the_arguments_of_trl(plain):
    seen, state = {}, TrainerState(global_step=3)

    def spy(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0, 0.0]

    spy.plain_text = plain
    score_with([spy], [COMPLETIONS[0], CONVERSATION], trainer_state=state)
    logs = {name: seen.pop(name) for name in ("log_extra", *([] if plain else ["log_metric"]))}
    assert all(map(callable, logs.values()))
    assert seen == {
        "prompts": ["a?", "Be brief.\n\nb?" if plain else ASKED],
        "completions": ["aa", "<think>b" if plain else [{"role": "assistant", "content": "<think>b"}]],
        "topic": ["x", "y"],
        "conversations": ["a?", tuple(ASKED)],
        "chat_template_kwargs": [{}, {}],
        "completion_ids": [[5, 0], [6]],
        "finish_reason": ["stop", "length"],
    } | ({} if plain else {"trainer_state": state})


def test_the_datas_columns_replace_only_arguments_that_trl_does_not_have():
    columns = {"finish_reason": "A", "trainer_state": "B", "completion_ids": "C"}
    completion = replace(COMPLETIONS[0], prompt=replace(COMPLETIONS[0].prompt, columns=columns))
    seen = []

    def spy(finish_reason, trainer_state, completion_ids):
        seen.append((finish_reason, isinstance(trainer_state, list), completion_ids))
        return [0.0]

    score_with([spy], [completion])
    assert seen == [(["A"], False, [[5, 0]])]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("length?unit=characters&max=8", 1.0),
        ("regex?pattern=^<think>b$", 1.0),
        ("exact_match", 1.0),
        ("format", 0.0),
        ("repetition?n=1", 0.0),
    ],
)
def test_rules_read_the_texts_of_conversations(rule, expected):
    row = replace(CONVERSATION, prompt=replace(CONVERSATION.prompt, columns={"answer": "<think>b"}))
    assert load_rewards(f"rule:{rule}").score([row]).total == [expected]


def logging_function(prompts, log_extra, log_metric, trainer_state):
    log_extra("words", [torch.tensor(2), None][: len(prompts)])
    log_extra("parsed", [("a", 1), "b"][: len(prompts)])
    log_metric("hits", numpy.float32(0.25))
    log_metric("hits", 0.75)
    return [1.0, None][: len(prompts)]


def test_functions_log_columns_and_metrics():
    scores = score_with([logging_function], COMPLETIONS)
    assert scores.metrics == {"hits": 0.5} and scores.extra == {"words": [2, None], "parsed": ["('a', 1)", "b"]}
    _, kept = drop_unscored(COMPLETIONS, scores, grouped=False)
    assert kept.extra == {"words": [2], "parsed": ["('a', 1)"]} and kept.metrics == {"hits": 0.5} and kept.skipped == 1
    other = RewardScores([3.0], {"logging_function": [3.0]}, metrics={"hits": 1.0, "misses": 4.0})
    joined = join_scores([kept, other, RewardScores([], {"logging_function": []})])
    assert joined.metrics == {"hits": 0.75, "misses": 4.0} and joined.extra["words"] == [2, None]
    assert joined.total == [1.0, 3.0] and joined.skipped == 1


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        (lambda log: log.log_extra("a", [1]), r"log_extra\('a'\): 1 values for 2 completions"),
        (lambda log: [log.log_extra("a", [1, 2]), log.log_extra("a", [1, 2])], r"log_extra\('a'\): .* logged twice"),
        (lambda log: log.log_metric("a", "high"), r"log_metric\('a'\): 'high' isn't a number"),
    ],
)
def test_invalid_logs_are_errors(logs, message):
    with pytest.raises(ConfigError, match=message):
        logs(BatchLog(2))


def test_functions_of_the_same_name_both_count():
    assert score_with([length, length], COMPLETIONS).total == [4.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ConfigError, "1 scores for 2 completions"),
        (None, ConfigError, "returned a NoneType"),
        (0.5, ConfigError, "returned a float"),
        ({"a": 1.0, "b": 2.0}, ConfigError, "returned a dict"),
        ({1.0, 2.0}, ConfigError, "returned a set"),
        ("12", ConfigError, "returned a str"),
        (b"12", ConfigError, "returned a bytes"),
        (["high", "low"], ConfigError, "value that isn't a number.*'high'"),
        ([[1.0], [2.0]], ConfigError, "value that isn't a number"),
        ([1.0, float("nan")], TrainingDiverged, "returned nan"),
        ([float("inf"), 1.0], TrainingDiverged, "returned inf"),
    ],
)
def test_unusable_scores_raise_with_the_functions_name(returned, error, message):
    def wrong(prompts, completions):
        return returned

    with pytest.raises(error, match=f"wrong.*{message}"):
        score_with([wrong], COMPLETIONS)


def test_the_gold_judge_is_available_by_name():
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


def test_none_means_not_scored_and_other_functions_still_count():
    scores = score_with([lambda completions: [None, 2.0], length], COMPLETIONS, [10.0, 1.0])
    assert scores.total == [2.0, 21.0] and scores.known == [2.0, 21.0]
    assert scores.by_function == {"<lambda>": [None, 2.0], "length": [2.0, 1.0]}


def test_an_unscored_completion_has_no_total_and_no_penalty():
    scores = score_with([lambda completions: [1.0, None]], COMPLETIONS, truncation_penalty=5.0)
    assert scores.total == [1.0, None] and scores.known == [1.0]


def test_only_truncated_completions_pay_the_penalty():
    assert score_with([length], COMPLETIONS, [2.0], truncation_penalty=0.5).total == [4.0, 1.5]


def test_rewards_are_divided_by_a_power_of_the_tokens():
    """By hand: 4 tokens and a sum of 2 · 3 + 1 · 2 = 8; 8 / 4 = 2, 8 / sqrt(4) = 4, and the penalty isn't divided."""
    functions = [lambda completions: [3.0] * len(completions), lambda completions: [2.0] * len(completions)]
    rows = [Completion(Prompt("q?", (1,), 0), (5,) * n, (-1.0,) * n, "a", reason) for n, reason in ENDS]
    assert score_with(functions, rows, [2.0, 1.0], length_power=1.0).total == [2.0, 8.0, 8.0]
    assert score_with(functions, rows, [2.0, 1.0], 0.25, length_power=0.5).total == [3.75, 8.0, 8.0]
    assert score_with(functions, rows, [2.0, 1.0]).total == [8.0, 8.0, 8.0]
    assert score_with([lambda completions: [None] * 3], rows, length_power=1.0).total == [None] * 3
    settings = RewardScoringConfig(reward_length_power=0.5, truncation_penalty=0.25)
    assert load_rewards(functions, settings, [2.0, 1.0]).score(rows).total == [3.75, 8.0, 8.0]


ENDS = [(4, "length"), (1, "stop"), (0, "stop")]


def of_prompts(*keys):
    return [Completion(Prompt(f"{key}?", (1,), key), (5,), (-1.0,), f"{i}", "stop") for i, key in enumerate(keys)]


def kept(completions, totals, **settings):
    rest, scores = drop_unscored(
        completions, RewardScores(totals, {"f": totals, "g": [None] * len(totals)}), **settings
    )
    assert scores.by_function == {"f": scores.total, "g": [None] * len(rest)}
    assert scores.skipped == len(completions) - len(rest)
    return [c.text for c in rest], scores.total


def test_unscored_completions_are_dropped():
    assert kept(of_prompts(0, 1, 2), [1.0, None, 0.0], grouped=False) == (["0", "2"], [1.0, 0.0])
    assert kept(of_prompts(0, 0), [1.0, 2.0], grouped=True) == (["0", "1"], [1.0, 2.0])


def test_a_prompts_only_scored_sample_is_dropped_if_samples_are_compared():
    rows, totals = of_prompts(0, 0, 0, 1, 1, 2, 2), [1.0, None, 2.0, None, 3.0, 4.0, 5.0]
    assert kept(rows, totals, grouped=True) == (["0", "2", "5", "6"], [1.0, 2.0, 4.0, 5.0])
    assert kept(rows, totals, grouped=False)[1] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_rank_can_end_up_without_completions():
    for totals, grouped in (([None, None], False), ([None, 1.0], True)):
        assert kept(of_prompts(0, 0), totals, grouped=grouped) == ([], [])
    assert kept([], [], grouped=True) == ([], [])


# --- names ------------------------------------------------------------------------------------------------------------


def test_functions_of_the_same_name_are_logged_separately():
    def length_1(completions):
        return [0.0, 0.0]

    assert function_name(partial(partial(length))) == "length"
    assert unique_names([length, length_1, length, length]) == ["length", "length_1", "length_2", "length_3"]
    assert list(score_with([length, length], COMPLETIONS).by_function) == ["length", "length_1"]


# --- errors ------------------------------------------------------------------------------------------


def test_an_exception_becomes_one_line_with_name_and_line_number():
    def broken(completions):
        return [1 / 0 for _ in completions]

    with pytest.raises(
        RewardError, match=r"function broken: failed \(.*test_functions\.py, line \d+\): ZeroDivision"
    ) as caught:
        score_with([broken], COMPLETIONS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and "\n" not in str(caught.value)


def test_package_errors_pass_through():
    def invalid(completions):
        raise ConfigError("fix it")

    with pytest.raises(ConfigError, match=r"^fix it$"):
        score_with([invalid], COMPLETIONS)


def test_a_missing_column_is_named():
    def graded(completions, topics):
        return [0.0, 0.0]

    with pytest.raises(ConfigError, match=r"graded.*'topics' matches no column.*Did you mean 'topic'"):
        score_with([graded], COMPLETIONS)


def test_a_function_gets_only_the_arguments_it_names():
    def named(completions, topic="none"):
        return [float(t == "y") for t in topic]

    assert score_with([named], COMPLETIONS).total == [0.0, 1.0]


# --- async ------------------------------------------------------------------------------------------------------------


def test_async_functions_run_at_the_same_time_in_one_loop():
    loops, order = set(), []
    gate = []

    async def first(completions):
        loops.add(asyncio.get_running_loop())
        gate.append(asyncio.Event())
        order.append("first waits")
        await asyncio.wait_for(gate[0].wait(), 30)  # only the other function can set it
        return [1.0, None]

    class Second:
        async def __call__(self, completions, **_):
            loops.add(asyncio.get_running_loop())
            while not gate:
                await asyncio.sleep(0)
            order.append("second runs")
            gate[0].set()
            return [10.0, 20.0]

    scores = score_with([first, length, Second()], COMPLETIONS)
    assert scores.total == [13.0, 21.0] and len(loops) == 1 and order == ["first waits", "second runs"]
    assert list(scores.by_function) == ["first", "length", "Second"]


def test_async_functions_work_within_a_running_loop():
    async def slow(completions):
        await asyncio.sleep(0)
        return [1.0, 2.0]

    async def notebook():
        return score_with([slow], COMPLETIONS).total

    with ThreadPoolExecutor(1) as executor:  # the main thread can have a running loop, such as the browser's
        assert executor.submit(asyncio.run, notebook()).result() == [1.0, 2.0]


def test_an_exception_in_an_async_function_names_it():
    async def late(completions):
        raise KeyError("x")

    with pytest.raises(RewardError, match=r"function late: failed.*KeyError"):
        score_with([late], COMPLETIONS)


def test_collective_functions_come_first_and_run_without_completions():
    """Otherwise a rank whose local function fails, or that has no completions, leaves the others waiting."""
    called = []

    class Collective:
        collective = True

        def __call__(self, prompts, completions, **_):
            called.append(f"collective, {len(completions)}")
            return [10.0] * len(completions)

    def local(prompts, completions, **_):
        called.append("local")
        return [1.0] * len(completions)

    rewards = load_rewards([local, Collective()])
    scores = rewards.score(COMPLETIONS)
    assert called == [f"collective, {len(COMPLETIONS)}", "local"]
    assert list(scores.by_function) == ["local", "Collective"] and scores.by_function["local"][0] == 1.0
    assert rewards.score([]).total == [] and called[2:] == ["collective, 0"]


def test_functions_see_what_the_chat_template_wrote_of_an_answer():
    prompt = Prompt("q?", (1,), 0, {}, prefill="<think>\n")
    completion = Completion(prompt, (5, 6), (-1.0, -1.0), "four\n</think>\n<answer>4</answer>", "stop")
    assert load_rewards("rule:format").score([completion]).total == [1.0]
    without = Completion(Prompt("q?", (1,), 0), (5, 6), (-1.0, -1.0), completion.text, "stop")
    assert load_rewards("rule:format").score([without]).total == [0.0]


@pytest.mark.parametrize(("answers", "warned"), [(["7", "7"], True), (["7", "a"], False)])
def test_a_function_with_one_value_in_the_first_batches_is_reported(answers, warned, caplog):
    rewards = load_rewards("rule:exact_match")
    for answer in answers:
        prompt = Prompt("q?", (1,), 0, {"answer": answer})
        rewards.score([Completion(prompt, (5,), (-1.0,), "a", "stop")] * 4)
    assert ("gave 0 to each of the first 8 completions" in caplog.text) is warned


def test_a_penalty_that_no_completion_gets_yet_is_expected(caplog):
    rewards = load_rewards("rule:soft_overlong_punishment?max_completion_len=9&soft_punish_cache=2")
    for _ in range(2):
        rewards.score([Completion(Prompt("q?", (1,), 0), (5,), (-1.0,), "a", "stop")] * 4)
    assert len(rewards.first_scores) == 2 and not caplog.text
