"""Reward models: where the score is read, metrics, and errors when loading."""

import json
import math

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM

from reinforcepp.config import RewardModelConfig
from reinforcepp.errors import ModelError, TrainingDiverged
from reinforcepp.models import packed_attention
from reinforcepp.models.loading import load_tokenizer
from reinforcepp.models.lora import base_model
from reinforcepp.models.micro_batches import MicroBatchLimit
from reinforcepp.models.reward_models import (
    ScoreReading,
    as_classifier,
    new_reward_model,
    prepare_scoring,
    scores_packed_rows,
)
from reinforcepp.models.tokenization import encode_example
from reinforcepp.rewards.trained import (
    TrainedReward,
    check_reward_folder,
    load_reward_model,
    score_answers,
    score_pairs,
)
from reinforcepp.training.reward_trainer import train_reward_model
from reinforcepp.types import Preference

HEADER = "prompt,chosen,rejected\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("base"), n_positions=512)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Preference pairs that differ only in politeness."""
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
    return folder, train_reward_model(config).card


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained folder, for tests that damage it."""
    target = tmp_path / "rm"
    target.mkdir()
    for path in trained[0].iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_training_generalizes_to_heldout_prompts(trained):
    card = trained[1]
    assert card.heldout_pairs == 10 and card.train_pairs == 30
    assert card.figures["accuracy"] >= 0.9 and card.figures["mean_margin"] > 0


def test_step_loss_is_the_centered_bradley_terry_loss(base, data, tmp_path):
    """Mean of log(1 + exp(rejected - chosen)) + center_rewards_coefficient * (chosen + rejected)^2, over all pairs."""
    settings = {"batch_size": 40, "num_train_epochs": 1, "heldout_fraction": 0.0, "center_rewards_coefficient": 0.5}
    config = RewardModelConfig(model=str(base), data=str(data), output_dir=str(tmp_path / "rm"), **settings)
    train_reward_model(config)
    untrained = TrainedReward(new_reward_model(str(base), config.seed).eval(), load_tokenizer(str(base)))
    prompts, chosen, rejected = zip(*(row.split(",") for row in data.read_text().splitlines()[1:]), strict=True)
    pairs = list(zip(untrained(prompts, chosen), untrained(prompts, rejected), strict=True))
    losses = [math.log1p(math.exp(worse - better)) for better, worse in pairs]
    centering = [(better + worse) ** 2 for better, worse in pairs]
    assert sum(centering) / 40 > 1e-3
    first = json.loads((tmp_path / "rm" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx((sum(losses) + 0.5 * sum(centering)) / 40, abs=1e-4)


def test_a_new_score_head_is_small(tmp_path):
    base = tiny.save(tmp_path / "wide", n_embd=512, n_head=2, n_layer=1)
    weight = new_reward_model(str(base), seed=0).score.weight
    assert weight.std().item() == pytest.approx(1 / 513, rel=0.1) and abs(weight.mean().item()) < 1e-3
    assert weight.equal(new_reward_model(str(base), seed=0).score.weight)
    assert not weight.equal(new_reward_model(str(base), seed=1).score.weight)


def test_the_head_of_a_model_with_a_projection_loads_again(data, tmp_path):
    """OPT-350M projects its hidden states to the width of its embeddings, where its score head reads them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 1, "vocab_size": 320}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    OPTForCausalLM(OPTConfig(**sizes, **ends, num_attention_heads=2, do_layer_norm_before=False)).save_pretrained(
        tmp_path
    )
    tiny.tokenizer().save_pretrained(tmp_path)
    folder = tmp_path / "rm"
    config = RewardModelConfig(model=str(tmp_path), data=str(data), output_dir=str(folder), num_train_epochs=1)
    card = train_reward_model(config).card
    assert load_reward_model(str(folder)).fingerprint() == pytest.approx(card.fingerprint, abs=1e-4)


def test_a_trained_score_head_is_kept(trained):
    model = new_reward_model(str(trained[0]), seed=3)
    assert model.score.weight.equal(load_file(trained[0] / "model.safetensors")["score.weight"])


def test_the_first_step_trains(base, data, tmp_path):
    """10 steps: 1 of warmup at half the peak, then a linear decay whose last step is above 0."""
    settings = {"batch_size": 4, "num_train_epochs": 1, "heldout_fraction": 0.0, "learning_rate": 1e-3}
    train_reward_model(RewardModelConfig(model=str(base), data=str(data), output_dir=str(tmp_path / "rm"), **settings))
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "rm" / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([5e-4, *(1e-3 * left / 9 for left in range(9, 0, -1))], rel=1e-4)


def test_the_card_holds_origin_and_metrics(trained, base, data):
    card = json.loads((trained[0] / "reward_model.json").read_text())
    assert card["data"] == str(data) and card["base_model"] == str(base) and len(card["data_sha256"]) == 64
    assert len(card["fingerprint"]) == 8 and len(set(card["fingerprint"])) == 8
    assert card["score_std"] > 0 and math.isfinite(card["score_mean"])
    assert 0.5 < card["train_accuracy"] <= 1


