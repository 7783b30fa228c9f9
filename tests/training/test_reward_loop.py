"""RewardTrainer: equality with TRL's, models and data in memory, evaluation, resuming, and the saved reward model."""

from __future__ import annotations

import json
import os
import signal

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, TrainerCallback
from trl import RewardConfig
from trl import RewardTrainer as TrlRewardTrainer

from reinforcepp import ConfigError, DataError, RewardModelConfig, RewardTrainer, load_reward_model, train_reward_model
from reinforcepp.models.reward_models import as_classifier
from reinforcepp.monitoring.signals import Interrupted

TEXTS = [{"prompt": f"Host {i}?", "chosen": f" Please try {i}.", "rejected": f" Shut up {i * 7}."} for i in range(8)]
IMPLICIT = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in TEXTS]


def turn(role, content, **more):
    return [{"role": role, "content": content, **more}]


MESSAGES = [
    {"prompt": turn("user", row["prompt"])} | {side: turn("assistant", row[side]) for side in ("chosen", "rejected")}
    for row in TEXTS
]
WHOLE = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in MESSAGES]
IDS = [{"chosen_ids": [5, i + 9, 0], "rejected_ids": [5, i + 9, i + 30, 0]} for i in range(8)]
MARGINS = [row | {"margin": i / 4} for i, row in enumerate(TEXTS)]
CALL = {"type": "function", "function": {"name": "ping", "arguments": {"host": "a"}}}
TOOLS = [
    {
        "prompt": turn("user", f"Is {i} up?"),
        "chosen": turn("assistant", "", tool_calls=[CALL]),
        "rejected": turn("assistant", "No."),
        "tools": json.dumps([{"type": "function", "function": {"name": "ping"}}]),
    }
    for i in range(8)
]
VARIABLES = [row | {"chat_template_kwargs": {"enable_thinking": bool(i % 2)}} for i, row in enumerate(MESSAGES)]
TOOL_TEMPLATE = (
    "{% if tools is defined and tools %}{{ tools[0].function.name }}\n{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.host }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def classifier():
    """A classifier in memory; its pad token ends texts, as in many language models."""
    model = as_classifier(tiny.model("llama"), seed=1)
    model.config.pad_token_id = 0
    return model


def settings(folder, **changes):
    usual = {"learning_rate": 1e-3, "batch_size": 2, "max_steps": 3, "warmup_ratio": 0.0, "seed": 7}
    usual |= {"center_rewards_coefficient": None, "output_dir": str(folder)}
    return RewardModelConfig(**(usual | changes))


def with_trl(model, rows, tokenizer, folder):
    args = RewardConfig(
        output_dir=str(folder),
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        max_steps=3,
        seed=7,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=256,
    )
    trainer = TrlRewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("rows", "tokenizer"),
    [
        (TEXTS, tiny.tokenizer),
        (IMPLICIT, tiny.chat_tokenizer),
        (MESSAGES, tiny.chat_tokenizer),
        (WHOLE, lambda: tiny.chat_tokenizer(tiny.THINKING)),
        (IDS, tiny.tokenizer),
        (MARGINS, tiny.tokenizer),
        (TOOLS, lambda: tiny.chat_tokenizer(TOOL_TEMPLATE)),
        (VARIABLES, lambda: tiny.chat_tokenizer(tiny.THINKING)),
    ],
    ids=["texts", "implicit", "messages", "implicit messages", "tokenized", "margins", "tools", "variables"],
)
def test_losses_and_weights_equal_those_of_trl(classifier, rows, tokenizer, tmp_path):
    start = {name: weight.clone() for name, weight in classifier.state_dict().items()}
    ours = RewardTrainer(classifier, settings(tmp_path / "ours"), train_dataset=rows, processing_class=tokenizer())
    ours.train()
    trained = {name: weight.clone() for name, weight in classifier.state_dict().items()}
    classifier.load_state_dict(start)
    theirs = with_trl(classifier, rows, tokenizer(), tmp_path / "trl")
    for name, weight in classifier.state_dict().items():
        torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=0)
    assert (trained["score.weight"] - start["score.weight"]).abs().max() > 1e-3
    for one, other in zip(ours.state.log_history[:3], theirs.state.log_history[:3], strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_the_saved_model_scores_as_in_training(classifier, tmp_path):
    """Also in plain transformers: the score is read before a pad token that ends the text."""
    result = train_reward_model(
        settings(tmp_path / "rm", max_steps=6),
        classifier,
        MESSAGES,
        {"easy": MESSAGES[:3], "hard": MESSAGES[3:]},
        tiny.chat_tokenizer(eos="<|endoftext|>"),
    )
    prompts, answers = [row["prompt"] for row in MESSAGES], [row["chosen"][0]["content"] for row in MESSAGES]
    scores = load_reward_model(tmp_path / "rm")(prompts, answers)
    assert result(prompts, answers) == result.score(prompts, answers) == pytest.approx(scores, abs=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    conversation = [*prompts[0], *MESSAGES[0]["chosen"]]
    ids = result.tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=False)
    assert plain(ids).logits.item() == pytest.approx(scores[0], abs=1e-5)
    assert result.model is classifier and result.card.heldout_pairs == 8 and result.card.train_pairs == 8
    assert result.metrics["eval_easy_accuracy"] == 1 and "eval_hard_loss" in result.metrics
    assert result.metrics["train_loss"] > 0


def test_without_held_out_pairs_the_card_has_no_metrics(classifier, tmp_path, capfd):
    result = train_reward_model(settings(tmp_path / "rm"), classifier, TEXTS, processing_class=tiny.tokenizer())
    assert (result.card.heldout_pairs, result.card.figures, result.card.data) == (0, {}, "train_dataset")
    assert len(result.card.data_sha256) == 64
    assert "No pairs were held out" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["classifier folder", "language model", "language model folder", "float16", "dtype"])
