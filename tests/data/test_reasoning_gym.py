"""Tasks of reasoning-gym with the real package: rows, held-out rows, the verifiers as a reward, and errors."""

import json
import re
import sys
import zlib

import pytest

from reinforcepp.config import CompareConfig, TrainConfig
from reinforcepp.config.data_spec import data_names, heldout_tasks
from reinforcepp.data import load_prompts, resolve_data
from reinforcepp.data.reasoning_gym import HELDOUT_SEED, dataset_of, score_answer
from reinforcepp.errors import ConfigError
from reinforcepp.rewards.reasoning_gym import final_answer
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.types import Completion, Prompt

SUMS = "reasoning_gym:chain_sum?size=40&max_terms=2&max_digits=1"


def load(source, seed=1):
    return load_prompts(source, heldout_fraction=0.5, seed=seed)


def score(pairs, name="reasoning_gym"):
    """Scores of (row, text) pairs."""
    completions = [
        Completion(Prompt(row.prompt, (1,), i, row.columns), (5,), (-1.0,), text, "stop")
        for i, (row, text) in enumerate(pairs)
    ]
    return load_rewards(name).score(completions)


# --- without the package ----------------------------------------------------------------------------------------------


def test_a_name_has_the_task_the_weight_and_the_generators_options():
    first, second = data_names("reasoning_gym:gcd?max_value=9&weight=2&seed=3, reasoning_gym:chain_sum")
    assert (first.task, first.weight, first.generator) == ("gcd", 2.0, (("max_value", "9"), ("seed", "3")))
    assert (second.task, second.weight, second.generator, second.paths) == ("chain_sum", 1.0, (), [])
    assert data_names("gcd.csv")[0].task is None


def test_held_out_rows_have_their_own_source_unless_a_file_or_a_split_is_named():
    names = "reasoning_gym:gcd?size=9,reasoning_gym:lcm"
    assert heldout_tasks(names) == "reasoning_gym:gcd?size=9&split=heldout,reasoning_gym:lcm?split=heldout"
    assert heldout_tasks("reasoning_gym:gcd,my.csv") is heldout_tasks("reasoning_gym:gcd?split=heldout") is None
    assert resolve_data("reasoning_gym:gcd,my.csv").heldout is None


