"""Reward models: where the score is read, what is measured, what is refused at loading."""

import json
import math
from dataclasses import asdict

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from reinforcepp.config import RewardModelConfig
from reinforcepp.errors import ModelError
from reinforcepp.models import load_tokenizer, new_reward_model
from reinforcepp.reward_trainer import train_reward_model
from reinforcepp.rewards import TrainedReward, check_reward_folder, load_reward_model
from reinforcepp.rewards.measure import calibration_error, correlation, measure
from reinforcepp.tokens import encode_answer
from reinforcepp.types import Preference

HEADER = "prompt,chosen,rejected\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("base"), n_positions=512)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Polite answers are preferred; nothing else tells them apart."""
    path = tmp_path_factory.mktemp("data") / "pairs.csv"
    lines = [f"Question {i} about host {i * 7}?,Please try step {i}.,Shut up step {i}." for i in range(40)]
    path.write_text(HEADER + "\n".join(lines))
    return path


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm") / "model"
    config = RewardModelConfig(
        model=str(base),
        data=str(data),
        output_dir=str(folder),
        learning_rate=2e-3,
        num_train_epochs=4,
        heldout_fraction=0.25,
    )
    return folder, train_reward_model(config)


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained folder, to be damaged."""
    target = tmp_path / "rm"
    target.mkdir()
    for path in trained[0].iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_it_learns_on_held_out_prompts(trained):
    card = trained[1]
    assert card.heldout_pairs == 10 and card.train_pairs == 30
    assert card.figures["accuracy"] >= 0.9 and card.figures["mean_margin"] > 0


def test_the_card_says_where_it_comes_from(trained, base, data):
    card = json.loads((trained[0] / "reward_model.json").read_text())
    assert card["data"] == str(data) and card["base_model"] == str(base) and len(card["data_sha256"]) == 64
    assert len(card["fingerprint"]) == 8 and len(set(card["fingerprint"])) == 8
    assert card["score_std"] > 0 and math.isfinite(card["score_mean"])


def test_a_loaded_model_scores_as_the_saved_one(trained):
    reward = load_reward_model(str(trained[0]))
    polite, rude = reward(["Question 3?", "Question 3?"], ["Please try step 3.", "Shut up step 3."])
    assert polite > rude
    assert reward.fingerprint() == pytest.approx(trained[1].fingerprint, abs=1e-4)


def test_the_score_is_read_at_the_eos_also_when_pad_equals_eos(base):
    """The EOS row must differ from the row without it, alone and beside a longer row."""
    tokenizer = load_tokenizer(str(base))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = new_reward_model(str(base), seed=0).eval()
    reward = TrainedReward(model, tokenizer)
    row = encode_answer(tokenizer, "Why?", "Because.")
    longer = encode_answer(tokenizer, "Why?", "Because of this and that and more.")
    alone, without = reward.score_rows([row])[0], reward.score_rows([row[:-1]])[0]
    assert abs(alone - without) > 1e-3
    assert reward.score_rows([row, longer])[0] == pytest.approx(alone, abs=1e-5)
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([row])).last_hidden_state
        assert model.score(hidden)[0, -1].item() == pytest.approx(alone, abs=1e-5)


def test_a_truncated_answer_gets_no_forged_eos(trained):
    reward = load_reward_model(str(trained[0]))
    ended, cut = reward(["Why?", "Why?"], ["Because", "Because"], finish_reason=["stop", "length"])
    rows = [encode_answer(reward.tokenizer, "Why?", "Because", ended=e) for e in (True, False)]
    assert [ended, cut] == pytest.approx(reward.score_rows(rows), abs=1e-6) and ended != cut


def test_training_and_scoring_frame_alike(base, data, tmp_path, monkeypatch):
    """The rows TRL is given are those that scoring makes of the same pair."""
    from reinforcepp import resumable

    seen = []

    class Spy(resumable.ResumableRewardTrainer):
        def __init__(self, **kwargs):
            seen.extend(kwargs["train_dataset"]["chosen_ids"])
            super().__init__(**kwargs)

    monkeypatch.setattr(resumable, "ResumableRewardTrainer", Spy)
    output = tmp_path / "rm"
    train_reward_model(
        RewardModelConfig(model=str(base), data=str(data), output_dir=str(output), num_train_epochs=1, batch_size=40)
    )
    reward = load_reward_model(str(output))
    rows = {
        tuple(encode_answer(reward.tokenizer, f"Question {i} about host {i * 7}?", f"Please try step {i}."))
        for i in range(40)
    }
    assert len(seen) == 36 and {tuple(row) for row in seen} <= rows


# --- refusals -------------------------------------------------------------------------------------------------------


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_missing_head_is_refused(copy):
    edit_weights(copy, lambda w: w.pop("score.weight"))
    with pytest.raises(ModelError, match="no scoring head"):
        load_reward_model(str(copy))


def test_a_head_of_another_shape_is_refused(copy):
    edit_weights(copy, lambda w: w.update({"score.weight": torch.zeros(2, 64)}))
    with pytest.raises(ModelError, match=r"shape \[2, 64\]"):
        load_reward_model(str(copy))


def test_a_fresh_head_is_refused(copy):
    edit_weights(copy, lambda w: w.update({"score.weight": torch.randn(1, 64) * 0.02}))
    with pytest.raises(ModelError, match="probe texts differently"):
        load_reward_model(str(copy))


def test_another_template_is_refused(copy):
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(ModelError, match="probe texts differently"):
        load_reward_model(str(copy))


def test_a_folder_without_card_is_refused(base):
    with pytest.raises(ModelError, match=r"no reward_model.json.*reinforcepp reward"):
        check_reward_folder(str(base))


def test_a_damaged_card_is_refused(copy):
    (copy / "reward_model.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        load_reward_model(str(copy))


def test_a_missing_folder_is_refused():
    with pytest.raises(ModelError, match=r"no reward model folder nowhere"):
        check_reward_folder("nowhere")


# --- figures --------------------------------------------------------------------------------------------------------


class ByLength(TrainedReward):
    """Scores a row by its length, so every figure is known."""

    def score_rows(self, rows):
        return [float(len(row)) for row in rows]


def test_figures_of_a_reward_that_only_sees_length(base):
    reward = ByLength(None, load_tokenizer(str(base)))
    pairs = [Preference("q", "a b c d", "a"), Preference("q", "a", "a b c d"), Preference("q", "a b", "a b")]
    figures = asdict(measure(reward, pairs))
    assert figures["accuracy"] == figures["longer_wins"] and figures["length_correlation"] == pytest.approx(1)
    assert figures["ties"] == 1 and figures["accuracy"] == pytest.approx(0.5)
    assert figures["mean_margin"] == pytest.approx(0)


def test_calibration_error():
    assert calibration_error([50.0, 50.0]) == pytest.approx(0, abs=1e-6)
    assert calibration_error([-50.0, 50.0]) == pytest.approx(0.5, abs=1e-6)
    confidence = 1 / (1 + math.exp(-1))
    assert calibration_error([1.0, 1.0, 1.0, -1.0]) == pytest.approx(abs(confidence - 0.75))


def test_correlation():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 1, 1], [3, 2, 1]) == 0
