"""Encoders as reward models: BERT, RoBERTa, DeBERTa, ModernBERT and relatives, with their own pooling and head."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from reinforcepp.commands.cli import main
from reinforcepp.config import RewardModelConfig
from reinforcepp.errors import ModelError
from reinforcepp.models.encoders import is_encoder
from reinforcepp.models.loading import context_length, load_config, load_policy, load_tokenizer
from reinforcepp.models.reward_models import load_reward_weights, new_reward_model, score_head, scores_packed_rows
from reinforcepp.models.tokenization import encode_example
from reinforcepp.rewards.trained import TrainedReward, load_reward_model
from reinforcepp.training.reward_trainer import train_reward_model

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEXT = "please try step shut up question about host restart ping the gateway ? . 1 2 3 4 5 6 7 8 9 0"
COMMON = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 34, "pad_token_id": 0}
SIZE = {"hidden_size": 32, "intermediate_size": 64, **COMMON}
ENDS = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
FAMILIES = {
    "bert": SIZE,
    "roberta": SIZE,
    "deberta-v2": {**SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32},
    "modernbert": {**SIZE, **ENDS, "global_attn_every_n_layers": 1, "reference_compile": False},
    "electra": {**SIZE, "embedding_size": 32},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 34},
    "mpnet": SIZE,
    "albert": {**SIZE, "embedding_size": 16},
}

QUICK_FAMILIES = [
    family if family in ("bert", "roberta", "modernbert") else pytest.param(family, marks=pytest.mark.full)
    for family in FAMILIES
]


def save(folder, family: str) -> str:
    """Write a randomly initialized encoder without a head, and a tokenizer that knows the words of the tests."""
    torch.manual_seed(0)
    tokens = [*SPECIAL, *TEXT.split()]
    config = AutoConfig.for_model(family, **FAMILIES[family], vocab_size=len(tokens))
    model = AutoModel.from_config(config)
    with torch.no_grad():  # wider than the default initialization, so that texts differ
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(True)])
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    names = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Returns the folder of a family's encoder."""
    folder = tmp_path_factory.mktemp("encoders")
    return cache(lambda family: save(folder / family, family))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.csv"
    lines = [f"Question {i} about host {i * 7}?,Please try step {i}.,Shut up step {i}." for i in range(24)]
    path.write_text("prompt,chosen,rejected\n" + "\n".join(lines))
    return str(path)


def config(model: str, data: str, folder, **settings) -> RewardModelConfig:
    usual = {"num_train_epochs": 2, "heldout_fraction": 0.25, "learning_rate": 3e-3, "save_every": 0}
    return RewardModelConfig(model=model, data=data, output_dir=str(folder), **(usual | settings))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_a_trained_encoder_scores_as_in_plain_transformers(encoder, pairs, tmp_path, family, adapter):
    folder = tmp_path / "rm"
    card = train_reward_model(config(encoder(family), pairs, folder, use_peft=adapter)).card
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(losses) < 1.5 and 0 <= card.figures["longer_wins"] <= 1
    reward = load_reward_model(str(folder))  # checks the fingerprint
    assert reward.fingerprint() == pytest.approx(card.fingerprint, abs=1e-4)
    if adapter:
        return
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = reward.tokenizer
    ids = tokenizer("Question 1 about host 2?", "Please try step 3.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = plain(input_ids=ids).logits.item()
    assert reward(["Question 1 about host 2?"], ["Please try step 3."]) == pytest.approx([expected], abs=1e-5)


def test_an_encoder_has_an_output_per_criterion(encoder, tmp_path):
    rows = [f"Question {i}?,Please try step {i}.,Shut up step {i}.,chosen,{i % 3 - 1}" for i in range(8)]
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected,polite,short\n" + "\n".join(rows))
    settings = {"criteria": ("polite", "short"), "num_train_epochs": 1}
    train_reward_model(config(encoder("bert"), str(tmp_path / "pairs.csv"), tmp_path / "rm", **settings))
    reward = load_reward_model(f"{tmp_path / 'rm'}?output=short")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    ids = reward.tokenizer("Question 1?", "Please try step 3.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = plain(input_ids=ids).logits[0].tolist()
    assert reward(["Question 1?"], ["Please try step 3."]) == pytest.approx(expected[1:], abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_fill_the_context_and_no_more(encoder, family):
    name = encoder(family)
    limit = context_length(load_config(name))
    assert limit == {"roberta": 33, "mpnet": 32}.get(family, 34)
    reward = TrainedReward(new_reward_model(name, seed=0).eval(), load_tokenizer(name))
    row = encode_example(reward.tokenizer, "Question?", "ping the gateway. " * 20)
    assert len(row) > limit
    kept = [row[0], *row[1 - limit :]]
    assert reward.score_rows([row]) == pytest.approx(reward.score_rows([kept]), abs=1e-6)
    assert all(map(math.isfinite, reward.score_rows([row, row[:4]])))


def test_prompt_and_answer_are_separated_as_in_pretraining(encoder):
    tokenizer = load_tokenizer(encoder("bert"))
    ids = encode_example(tokenizer, "Question 1?", "Please try.")
    assert ids == tokenizer("Question 1?", "Please try.")["input_ids"]
    assert encode_example(tokenizer, "Question 1?", "Please try.", finished=False) == ids[:-1]
    assert 3 not in encode_example(tokenizer, "[SEP]", "[SEP] x")[1:2]  # the text of a special token isn't special


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_new_head_is_small_and_a_trained_one_is_kept(encoder, pairs, tmp_path, family):
    name, head = score_head(new_reward_model(encoder(family), seed=0))
    assert head.weight.std().item() == pytest.approx(1 / 33, rel=0.5) and not head.bias.any()
    train_reward_model(config(encoder(family), pairs, tmp_path / "rm", num_train_epochs=1))
    _, again = score_head(new_reward_model(str(tmp_path / "rm"), seed=1))
    assert again.weight.equal(load_file(tmp_path / "rm" / "model.safetensors")[f"{name}.weight"])


def test_padding_does_not_change_scores(encoder):
    for family in FAMILIES:
        name = encoder(family)
        reward = TrainedReward(new_reward_model(name, seed=0).eval(), load_tokenizer(name))
        assert not scores_packed_rows(reward.model, 1), family
        rows = [encode_example(reward.tokenizer, "Question?", text) for text in ("ping.", "ping the gateway 1 2 3 4.")]
        together, alone = reward.score_rows(rows), [reward.score_rows([row])[0] for row in rows]
        assert together == pytest.approx(alone, abs=1e-5), family


def test_an_encoder_is_no_policy(encoder, pairs, capsys, tmp_path):
    name = encoder("roberta")
    assert is_encoder(load_config(name))
    with pytest.raises(ModelError, match=r"roberta models are encoders.*reinforcepp reward"):
        load_policy(name)
    for command in ("train", "sft"):
        arguments = ["--model", name, "--data", pairs, "--output_dir", str(tmp_path / command)]
        assert main([command, *arguments, *(["--rewards", "rule:length"] if command == "train" else [])]) == 2
        assert "encoders" in capsys.readouterr().err


def test_a_folder_without_a_head_is_refused(encoder):

    with pytest.raises(ModelError, match=r"no score head \(classifier\.weight\)"):
        load_reward_weights(Path(encoder("bert")))
