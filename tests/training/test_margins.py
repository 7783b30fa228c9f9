"""Reward training with the columns ``margin`` and ``tie``: the loss, the card, and rows that can't be read."""

from __future__ import annotations

import json
import math

import pytest
import tiny

from reinforcepp.config import RewardModelConfig
from reinforcepp.data import load_preferences, read_preferences
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
