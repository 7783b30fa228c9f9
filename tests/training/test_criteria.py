"""Reward training with several criteria: the loss, the outputs and their use, the card, and resuming."""

from __future__ import annotations

import json
import math
import random

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from reinforcepp.commands.cli import main
from reinforcepp.config import CompareConfig, RewardModelConfig, TrainConfig
from reinforcepp.config.shared import JUDGED_DATA
from reinforcepp.errors import ConfigError, DataError, ModelError
from reinforcepp.models.loading import load_tokenizer
from reinforcepp.models.reward_models import new_reward_model
from reinforcepp.rewards.card import read_card
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.rewards.trained import TrainedReward, check_reward_folder, load_reward_model
from reinforcepp.training.reward_trainer import train_reward_model

NAMES = ("polite", "short")
GRADES = [("chosen", 2, 5), ("rejected", 3, 1), ("tie", 4, 4), ("", 1, 2), ("chosen", "", 3), ("chosen", 7, 1)]
"""Judgments of two criteria: a word, and two ratings of which the lower one is better."""


def write(path, grades, answers=("Please try step {}.", "Shut up step {}.")):
    rows = [
        {"prompt": f"Question {i}?", "chosen": answers[0].format(i), "rejected": answers[1].format(i)}
        | {"polite": polite, "chosen_length": one, "rejected_length": other}
        for i, (polite, one, other) in enumerate(grades)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def train(base, data, folder, **settings):
    usual = {"criteria": ("polite", "short=-length"), "batch_size": 6, "num_train_epochs": 1, "heldout_fraction": 0.0}
    return train_reward_model(
        RewardModelConfig(model=str(base), data=str(data), output_dir=str(folder), **(usual | settings))
    ).card


def first_step(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("base"), n_positions=512)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A model of two criteria: the polite answer is preferred, and the shorter one, which is the polite one in half the pairs."""
    folder = tmp_path_factory.mktemp("criteria")
    dice, rows = random.Random(0), []
    for i in range(60):
        polite, rude = f"Please try step {i}.", f"Shut up step {i}."
        long = dice.random() < 0.5
        polite, rude = (
            (f"{polite} again again again again", rude) if long else (polite, f"{rude} again again again again")
        )
        rows.append(
            {
                "prompt": f"Question {i}?",
                "chosen": polite,
                "rejected": rude,
                "polite": "chosen",
                "short": -1 if long else 1,
            }
        )
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"criteria": NAMES, "learning_rate": 2e-3, "num_train_epochs": 6, "heldout_fraction": 0.25}
    return folder / "rm", train(base, folder / "pairs.jsonl", folder / "rm", **settings)


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("micro_batch_size", [6, 2])
def test_the_loss_is_that_of_every_judgment_over_pairs_and_criteria(base, tmp_path, margins, micro_batch_size):
    data = write(tmp_path / "pairs.jsonl", GRADES)
    settings = {"center_rewards_coefficient": 0.5, "criteria_margins": margins, "micro_batch_size": micro_batch_size}
    train(base, data, tmp_path / "rm", **settings)
    untrained = TrainedReward(new_reward_model(str(base), 42, NAMES).eval(), load_tokenizer(str(base)))
    untrained.output_weights = (1.0, 1.0)
    total = centering = 0.0
    for i, (polite, one, other) in enumerate(GRADES):
        rows = [
            untrained.encode(f"Question {i}?", text.format(i)) for text in ("Please try step {}.", "Shut up step {}.")
        ]
        chosen, rejected = untrained.score_outputs(rows).tolist()
        centering += sum((a + b) ** 2 for a, b in zip(chosen, rejected, strict=True))
        difference = chosen[0] - rejected[0]
        if polite:
            side = {"chosen": 1, "rejected": -1, "tie": 0}[polite]
            orders = [side] if side else [1, -1]
            total += sum(math.log1p(math.exp(-side * difference)) for side in orders) / len(orders)
        if one != "":
            difference, gap = chosen[1] - rejected[1], other - one
            orders = [math.copysign(1, gap)] if gap else [1, -1]
            margin = abs(gap) * margins
            total += sum(math.log1p(math.exp(margin - side * difference)) for side in orders) / len(orders)
    assert first_step(tmp_path / "rm")["loss"] == pytest.approx((total + 0.5 * centering) / 12, abs=1e-4)


def test_every_output_learns_its_criterion(trained):
    folder, card = trained
    assert [each.name for each in card.criteria] == list(NAMES) and card.heldout_pairs == 15
    for each in card.criteria:
        assert each.figures["accuracy"] >= 0.85 and each.train_accuracy >= 0.9
        assert (each.train_pairs, each.heldout_pairs, each.train_ties, each.heldout_ties) == (45, 15, 0, 0)
    assert card.criteria[0].figures["longer_wins"] != card.criteria[1].figures["longer_wins"] == 0
    read = read_card(folder)
    assert (read.criteria, read.correlations, read.figures) == (card.criteria, card.correlations, {})
    assert {"accuracy", "accuracy/polite", "accuracy/short"} <= first_step(folder).keys()


def test_the_outputs_are_those_of_plain_transformers(trained):
    folder, _ = trained
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert plain.config.id2label == dict(enumerate(NAMES)) and plain.config.label2id == {"polite": 0, "short": 1}
    rewards = {name: load_reward_model(f"{folder}?output={name}") for name in (*NAMES, "0")}
    ids = rewards["polite"].encode("Question 1?", "Please try step 1.")
    with torch.no_grad():
        logits = plain(torch.tensor([ids])).logits[0].tolist()
    texts = ["Question 1?"], ["Please try step 1."]
    assert [rewards[name](*texts)[0] for name in NAMES] == pytest.approx(logits, abs=1e-5)
    assert rewards["0"](*texts) == rewards["polite"](*texts)
    weighted = load_reward_model(f"{folder}?outputs=short:0.5,polite:2")
    assert weighted(*texts)[0] == pytest.approx(2 * logits[0] + 0.5 * logits[1], abs=1e-5)
    assert weighted.by_output == {
        name: pytest.approx([logit], abs=1e-5) for name, logit in zip(NAMES, logits, strict=True)
    }


def test_several_outputs_need_a_choice(trained):
    folder, _ = trained
    for check in (check_reward_folder, load_reward_model):
        with pytest.raises(
            ConfigError, match=r"2 outputs \(0: polite, 1: short\). Choose one, as in .*\?output=polite"
        ):
            check(str(folder))
    with pytest.raises(ConfigError, match=r"output 'polit' not found.*Did you mean 'polite'"):
        check_reward_folder(f"{folder}?output=polit")


def test_the_card_in_use_is_that_of_the_chosen_output(trained):
    """Standardized scores have mean 0 and deviation 1 on the training pairs, for any weights."""
    folder, card = trained
    short = load_reward_model(f"{folder}?output=short").card
    assert short.figures == card.criteria[1].figures and short.train_accuracy == card.criteria[1].train_accuracy
    rows = [json.loads(line) for line in (folder.parent / "pairs.jsonl").read_text().splitlines()]
    heldout = {row["prompt"] for row in _heldout(folder)}
    rows = [row for row in rows if row["prompt"] not in heldout]
    prompts = [row["prompt"] for row in rows] * 2
    answers = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    for options in ("output=polite", "outputs=1,-0.5"):
        reward = load_reward_model(f"{folder}?{options}")
        reward.normalize()
        scores = torch.tensor(reward(prompts, answers))
        assert scores.mean().item() == pytest.approx(0, abs=1e-3)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def _heldout(folder):
    from pyarrow import parquet

    return parquet.read_table(folder / "heldout.parquet").to_pylist()


def test_held_out_pairs_have_a_row_per_criterion(trained):
    folder, _ = trained
    rows = _heldout(folder)
    assert [sum(row["criterion"] == name for row in rows) for name in NAMES] == [15, 15]
    assert all(row["chosen"].startswith("Please") for row in rows if row["criterion"] == "polite")
    assert all(len(row["chosen"]) < len(row["rejected"]) for row in rows if row["criterion"] == "short")
    reward = load_reward_model(f"{folder}?output=short")
    row = next(row for row in rows if row["criterion"] == "short")
    scores = reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
    assert scores == pytest.approx([row["chosen_score"], row["rejected_score"]], abs=1e-4)


def test_a_changed_output_is_noticed(trained, tmp_path):
    from shutil import copytree

    from safetensors.torch import save_file

    folder = copytree(trained[0], tmp_path / "rm")
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"][1] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="scores its probe texts differently"):
        load_reward_model(f"{folder}?output=polite")


def test_a_new_head_is_small_and_a_trained_one_is_kept(base, trained):
    weight = new_reward_model(str(base), 0, NAMES).score.weight
    assert weight.shape == (2, 64) and weight.std().item() == pytest.approx(1 / 65, rel=0.25)
    again = new_reward_model(str(trained[0]), 3, NAMES)
    assert again.score.weight.equal(load_file(trained[0] / "model.safetensors")["score.weight"])
    for outputs in ((), ("short", "polite"), ("polite", "short", "safe")):
        with pytest.raises(ModelError, match="its score head has the outputs polite, short, but the training needs"):
            new_reward_model(str(trained[0]), 3, outputs)


def test_a_training_logs_each_output(trained, tmp_path, base):
    data = tmp_path / "prompts.csv"
    data.write_text("prompt\n" + "\n".join(f"Question {i}?" for i in range(8)))
    arguments = ["--model", str(base), "--data", str(data), "--num_train_epochs", "1", "--rollout_batch_size", "4"]
    arguments += ["--rewards", f"{trained[0]}?outputs=polite:1,short:0.5", "--max_new_tokens", "4"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--rollout", "transformers", "--heldout_fraction", "0"]
    assert main(["train", *arguments]) == 0
    step = first_step(tmp_path / "run")
    parts = [step[f"rewards/{trained[0].name}/{name}/mean"] for name in NAMES]
    assert step[f"rewards/{trained[0].name}/mean"] == pytest.approx(parts[0] + 0.5 * parts[1], abs=1e-4)
    total = load_rewards(f"{trained[0]}?outputs=polite:1,short:0.5")
    assert total.score([]).by_function.keys() == {trained[0].name, *(f"{trained[0].name}/{name}" for name in NAMES)}


def test_a_criterion_without_judgments_raises(base, tmp_path):
    data = write(tmp_path / "pairs.jsonl", [("", 1, 2)] * 4)
    with pytest.raises(DataError, match="none of the 4 training pairs has a judgment by the criterion polite"):
        train(base, data, tmp_path / "rm")


def test_margins_need_criteria():
    with pytest.raises(ConfigError, match="criteria_margins applies only to criteria"):
        RewardModelConfig(data=JUDGED_DATA, criteria_margins=True)


def test_streaming_and_resuming_train_the_same_model(base, tmp_path, capfd):
    data = write(tmp_path / "pairs.jsonl", GRADES * 4)
    settings = {"num_train_epochs": 2, "heldout_fraction": 0.25, "learning_rate": 1e-3}
    card = train(base, data, tmp_path / "whole", **settings)
    assert "Criterion short: " in capfd.readouterr().err
    cards = [train(base, data, tmp_path / "streamed", streaming=True, **settings)]
    train(base, data, tmp_path / "stopped", save_every=3, keep_last=9, **settings)
    checkpoint = str(tmp_path / "stopped/checkpoints/step-000003")
    cards.append(train(base, data, tmp_path / "resumed", resume=checkpoint, **settings))
    for other in cards:
        assert other.fingerprint == pytest.approx(card.fingerprint, abs=1e-6) and len(card.fingerprint) == 16
        assert [each.figures for each in other.criteria] == [each.figures for each in card.criteria]
    with pytest.raises(ConfigError, match="criteria"):
        train(base, data, tmp_path / "other", resume=checkpoint, **settings, criteria=("polite", "brief=-length"))


def test_adapters_keep_all_outputs(base, tmp_path):
    data = write(tmp_path / "pairs.jsonl", GRADES)
    card = train(base, data, tmp_path / "rm", use_peft=True)
    loaded = load_reward_model(f"{tmp_path / 'rm'}?output=short")
    assert loaded.fingerprint() == pytest.approx(card.fingerprint, abs=1e-4)


def test_an_output_can_be_the_judge(trained):
    """The options of a judge aren't those of a data source; its folder must not be below the output."""
    folder, _ = trained
    judge = f"{folder}?output=short"
    assert TrainConfig(data="my.csv", judge=judge).judge_name == judge
    assert CompareConfig("a", "b", data="my.csv", judge=judge).judge_name == judge
    for config in (TrainConfig, CompareConfig):
        with pytest.raises(ConfigError, match="holds the judge"):
            config(data="my.csv", judge=judge, output_dir=str(folder.parent))