@pytest.mark.parametrize(
    "text", ["reasoning_gym:gcd?size=", "reasoning_gym:gcd?size=1&size=2", "reasoning_gym:gcd?weight=0"]
)
def test_options_are_checked_without_the_package(text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        data_names(text)


def test_the_verifiers_are_the_judge_unless_they_are_the_reward():
    assert CompareConfig(data=SUMS).judge_name == "reasoning_gym"
    assert TrainConfig(data=SUMS, rewards=("rule:length?max=9",)).judge_name == "reasoning_gym"
    assert TrainConfig(data=SUMS, rewards=("2*reasoning_gym",)).judge_name is None
    assert TrainConfig(data=SUMS, rewards=("reasoning_gym",), judge="reasoning_gym").judge_name == "reasoning_gym"


@pytest.mark.parametrize(
    ("config", "settings"),
    [(TrainConfig, {"rewards": ("reasoning_gym",)}), (CompareConfig, {"judge": "reasoning_gym"})],
)
def test_the_reward_needs_a_task_as_data(config, settings):
    with pytest.raises(ConfigError, match=r"scores only its own tasks, not my\.csv"):
        config(data="my.csv", **settings)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    dataset_of.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'reinforcepp\[reasoning-gym\]'"):
        load("reasoning_gym:gcd")


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def package():
    return pytest.importorskip("reasoning_gym")


def test_a_row_is_the_generators_entry(package):
    _, rows, _ = load("reasoning_gym:basic_arithmetic?size=5&seed=7&operators=+|-&allow_parentheses=false")
    dataset = package.create_dataset("basic_arithmetic", size=5, seed=7, operators=("+", "-"), allow_parentheses=False)
    assert [row.columns["answer"] for row in rows] == [entry["answer"] for entry in dataset]
    assert [row.columns["metadata"] for row in rows] == [entry["metadata"] for entry in dataset]
    assert rows[0].prompt == f"{dataset[0]['question']}\n\nGive the final answer between <answer> and </answer>."


def test_rows_are_the_same_each_time_and_the_hash_follows_the_options(package):
    first, again, other = load(SUMS), load(SUMS, seed=2), load(SUMS + "&seed=43")
    assert first == again
    assert first[0].sha256 != other[0].sha256 and first[1][0].prompt != other[1][0].prompt


def test_held_out_rows_come_from_other_seeds_and_repeat_no_training_row(package):
    # chain_sum with two digits has 200 questions: 100 pairs and two signs, so 150 training rows leave few of them.
    _, train, heldout = load("reasoning_gym:chain_sum?size=150&min_terms=2&max_terms=2&max_digits=1&heldout=20")
    assert len(heldout) == 20 == len({row.prompt for row in heldout})
    assert not {row.prompt for row in heldout} & {row.prompt for row in train}
    assert all(f"seed={HELDOUT_SEED}" in row.columns["reasoning_gym"] for row in heldout)
    assert len(load(SUMS)[2]) == 4  # a tenth by default


def test_tasks_are_mixed_by_weight(package):
    data, train, heldout = load(SUMS + ",reasoning_gym:gcd?size=5&weight=3&heldout=2")
    rows = [row.columns["reasoning_gym"].partition("?")[0] for row in train]
    assert rows.count("gcd") == 15 and rows.count("chain_sum") == len(data.rows) - 5 - 6
    assert len(heldout) == 4 + 2


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("chain_sums", "no task 'chain_sums'. Did you mean 'chain_sum'"),
        ("chain_sum?max_term=3", "'max_term' of chain_sum not found.*Did you mean 'max_terms'"),
        ("chain_sum?max_terms=x", "max_terms must be a whole number, not x"),
        ("chain_sum?allow_negation=2", "allow_negation must be true or false, not 2"),
        ("chain_sum?max_terms=1", "max_terms must be >= min_terms"),
        ("chain_sum?seed=-1", "seeds of training rows must be from 0"),
        (f"chain_sum?seed={HELDOUT_SEED}", "seeds of training rows must be from 0"),
        ("chain_sum?heldout=x", "heldout must be a number of rows"),
        ("chain_sum?heldout=0", "at least 1, not 0"),
        ("chain_sum?split=test", "split can be train or heldout, not test"),
        ("word_sorting?transformation=x", "transformation must be lowercase or"),
        ("rearc?board_format_opts=1", "has no form as text"),
        ("chain_sum?size=300&max_terms=2&max_digits=1&min_terms=2&heldout=1&weight=1&size=2", "given twice"),
    ],
)
def test_an_unusable_task_is_one_sentence(package, task, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load(f"reasoning_gym:{task}")
    assert "\n" not in str(raised.value)


def test_a_task_whose_questions_are_all_in_training_has_no_held_out_row(package):
    with pytest.raises(ConfigError, match="held-out questions is in the training rows"):
        load("reasoning_gym:chain_sum?min_terms=2&max_terms=2&max_digits=1&size=3000&heldout=2")


# --- the verifiers ----------------------------------------------------------------------------------------------------


def test_the_last_tagged_answer_is_scored_by_the_tasks_verifier(package):
    _, (row, *_), _ = load(SUMS)
    right = row.columns["answer"]
    texts = [
        f"<answer>{right}</answer>",
        f"<answer>x</answer> no: <answer> {right}.0 </answer>",
        right,
        "<answer>x</answer>",
    ]
    scores = score([(row, text) for text in texts])
    assert scores.total == [1.0, 1.0, 0.0, 0.0]  # chain_sum's verifier compares numbers: 7.0 equals 7
    assert scores.metrics["accuracy"] == 0.5


def test_an_episode_is_scored_by_the_policys_last_message(package):
    said = {"role": "assistant", "content": "<answer>5</answer>"}
    answered = {"role": "tool", "content": "<answer>6</answer>"}
    assert final_answer([{"role": "assistant", "content": "<answer>4</answer>"}, answered, said, answered]) == "5"
    assert final_answer([answered]) is None and final_answer("no tags") is None


def test_partial_credit_is_the_verifiers_and_no_accuracy(package):
    _, (row, *_), _ = load(SUMS)
    scores = score([(row, f"<answer>{row.columns['answer']} apples</answer>")])
    assert 0 < scores.total[0] < 1 and scores.metrics["accuracy"] == 0


def test_rows_of_other_data_have_no_score(package):
    from dataclasses import replace

    _, (row, *_), _ = load(SUMS)
    scores = score([(row, "<answer>x</answer>"), (replace(row, columns={}), "<answer>x</answer>")], "reasoning_gym")
    assert scores.total == [0.0, None] and scores.metrics["accuracy"] == 0


def test_data_without_entries_is_one_sentence():
    with pytest.raises(ConfigError, match="needs the column 'reasoning_gym'"):
        load_rewards("reasoning_gym").score([Completion(Prompt("q?", (1,), 0, {}), (5,), (-1.0,), "a", "stop")])


def test_an_answer_that_a_verifier_cannot_read_scores_zero(package):
    _, (row, *_), _ = load("reasoning_gym:prime_factorization?size=3")
    dataset = package.create_dataset("prime_factorization", size=3, seed=1)
    with pytest.raises(ValueError, match="invalid literal"):
        dataset.score_answer("abc", dataset[0])
    assert score([(row, "<answer>abc</answer>")]).total == [0.0]


def test_an_entry_survives_the_types_of_a_file(package):
    _, (row, *_), _ = load("reasoning_gym:number_sorting?size=3")
    entry = json.loads(json.dumps(dict(row.columns)))["reasoning_gym"]
    assert score_answer(entry, row.columns["answer"]) == 1.0 and score_answer(entry, None) == 0.0
    with pytest.raises(ConfigError, match="isn't the name of an entry"):
        score_answer("number_sorting", "1")
    with pytest.raises(ConfigError, match="another question in this process"):
        score_answer(entry.replace("size=3", "size=3&min_value=-7"), "1")


def test_a_task_that_depends_on_pythons_hashes_needs_a_fixed_seed(package, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ConfigError, match="Set PYTHONHASHSEED=0"):
        load("reasoning_gym:ransom_note?size=4")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert load("reasoning_gym:ransom_note?size=4")[1]


@pytest.mark.full
def test_the_right_answer_of_every_task_has_the_score_one(package, monkeypatch):
    from reasoning_gym.factory import DATASETS

    monkeypatch.setenv("PYTHONHASHSEED", "0")
    unknown = set()
    for task in sorted(set(DATASETS) - {"composite", "knight_swap"}):  # one needs other tasks, one takes seconds
        dataset = dataset_of(f"{task}?seed=5&size=2", task)
        for index, entry in enumerate(dataset[i] for i in range(2)):
            if entry["answer"] is None:
                unknown.add(task)
            else:
                name = f"{task}?seed=5&size=2#{index}-{zlib.crc32(entry['question'].encode()):08x}"
                assert score_answer(name, entry["answer"]) == 1.0, task
    assert unknown <= {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