def test_models_of_all_kinds_are_trained(kind, classifier, tmp_path):
    model, head = classifier, classifier.score.weight.clone()
    if kind == "classifier folder":
        classifier.save_pretrained(tmp_path / "base")
        tiny.tokenizer().save_pretrained(tmp_path / "base")
        model = tmp_path / "base"
    elif kind == "language model":
        model = tiny.model("llama")
    elif kind in ("language model folder", "dtype"):
        model = tiny.save(tmp_path / "base", "llama")
    elif kind == "float16":
        model = classifier.half()
    half = kind in ("float16", "dtype")
    args = settings(tmp_path / "rm", max_steps=1, dtype="float16" if kind == "dtype" else "float32")
    trainer = RewardTrainer(model, args, train_dataset=TEXTS, processing_class=tiny.tokenizer())
    start = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    assert start["score.weight"].equal(head.half() if half else head) == (kind in ("classifier folder", "float16"))
    trainer.train()
    assert not any(weight.equal(start[name]) for name, weight in trainer.model.named_parameters())
    assert trainer.model.dtype == (torch.float16 if half else torch.float32)
    assert load_reward_model(tmp_path / "rm").card.fingerprint == trainer.card.fingerprint
    if kind == "language model":
        assert trainer.model.base_model is model.base_model