def test_a_card_without_train_accuracy_loads(copy):
    card = json.loads((copy / "reward_model.json").read_text())
    del card["train_accuracy"]
    (copy / "reward_model.json").write_text(json.dumps(card))
    assert check_reward_folder(str(copy)).train_accuracy is None
    assert load_reward_model(str(copy)).card is not None


def test_a_loaded_model_scores_like_the_saved_one(trained):
    reward = load_reward_model(str(trained[0]))
    polite, rude = reward(["Question 3?", "Question 3?"], ["Please try step 3.", "Shut up step 3."])
    assert polite > rude
    assert reward.fingerprint() == pytest.approx(trained[1].fingerprint, abs=1e-4)


def test_the_score_is_read_at_the_eos_even_if_pad_equals_eos(base):
    """The EOS row must differ from the row without it, alone and batched with a longer row."""
    tokenizer = load_tokenizer(str(base))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = new_reward_model(str(base), seed=0).eval()
    reward = TrainedReward(model, tokenizer)
    row = encode_example(tokenizer, "Why?", "Because.")
    longer = encode_example(tokenizer, "Why?", "Because of this and that and more.")
    alone, without = reward.score_rows([row])[0], reward.score_rows([row[:-1]])[0]
    assert abs(alone - without) > 1e-3
    assert reward.score_rows([row, longer])[0] == pytest.approx(alone, abs=1e-5)
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([row])).last_hidden_state
        assert model.score(hidden)[0, -1].item() == pytest.approx(alone, abs=1e-5)


SCORED = [[5, 6, 7], [9], [4, 8, 15, 16, 23, 42, 3], [3, 1, 4], [1, 5, 9, 3], [3, 3], list(range(20, 40))]


def classifier(family: str, skipped_token: int | None, adapter: bool = False) -> TrainedReward:
    model = as_classifier(tiny.model(family), seed=0, outputs=["a", "b"]).eval()
    model = prepare_scoring(model, ScoreReading(skipped_token=skipped_token))
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    reward = TrainedReward(model, tiny.chat_tokenizer())
    reward.output_weights = (1.0, 1.0)
    return reward


