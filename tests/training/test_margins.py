"""Reward training with the columns ``margin``, ``tie`` and ``weight``: the loss, the card, and rows that can't be read."""

from __future__ import annotations

import json
import math

import pytest
import tiny

from reinforcepp.config import RewardModelConfig
from reinforcepp.data import load_preferences, read_preferences
from reinforcepp.data.loading import read_texts
from reinforcepp.errors import DataError
from reinforcepp.models.loading import load_tokenizer
from reinforcepp.models.reward_models import new_reward_model
from reinforcepp.rewards.trained import TrainedReward
from reinforcepp.training.reward_trainer import train_reward_model

GRADES = [("0.5", ""), ("", ""), ("2", "false"), ("", "true"), ("1.5", "1"), ("0", "no"), ("-0.25", ""), ("3", "False")]
PAIRS = [(f"Question {i}?", f"Please try step {i}.", f"Shut up step {i}.", *grade) for i, grade in enumerate(GRADES)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,margin,tie\n" + "\n".join(",".join(pair) for pair in PAIRS))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("base"))


def train(base, data, folder, **settings):
    usual = {"batch_size": 8, "num_train_epochs": 1, "heldout_fraction": 0.0, "center_rewards_coefficient": 0.0}
    return train_reward_model(
        RewardModelConfig(model=str(base), data=str(data), output_dir=str(folder), **(usual | settings))
    ).card


@pytest.mark.parametrize("streaming", [False, True])
def test_margins_and_ties_are_read(data, streaming):
    _, pairs, _ = load_preferences(data, heldout_fraction=0.0, seed=0, streaming=streaming)
    by_prompt = {pair.prompt: (pair.margin, pair.tie) for pair in pairs}
    expected = [(0.5, False), (0, False), (2, False), (0, True), (0, True), (0, False), (-0.25, False), (3, False)]
    assert [by_prompt[pair[0]] for pair in PAIRS] == expected


def test_the_loss_subtracts_the_margin_and_averages_both_orders_of_a_tie(base, data, tmp_path, capfd):
    """-log sigmoid(chosen - rejected - margin), as in TRL; of a tie, the mean over both orders without a margin."""
    card = train(base, data, tmp_path / "rm")
    untrained = TrainedReward(new_reward_model(str(base), 42).eval(), load_tokenizer(str(base)))
    prompts, chosen, rejected, *_ = zip(*PAIRS, strict=True)
    differences = [a - b for a, b in zip(untrained(prompts, chosen), untrained(prompts, rejected), strict=True)]
    margins = [0.5, 0, 2, None, None, 0, -0.25, 3]

    def loss(difference, margin):
        if margin is None:
            return (math.log1p(math.exp(-difference)) + math.log1p(math.exp(difference))) / 2
        return math.log1p(math.exp(margin - difference))

    expected = sum(map(loss, differences, margins)) / len(PAIRS)
    first = json.loads((tmp_path / "rm" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(expected, abs=1e-4)
    assert (card.train_margins, card.train_ties) == (4, 2)
    assert "4 of 8 training pairs have a margin, and 2 are ties." in capfd.readouterr().err


def test_ties_are_not_evaluated(base, data, tmp_path):
    card = train(base, data, tmp_path / "rm", heldout_fraction=0.5, batch_size=2)
    heldout = load_preferences(data, heldout_fraction=0.5, seed=42)[2]
    assert card.heldout_pairs == sum(not pair.tie for pair in heldout) > 0
    assert sum(pair.tie for pair in heldout) > 0


def test_an_odd_margin_is_skipped_and_reported(tmp_path):
    path = tmp_path / "pairs.csv"
    good = [(f"More {i}?", "Yes.", "No.", "", "") for i in range(4)]
    odd = [("large", ""), ("nan", ""), ("", "maybe")]
    rows = [*PAIRS, *good, *((f"Odd {i}?", "Yes.", "No.", *grade) for i, grade in enumerate(odd))]
    path.write_text("prompt,chosen,rejected,margin,tie\n" + "\n".join(",".join(pair) for pair in rows))
    data = read_preferences(path)
    assert len(data.rows) == len(PAIRS) + len(good)
    assert [str(skipped) for skipped in data.skipped] == [
        "row 14: with a margin that isn't a number",
        "row 15: with a margin that isn't a number",
        "row 16: with a tie that is neither true nor false",
    ]


# --- weights ----------------------------------------------------------------------------------------------------------

WEIGHTS = ["2", "", "0.5", "0", "1", "3", "0", "1e-1"]
NUMBERS = [2, 1, 0.5, 0, 1, 3, 0, 0.1]


def write(path, weights, column="weight"):
    rows = [f"{','.join(pair[:3])},{weight}" for pair, weight in zip(PAIRS, weights, strict=False)]
    path.write_text("\n".join([f"prompt,chosen,rejected,{column}", *rows]))
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_read(tmp_path, streaming):
    data, pairs, _ = load_preferences(
        write(tmp_path / "pairs.csv", WEIGHTS), heldout_fraction=0.0, seed=0, streaming=streaming
    )
    by_prompt = {pair.prompt: pair.loss_weight for pair in pairs}
    assert [by_prompt[pair[0]] for pair in PAIRS] == NUMBERS
    assert "unused" not in data.summary() and all(pair.weight == 1 for pair in pairs), "each row counts once"


def test_weights_multiply_the_loss_in_whichever_parts_it_is_computed(base, tmp_path, capfd):
    """By hand: sum of weight · (softplus(-difference) + 0.5 · (sum of scores)²), divided by the number of pairs."""
    data, steps = write(tmp_path / "pairs.csv", WEIGHTS), []
    for micro_batch_size in (8, 2):
        folder = tmp_path / f"rm-{micro_batch_size}"
        train(base, data, folder, center_rewards_coefficient=0.5, micro_batch_size=micro_batch_size)
        steps.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]))
    assert "The weights of the training pairs are 0 to 3, on average 0.95." in capfd.readouterr().err
    untrained = TrainedReward(new_reward_model(str(base), 42).eval(), load_tokenizer(str(base)))
    prompts, chosen, rejected, *_ = zip(*PAIRS, strict=True)
    expected = sum(
        weight * (math.log1p(math.exp(b - a)) + 0.5 * (a + b) ** 2)
        for weight, a, b in zip(NUMBERS, untrained(prompts, chosen), untrained(prompts, rejected), strict=True)
    )
    assert [step["loss"] for step in steps] == pytest.approx([expected / len(PAIRS)] * 2, abs=1e-4)
    assert steps[0]["grad_norm"] == pytest.approx(steps[1]["grad_norm"], rel=1e-4)


