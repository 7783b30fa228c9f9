"""A saved reward model scores alike in plain transformers and in TRL: its pad token, and the end of its conversations."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.data_utils import apply_chat_template
from trl.trainer.reward_trainer import DataCollatorForPreference

from reinforcepp.config import RewardModelConfig
from reinforcepp.models.padding import end_conversations_at_turn
from reinforcepp.models.tokenization import encode_example
from reinforcepp.rewards.trained import load_reward_model
from reinforcepp.training.reward_trainer import train_reward_model

QUESTION, ANSWERS = "Which port?", ["Port 22.", "Shut up, and try all of them one after another.", "No"]
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
NO_END += "{% if add_generation_prompt %}assistant:{% endif %}"
TOKENIZERS = {
    "no template, no pad token": tiny.tokenizer,
    "pad is EOS": lambda: tiny.chat_tokenizer(eos="<|endoftext|>"),
    "pad ends a turn": lambda: with_pad("<|im_end|>"),
    "line feed after a turn": tiny.chat_tokenizer,
    "no end token in the template": lambda: tiny.chat_tokenizer(NO_END),
    "reasoning": lambda: tiny.chat_tokenizer(tiny.THINKING),
    "Llama 2": lambda: tiny.sentencepiece_tokenizer(tiny.BRACKETS),
}


def with_pad(token: str):
    tokenizer = tiny.chat_tokenizer()
    tokenizer.pad_token = token
    return tokenizer


def trained(tmp_path, tokenizer, **settings):
    tiny.model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lines = [f"Question {i}?,Please try step {i}.,Shut up step {i}." for i in range(8)]
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n" + "\n".join(lines))
    usual = {"num_train_epochs": 1, "heldout_fraction": 0.0, "save_every": 0, "learning_rate": 1e-2}
    data = {"model": str(tmp_path / "base"), "data": str(tmp_path / "pairs.csv")}
    train_reward_model(RewardModelConfig(**data, output_dir=str(tmp_path / "rm"), **(usual | settings)))
    return tmp_path / "rm"


@torch.no_grad()
def scores_in_trl(model, tokenizer) -> list[float]:
    """Return the scores as TRL's trainers compute them: whole conversations, padded on the right in one batch."""
    messages = [[{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}] for answer in ANSWERS]
    texts = [apply_chat_template({"messages": row}, tokenizer)["text"] for row in messages]
    inputs = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    return model(**inputs).logits[:, 0].tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_saved_model_scores_alike_in_transformers_and_trl(tmp_path, kind):
    folder = trained(tmp_path, TOKENIZERS[kind]())
    expected = pytest.approx(load_reward_model(str(folder))([QUESTION] * 3, ANSWERS), abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert scores_in_trl(model, tokenizer) == expected
    rows = [encode_example(tokenizer, QUESTION, answer) for answer in ANSWERS]
    pairs = [{"chosen_ids": row, "rejected_ids": row} for row in rows]
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(pairs)
    with torch.no_grad():
        assert model(**batch).logits[:3, 0].tolist() == expected


def test_a_saved_adapter_scores_alike_in_transformers_and_trl(tmp_path):
    folder = trained(tmp_path, tiny.chat_tokenizer(), use_peft=True)
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = (
        tokenizer.pad_token_id
    )  # TRL sets it, because the base model's configuration has another one
    expected = load_reward_model(str(folder))([QUESTION] * 3, ANSWERS)
    assert scores_in_trl(model, tokenizer) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_only_the_end_of_a_last_answer_changes(kind):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = (
        tokenizer.chat_template or "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    before = tokenizer.chat_template
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?\n"},
    ]
    prompts = [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=g) for g in (False, True)]
    ids = encode_example(tokenizer, QUESTION, ANSWERS[0])
    end_conversations_at_turn(tokenizer)
    assert prompts == [
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=g) for g in (False, True)
    ]
    assert encode_example(tokenizer, QUESTION, ANSWERS[0]) == ids
    changed = tokenizer.chat_template
    end_conversations_at_turn(tokenizer)
    assert tokenizer.chat_template == changed and (changed == before) == (
        kind in ("no template, no pad token", "Llama 2")
    )