@pytest.mark.parametrize("skipped_token", [None, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gemma2", "adapter"])
def test_texts_score_in_packed_rows_as_alone(family, skipped_token):
    reward = classifier("llama" if family == "adapter" else family, skipped_token, family == "adapter")
    plain = base_model(reward.model)
    alone_NC = torch.cat([plain(torch.tensor([row]), torch.ones(1, len(row)).long()).logits for row in SCORED])
    assert alone_NC.std(0).min() > 0.05
    shapes = []
    plain.get_input_embeddings().register_forward_hook(lambda _, ids, __: shapes.append(tuple(ids[0].shape)))
    reward.limit = MicroBatchLimit(16, packed=True)
    torch.testing.assert_close(reward.score_outputs(SCORED), alone_NC, atol=1e-5, rtol=1e-5)
    assert shapes[-3:] == [(1, 13), (1, 7), (1, 20)]  # packed by tokens, without padding


def test_texts_that_cannot_be_packed_are_padded_by_tokens():
    reward = classifier("llama", None)
    expected_NC = reward.score_outputs(SCORED)
    reward.model.base_model.set_attn_implementation("eager")
    packed_attention._packable.clear()
    shapes = []
    reward.model.get_input_embeddings().register_forward_hook(lambda _, ids, __: shapes.append(tuple(ids[0].shape)))
    reward.limit = MicroBatchLimit(9, packed=True)
    torch.testing.assert_close(reward.score_outputs(SCORED), expected_NC, atol=1e-5, rtol=1e-5)
    assert shapes[-4:] == [(3, 3), (2, 4), (1, 7), (1, 20)]
    assert not classifier("llama", None)._batch_limit([[], [5]]).packed  # an empty text has no last token


def test_a_model_that_reads_both_directions_is_not_packed():
    reward = classifier("llama", None)
    assert scores_packed_rows(reward.model, 8)
    packed_attention._packable.clear()
    for layer in reward.model.base_model.layers:
        layer.self_attn.is_causal = False
    assert not scores_packed_rows(reward.model, 8)


def test_a_truncated_answer_gets_no_eos(trained):
    reward = load_reward_model(str(trained[0]))
    finished, truncated = reward(["Why?", "Why?"], ["Because", "Because"], finish_reason=["stop", "length"])
    rows = [encode_example(reward.tokenizer, "Why?", "Because", finished=e) for e in (True, False)]
    assert [finished, truncated] == pytest.approx(reward.score_rows(rows), abs=1e-6) and finished != truncated


def test_training_and_scoring_share_the_prompt_format(base, data, tmp_path, monkeypatch):
    """TRL's rows equal the rows that scoring builds from the same pairs."""
    from reinforcepp.training import reward_loop

    seen = []

    class Spy(reward_loop.ResumableRewardTrainer):
        def __init__(self, **kwargs):
            seen.extend(kwargs["train_dataset"]["chosen_ids"])
            super().__init__(**kwargs)

    monkeypatch.setattr(reward_loop, "ResumableRewardTrainer", Spy)
    output = tmp_path / "rm"
    train_reward_model(
        RewardModelConfig(model=str(base), data=str(data), output_dir=str(output), num_train_epochs=1, batch_size=40)
    )
    reward = load_reward_model(str(output))
    rows = {
        tuple(encode_example(reward.tokenizer, f"Question {i} about host {i * 7}?", f"Please try step {i}."))
        for i in range(40)
    }
    assert len(seen) == 36 and {tuple(row) for row in seen} <= rows


# --- errors -------------------------------------------------------------------------------------------------------


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_missing_score_head_raises(copy):
    edit_weights(copy, lambda w: w.pop("score.weight"))
    with pytest.raises(ModelError, match="no score head"):
        load_reward_model(str(copy))


def test_a_score_head_of_another_shape_raises(copy):
    edit_weights(copy, lambda w: w.update({"score.weight": torch.zeros(2, 64)}))
    with pytest.raises(ModelError, match=r"shape \[2, 64\]"):
        load_reward_model(str(copy))


def test_a_newly_initialized_score_head_raises(copy):
    edit_weights(copy, lambda w: w.update({"score.weight": torch.randn(1, 64) * 0.02}))
    with pytest.raises(ModelError, match="probe texts differently"):
        load_reward_model(str(copy))


def test_another_chat_template_raises(copy):
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(ModelError, match="probe texts differently"):
        load_reward_model(str(copy))


def test_a_folder_without_a_card_raises(base):
    with pytest.raises(ModelError, match=r"no score head .score.weight.*reinforcepp reward"):
        check_reward_folder(str(base))


def test_a_damaged_card_raises(copy):
    (copy / "reward_model.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        load_reward_model(str(copy))


def test_a_missing_folder_raises():
    with pytest.raises(ModelError, match="nowhere: reward model folder not found"):
        check_reward_folder("nowhere")


# --- scoring pairs ----------------------------------------------------------------------------------------------------


class ByLength(TrainedReward):
    """Scores a row by its length, so every score is known."""

    def score_outputs(self, rows, report=None):
        return torch.tensor([[float(len(row))] for row in rows])


def test_scored_pairs_keep_order_texts_and_rows(base):
    tokenizer = load_tokenizer(str(base))
    pairs = [Preference("q", "a b c d", "a", 7), Preference("a longer q", "a", "a b", 3)]
    scored = score_pairs(ByLength(torch.nn.Module(), tokenizer), pairs)
    assert [(p.prompt, p.chosen, p.rejected, p.row) for p in scored] == [
        ("q", "a b c d", "a", 7),
        ("a longer q", "a", "a b", 3),
    ]
    for pair, one in zip(pairs, scored, strict=True):
        assert one.chosen_score == len(encode_example(tokenizer, pair.prompt, pair.chosen))
        assert one.rejected_score == len(encode_example(tokenizer, pair.prompt, pair.rejected))
    assert score_pairs(ByLength(torch.nn.Module(), tokenizer), []) == []


def test_progress_counts_each_scored_response():
    reward = classifier("llama", None)
    reward.limit = MicroBatchLimit(tokens=None, rows=2)
    scored = []
    pairs = [Preference("q", "a b c d", "a", 1), Preference("r", "b", "a b", 2), Preference("s", "c", "d e", 3)]
    scores = score_answers(reward, pairs, report=scored.append)
    assert scored == [2, 2, 2] and scores.chosen_NC.shape == scores.rejected_NC.shape == (3, 2)


def test_lengths_exclude_the_prompt(base):
    tokenizer = load_tokenizer(str(base))
    short, long = score_pairs(
        ByLength(torch.nn.Module(), tokenizer),
        [Preference("q", "a b", "a"), Preference("a much longer question", "a b", "a")],
    )
    ended = len(tokenizer(" a b", add_special_tokens=False)["input_ids"]) + 1
    assert (short.chosen_length, short.rejected_length) == (long.chosen_length, long.rejected_length)
    assert short.chosen_length == ended > short.rejected_length


@pytest.mark.parametrize("broken", [{"chosen"}, {"rejected"}, {"chosen", "rejected"}])
def test_a_score_that_is_not_finite_raises(base, broken):
    class Broken(TrainedReward):
        def score_outputs(self, rows, report=None):
            return torch.tensor([[math.inf if kind in broken else 0.0] for kind in ("chosen", "rejected")])

    with pytest.raises(TrainingDiverged, match=r"row 9 isn't finite\. Lower learning_rate"):
        score_pairs(Broken(torch.nn.Module(), load_tokenizer(str(base))), [Preference("q", "a", "b", 9)])