def test_an_odd_weight_is_skipped_and_reported(tmp_path):
    data = read_preferences(write(tmp_path / "pairs.csv", ["-1", "inf", *WEIGHTS[2:]]))
    assert [str(skipped) for skipped in data.skipped] == [
        "row 2: with a negative weight",
        "row 3: with a weight that isn't a number",
    ]
    with pytest.raises(DataError, match=r"pairs.csv:2: 'weight' holds '5 kg', expected a number\. 8 of 8 rows"):
        read_preferences(write(tmp_path / "pairs.csv", ["5 kg"] * 8))


def test_only_weights_of_0_are_an_error(base, tmp_path):
    with pytest.raises(DataError, match=r"pairs.csv: no pair has a weight above 0\. Raise"):
        train(base, write(tmp_path / "pairs.csv", ["0"] * 8), tmp_path / "rm")


def test_a_column_named_weight_can_be_something_else(tmp_path):
    pairs = read_preferences(write(tmp_path / "pairs.csv", ["5"] * 8, "Weight")).pairs
    assert {pair.loss_weight for pair in pairs} == {1}
    judged = write(tmp_path / "judged.csv", ["rejected", *["chosen"] * 7])
    criteria = RewardModelConfig(criteria=("weight",)).parsed_criteria
    _, pairs, _ = load_preferences(judged, heldout_fraction=0.0, seed=0, criteria=criteria)
    assert {(pair.judgments[0].side, pair.loss_weight) for pair in pairs} == {(1, 1), (-1, 1)}
    texts = write(tmp_path / "texts.csv", ["5 kg"] * 8)
    texts.write_text(texts.read_text().replace("chosen,rejected", "completion,source"))
    assert len(read_texts(texts).rows) == 8
