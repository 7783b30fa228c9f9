"""Behaviors of TRL's RewardTrainer, and reward models of one library in the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig

from .common import (
    PROMPTS,
    Library,
    Part,
    Recorder,
    base_policy,
    error_of,
    inputs_of,
    load_reward,
    load_tokenizer,
    logs,
    make,
    policy,
    reward_model,
    same_outputs,
    scores,
    train,
    trl_library,
    weights,
)

part = Part("reward model")

SETTINGS = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "bf16": False,
    "report_to": "none",
}


def pairs(kind: str = "standard", **columns: Any) -> Dataset:
    """Return six pairs: ``standard`` or ``conversational``, with the prompt in a column, or ``_implicit`` in both answers."""
    rows = []
    for i, prompt in enumerate(PROMPTS[:6]):
        texts = [f"Run ip route {i}.", f"Reboot it {i} times."]
        if kind.startswith("standard"):
            prompts, answers = prompt + " ", texts
        else:
            prompts = [{"role": "user", "content": prompt}]
            answers = [[{"role": "assistant", "content": text}] for text in texts]
        if kind.endswith("implicit"):
            rows.append({"chosen": prompts + answers[0], "rejected": prompts + answers[1]})
        else:
            rows.append({"prompt": prompts, "chosen": answers[0], "rejected": answers[1]})
    return Dataset.from_list(
        [row | {name: column[i] for name, column in columns.items()} for i, row in enumerate(rows)]
    )


def make_reward(lib: Library, folder: Path, settings: dict[str, Any] | None = None, **given: Any) -> Any:
    config = lib.RewardConfig(**({"output_dir": str(folder / "run")} | SETTINGS | (settings or {})))
    return lib.RewardTrainer(args=config, **({"model": policy(), "train_dataset": pairs()} | given))


def trained_reward(lib: Library, folder: Path, settings: dict[str, Any] | None = None, **given: Any) -> Any:
    trainer = train(make_reward(lib, folder, settings, **given))
    assert "train_loss" in trainer.state.log_history[-1]
    return trainer


def format_trains(lib: Library, folder: Path, kind: str) -> None:
    trainer = make_reward(lib, folder, {"max_steps": 3}, train_dataset=pairs(kind))
    with inputs_of(trainer.model) as rows:
        train(trainer)
    tokenizer, row = load_tokenizer(), pairs(kind)[0]
    for name in ("chosen", "rejected"):
        whole = row.get("prompt", row[name][:0]) + row[name]
        if kind.startswith("standard"):
            expected = tokenizer(whole + tokenizer.eos_token)["input_ids"]
        else:
            expected = tokenizer.apply_chat_template(whole, return_dict=False)
        assert any(read[: len(expected)] == expected for read in rows), (expected, rows)


for kind in ("standard", "standard_implicit", "conversational", "conversational_implicit"):
    part.behavior(f"reward-dataset-{kind}", "test_train_dataset_types")(partial(format_trains, kind=kind))


@part.behavior("reward-model-instance", "test_train_model")
def loaded_model(lib: Library, folder: Path) -> None:
    model = load_reward(policy())
    before = weights(model)
    trained_reward(lib, folder, model=model, processing_class=load_tokenizer())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


@part.behavior("reward-from-seqcls-folder", "test_train_from_sequence_classification_model")
def from_classifier(lib: Library, folder: Path) -> None:
    trainer = make_reward(lib, folder, model=reward_model())
    assert torch.equal(trainer.model.score.weight, load_reward(reward_model()).score.weight), "the head is kept"
    train(trainer)


def adapter_trains(lib: Library, folder: Path, settings: dict[str, Any]) -> None:
    trainer = make_reward(lib, folder, settings, peft_config=LoraConfig(task_type="SEQ_CLS"))
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved), moved
    assert any("score" in name for name in moved), "the head is trained"


part.behavior("reward-peft_config", "test_train_dense_with_peft_config")(partial(adapter_trains, settings={}))
part.behavior("reward-peft-and-gc", "test_train_with_peft_config_and_gradient_checkpointing")(
    partial(adapter_trains, settings={"gradient_checkpointing": True})
)


@part.behavior("reward-gradient_checkpointing", "test_train_with_gradient_checkpointing")
def checkpointing(lib: Library, folder: Path) -> None:
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert trained_reward(lib, folder, settings).model.is_gradient_checkpointing


@part.behavior("reward-pretokenized", "test_train_with_pretokenized_data")
def pretokenized(lib: Library, folder: Path) -> None:
    encode = load_tokenizer()
    rows = [{f"{name}_ids": encode(row[name])["input_ids"] for name in ("chosen", "rejected")} for row in pairs()]
    trainer = make_reward(lib, folder, {"max_steps": 3}, train_dataset=Dataset.from_list(rows))
    with inputs_of(trainer.model) as read:
        train(trainer)
    assert any(row[: len(rows[0]["chosen_ids"])] == rows[0]["chosen_ids"] for row in read)


@part.behavior("reward-iterable", "test_train_with_iterable_dataset")
def iterable(lib: Library, folder: Path) -> None:
    trainer = trained_reward(lib, folder, {"max_steps": 3}, train_dataset=pairs().to_iterable_dataset())
    assert trainer.state.global_step == 3


@part.behavior("reward-chat_template_path", "test_train_with_set_chat_template_from_path")
def template_file(lib: Library, folder: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] + '> ' + m['content'] + '\n' }}{% endfor %}"
    (folder / "template.jinja").write_text(template)
    settings = {"chat_template_path": str(folder / "template.jinja")}
    trainer = trained_reward(lib, folder, settings, train_dataset=pairs("conversational"))
    trainer.save_model(folder / "saved")
    assert load_tokenizer(str(folder / "saved")).chat_template == template


@part.behavior("reward-chat_template_kwargs-column", "test_train_with_chat_template_kwargs")
def template_arguments(lib: Library, folder: Path) -> None:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{{ 'LOUD: ' if loud else 'quiet: ' }}" + tiny.CHATML
    arguments = [{"loud": i % 2 == 0} for i in range(6)]
    data = pairs("conversational", chat_template_kwargs=arguments)
    trainer = make_reward(lib, folder, {"max_steps": 3}, train_dataset=data, processing_class=tokenizer)
    with inputs_of(trainer.model) as rows:
        train(trainer)
    starts = {tokenizer.decode(row).split(":")[0] for row in rows}
    assert starts == {"LOUD", "quiet"}


@part.behavior("reward-toolcall-data", "test_train_toolcall_data")
def tool_calls(lib: Library, folder: Path) -> None:
    import trl

    tokenizer = load_tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    parameters = {"type": "object", "properties": {"host": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "ping", "description": "Ping.", "parameters": parameters}}
    call = {"type": "function", "function": {"name": "ping", "arguments": {"host": "example.org"}}}
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "tool_calls": [call]}],
            "rejected": [{"role": "assistant", "content": "I can't."}],
            "tools": json.dumps([tool]),
        }
        for prompt in PROMPTS[:6]
    ]
    settings = {"per_device_train_batch_size": 1, "max_length": 2048}
    data = Dataset.from_list(rows)
    trainer = make_reward(lib, folder, settings, train_dataset=data, processing_class=tokenizer)
    with inputs_of(trainer.model) as read:
        train(trainer)
    texts = [tokenizer.decode(row) for row in read]
    assert any("example.org" in text and '"description": "Ping."' in text for text in texts)


@part.behavior("reward-eval_dataset", "test_train_with_eval")
def evaluated(lib: Library, folder: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = trained_reward(lib, folder, settings, eval_dataset=pairs())
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2]


@part.behavior("reward-several-eval-datasets", "test_train_with_multiple_eval_dataset")
def evaluated_on_two(lib: Library, folder: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = trained_reward(lib, folder, settings, eval_dataset={"data1": pairs(), "data2": pairs()})
    assert len(logs(trainer, "eval_data1_loss")) == len(logs(trainer, "eval_data2_loss")) == 2


@part.behavior("reward-compute_metrics", "test_train_with_compute_metrics")
def own_metrics(lib: Library, folder: Path) -> None:
    def compute_metrics(prediction: Any) -> dict[str, float]:
        assert len(prediction.predictions) > 0
        return {"my_metric": 0.123}

    settings = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = trained_reward(lib, folder, settings, eval_dataset=pairs(), compute_metrics=compute_metrics)
    assert logs(trainer, "eval_my_metric") == [0.123, 0.123]


@part.behavior("reward-margin-column", "test_train_with_margin")
def margins(lib: Library, folder: Path) -> None:
    trainer = trained_reward(lib, folder, train_dataset=pairs(margin=[100.0] * 6))
    assert 90 < logs(trainer, "loss")[0] < 110


@part.behavior("reward-center_rewards_coefficient", "test_train_with_center_rewards_coefficient")
def centered(lib: Library, folder: Path) -> None:
    first = [
        logs(trained_reward(lib, folder / str(value), {"center_rewards_coefficient": value}), "loss")[0]
        for value in (0.0, 1e6)
    ]
    assert first[1] > 2 * first[0]


@part.behavior("reward-dataset-required", "test_train_dataset_required")
def dataset_required(lib: Library, folder: Path) -> None:
    assert "train_dataset" in error_of(lambda: make_reward(lib, folder, train_dataset=None))


@part.behavior("reward-dtype-float16", "test_train_model_dtype")
def half(lib: Library, folder: Path) -> None:
    trainer = trained_reward(lib, folder, {"model_init_kwargs": {"dtype": torch.float16}, "learning_rate": 0.1})
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float16}


@part.behavior("reward-evaluate-method", "examples/scripts/reward_modeling.py")
def evaluate(lib: Library, folder: Path) -> None:
    trainer = make_reward(lib, folder, eval_dataset=pairs())
    metrics = trainer.evaluate()
    wanted = {f"eval_{name}" for name in ("loss", "accuracy", "margin", "mean_reward", "runtime")}
    assert wanted <= set(metrics) and 0 <= metrics["eval_accuracy"] <= 1


@part.behavior("reward-log_history", "test_train")
def log_history(lib: Library, folder: Path) -> None:
    history = trained_reward(lib, folder).state.log_history
    wanted = "loss accuracy margin min_reward mean_reward max_reward num_tokens grad_norm learning_rate epoch step"
    assert all(set(wanted.split()) <= set(entry) for entry in history[:2])


@part.behavior("reward-save-load-score", "examples/scripts/reward_modeling.py")
def save_and_reload(lib: Library, folder: Path) -> None:
    trainer = trained_reward(lib, folder)
    trainer.save_model(str(folder / "saved"))
    assert same_outputs(load_reward(str(folder / "saved")), trainer.model)


def interop(
    lib: Library, folder: Path, rewards: Callable[[Library], Library], policies: Callable[[Library], Library]
) -> None:
    """Train a reward model with one library, and a policy on its scores with another."""
    trained_reward(rewards(lib), folder / "reward", model=base_policy()).save_model(str(folder / "rm"))
    recorder = Recorder()
    rewards_of = [str(folder / "rm"), recorder]
    trainer = make(policies(lib), folder / "policy", {"max_steps": 1}, model=base_policy(), reward_funcs=rewards_of)
    trainer.train()
    texts = [p + c for p, c in zip(recorder.all("prompts"), recorder.all("completions"), strict=True)]
    expected = scores(str(folder / "rm"), texts)
    assert logs(trainer, "rewards/rm/mean")[0] == pytest.approx(sum(expected) / len(expected), abs=1e-3)


part.behavior("our-reward-model-in-TRL", "a folder as reward_funcs")(
    partial(interop, rewards=lambda lib: lib, policies=lambda lib: trl_library())
)
part.behavior("TRL-reward-model-in-ours", "a folder as reward_funcs")(
    partial(interop, rewards=lambda lib: trl_library(), policies=lambda lib: lib)
)