@pytest.mark.parametrize("given", ["peft_config", "PeftModel", "settings"])
def test_adapters_train_the_score_head_too(given, classifier, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"] if given == "PeftModel" else None)
    model = get_peft_model(classifier, adapter) if given == "PeftModel" else classifier
    args = settings(tmp_path / "rm", use_peft=given == "settings", gradient_checkpointing=True)
    config = adapter if given == "peft_config" else None
    result = train_reward_model(args, model, TEXTS, processing_class=tiny.tokenizer(), peft_config=config)
    trained = {name for name, weight in result.model.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trained) and any("lora_" in name for name in trained)
    assert not any("embed" in name for name in trained)
    scores = result(["Host 1?"], [" Please try 1."])
    assert load_reward_model(tmp_path / "rm")(["Host 1?"], [" Please try 1."]) == pytest.approx(scores, abs=1e-5)


def test_a_stream_is_trained_for_max_steps(classifier, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(TEXTS))
    with pytest.raises(ConfigError, match="Set max_steps"):
        RewardTrainer(classifier, settings(tmp_path, max_steps=0), train_dataset=stream)
    trainer = RewardTrainer(
        classifier, settings(tmp_path / "rm"), train_dataset=stream, processing_class=tiny.tokenizer()
    )
    assert trainer.train().global_step == 3 and trainer.card.train_pairs == 6


def test_callbacks_and_evaluations_see_the_training(classifier, tmp_path):
    """Early stopping, metrics of the caller, evaluations during training, and the log as in TRL."""

    patience = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    trainer = RewardTrainer(
        classifier,
        settings(tmp_path / "rm", eval_strategy="steps", eval_steps=1, report_to="tensorboard", logging_steps=1),
        train_dataset=TEXTS,
        eval_dataset=TEXTS[:3],
        processing_class=tiny.tokenizer(),
        compute_metrics=lambda prediction: {"largest": float(prediction.predictions.max())},
        callbacks=[patience],
    )
    assert trainer.train().global_step == 2
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    tracked = EventAccumulator(str(next((tmp_path / "rm" / "trackers").glob("*")))).Reload()
    assert {"loss", "eval_loss", "eval_largest"} <= set(tracked.Tags()["scalars"])
    metrics = trainer.evaluate()
    names = ("loss", "accuracy", "margin", "min_reward", "max_reward", "mean_reward", "num_tokens", "largest")
    assert {f"eval_{name}" for name in names} <= metrics.keys()
    assert metrics["eval_loss"] == pytest.approx(logged[-1]["eval_loss"])
    assert trainer.evaluate(TEXTS[3:])["eval_loss"] != metrics["eval_loss"]
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    assert json.loads((tmp_path / "rm" / "eval_results.json").read_text()) == metrics
    trainer.save_model(tmp_path / "copy")
    assert load_reward_model(tmp_path / "copy").card.fingerprint == trainer.card.fingerprint


def test_a_stopped_training_resumes_exactly(classifier, tmp_path):
    class Signal(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    def trainer(folder, callbacks):
        model = as_classifier(tiny.model("llama"), seed=1)
        args = settings(tmp_path / folder, max_steps=5)
        return RewardTrainer(model, args, train_dataset=TEXTS, processing_class=tiny.tokenizer(), callbacks=callbacks)

    whole = trainer("whole", [])
    whole.train()
    stopped = trainer("run", [Signal()])
    with pytest.raises(Interrupted):
        stopped.train()
    again = trainer("run", [])
    assert again.train(resume_from_checkpoint=True).global_step == 5
    assert again.model.score.weight.equal(whole.model.score.weight)
    assert len(again.state.log_history) == len(whole.state.log_history)
    assert again.train().global_step == 5  # nothing is left to train


def test_long_pairs_are_skipped_and_reported(classifier, tmp_path, capfd):
    rows = [*TEXTS, {"prompt": "Why?", "chosen": " word" * 60, "rejected": " No."}]
    trainer = RewardTrainer(
        classifier, settings(tmp_path, max_length=40), train_dataset=rows, processing_class=tiny.tokenizer()
    )
    assert len(trainer.train_dataset) == 8
    assert "Skipped 1 of 9 train pairs longer than 40 tokens" in capfd.readouterr().err


def without_head():
    return tiny.model("llama").base_model


@pytest.mark.parametrize(
    ("model", "rows", "changes", "error", "message"),
    [
        (None, None, {}, ConfigError, "`train_dataset` is required"),
        (None, "data.csv", {}, ConfigError, "str isn't a dataset of pairs"),
        (None, [], {}, DataError, "no rows"),
        (None, [{"prompt": "Why?", "good": "a"}], {}, DataError, "no columns chosen and rejected, only prompt, good"),
        (None, [{"chosen": 1, "rejected": 2}], {}, DataError, "a row can't be tokenized"),
        (None, TEXTS, {"eval_every": 2}, ConfigError, "eval_every: there are no held-out pairs"),
        (None, TEXTS, {"max_length": 2}, DataError, "no row fits into max_length 2"),
        (
            None,
            TEXTS,
            {"system_prompt": "Be brief."},
            ConfigError,
            "system_prompt: the rows of train_dataset are texts",
        ),
        (without_head, TEXTS, {}, ConfigError, "the given LlamaModel has no score head"),
    ],
)
def test_unusable_arguments_are_refused(classifier, model, rows, changes, error, message, tmp_path):
    given = classifier if model is None else model()
    with pytest.raises(error, match=message):
        RewardTrainer(given, settings(tmp_path, **changes), train_dataset=rows, processing_class=tiny.tokenizer())


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_weight_of_2_counts_like_a_row_that_occurs_twice(classifier, tmp_path):
    start = {name: weight.clone() for name, weight in classifier.state_dict().items()}
    trained = []
    for weights, kept in (((2, 0), TEXTS[:2]), (None, TEXTS[:1] * 2)):
        rows = [row | {"weight": weight} for row, weight in zip(kept, weights, strict=True)] if weights else kept
        classifier.load_state_dict(start)
        options = {"max_steps": 1, "center_rewards_coefficient": 0.1, "overwrite": True}
        trainer = RewardTrainer(classifier, settings(tmp_path / "rm", **options), None, rows, None, tiny.tokenizer())
        trainer.train()
        trained.append({name: weight.clone() for name, weight in classifier.state_dict().items()})
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, -1), "train_dataset: weight: -1 isn't a finite number of at least 0"),
        ((float("nan"), 1), "train_dataset: weight: nan isn't"),
        ((1, None), "train_dataset: weight: None isn't"),
        (("1", "2"), "train_dataset: weight: '1' isn't"),
        ((0, 0), "train_dataset: no pair has a weight above 0"),
    ],
)
def test_odd_weights_are_errors(classifier, tmp_path, weights, message):
    rows = [row | {"weight": weight} for row, weight in zip(TEXTS, weights, strict=False)]
    with pytest.raises(DataError, match=message):
        RewardTrainer(classifier, settings(tmp_path), train_dataset=rows, processing_class=tiny.tokenizer())


def test_odd_weights_of_a_stream_are_errors(classifier, tmp_path):
    rows = IterableDataset.from_generator(lambda: ({**row, "weight": -1.0} for row in TEXTS))
    trainer = RewardTrainer(classifier, settings(tmp_path / "rm"), None, rows, None, tiny.tokenizer())
    with pytest.raises(DataError, match=r"weight: -1\.0 isn't"):
        trainer.train()
