"""Behaviors of TRL's other settings; each check is about an effect."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import HfArgumentParser, get_scheduler

from .common import (
    SETTINGS,
    Library,
    Part,
    Recorder,
    load_tokenizer,
    logs,
    make,
    policy,
    prompts,
    reads_prompts,
    train,
    trained,
    variant,
    variety,
    weights,
)
from .objective import moves, rewards_from

part = Part("settings")


def sampled(lib: Library, folder: Path, settings: dict[str, Any]) -> list[list[int]]:
    """Return the token ids of six completions of one prompt."""
    recorder = Recorder()
    settings = {"per_device_train_batch_size": 6, "num_generations": 6, "max_steps": 1} | settings
    make(lib, folder, settings, reward_funcs=recorder, train_dataset=prompts(1)).train()
    return recorder.all("completion_ids")


def greedy(completions: list[list[int]]) -> bool:
    return len({tuple(ids) for ids in completions}) == 1


@part.behavior("temperature", "RLOOConfig")
def temperature(lib: Library, folder: Path) -> None:
    assert not greedy(sampled(lib, folder / "1", {"temperature": 1.0}))
    assert greedy(sampled(lib, folder / "0", {"temperature": 1e-4}))


@part.behavior("top_p-top_k", "test_train_with_additional_generation_kwargs")
def top_p_and_top_k(lib: Library, folder: Path) -> None:
    assert greedy(sampled(lib, folder / "p", {"top_p": 1e-4, "top_k": 10}))
    assert greedy(sampled(lib, folder / "k", {"top_p": 0.9, "top_k": 1}))


@part.behavior("min_p", "test_train_with_additional_generation_kwargs")
def min_p(lib: Library, folder: Path) -> None:
    assert greedy(sampled(lib, folder, {"min_p": 1.0}))


@part.behavior("repetition_penalty", "test_train_with_additional_generation_kwargs")
def repetition_penalty(lib: Library, folder: Path) -> None:
    settings = {"top_k": 1, "repetition_penalty": 50.0, "max_completion_length": 32}
    ids = sampled(lib, folder, settings)[0]
    assert len(ids) == len(set(ids))


@part.behavior("generation_kwargs", "test_train_with_generation_kwargs")
def generation_kwargs(lib: Library, folder: Path) -> None:
    assert greedy(sampled(lib, folder, {"generation_kwargs": {"do_sample": True, "top_k": 1}}))


@part.behavior("mask_truncated_completions", "test_train_with_mask_truncated_completions_all_masked")
def mask_truncated(lib: Library, folder: Path) -> None:
    settings = {"max_completion_length": 2}  # none of the completions has ended by then
    assert moves(lib, folder / "off", settings, reward_funcs=rewards_from(0))
    settings |= {"mask_truncated_completions": True}
    assert not moves(lib, folder / "on", settings, reward_funcs=rewards_from(0))


@part.behavior("sync_ref_model", "test_train_with_sync_ref_model")
def reference_follows(lib: Library, folder: Path) -> None:
    trainer = make(lib, folder, {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1})
    before = weights(trainer.ref_model)
    train(trainer)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.ref_model).items())


@part.behavior("pad_to_multiple_of", "test_train_with_pad_to_multiple_of")
def padding(lib: Library, folder: Path) -> None:
    trained(lib, folder, {"pad_to_multiple_of": 8})


@part.behavior("gradient_checkpointing", "test_train_peft_with_gradient_checkpointing")
def checkpointing(lib: Library, folder: Path) -> None:
    trainer = make(lib, folder, {"gradient_checkpointing": True})
    train(trainer)
    assert trainer.model.is_gradient_checkpointing


@part.behavior("gradient_checkpointing_kwargs", "TrainingArguments")
def checkpointing_kwargs(lib: Library, folder: Path) -> None:
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert trained(lib, folder, kwargs).model.is_gradient_checkpointing


@part.behavior("bf16", "TrainingArguments")
def bfloat16(lib: Library, folder: Path) -> None:
    on_cpu = {"use_cpu": True} if lib.name == "trl" else {}  # TRL requires it for bf16 without a GPU
    settings = {"bf16": True, "learning_rate": 3e-5, "lr_scheduler_type": "constant", "max_steps": 12}
    trainer = make(lib, folder, settings | on_cpu)
    seen, before = set(), trainer.model.lm_head.weight.detach().float().clone()
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    trainer.train()
    assert torch.bfloat16 in seen
    moved = trainer.model.lm_head.weight.float() != before
    assert share(moved) > 0.2, "steps that are smaller than the spacing of bfloat16 numbers add up"


def movement(lib: Library, folder: Path, settings: dict[str, Any]) -> torch.Tensor:
    """Return how far each weight of the output layer moved that has a gradient, as multiples of the learning rate."""
    trainer = make(lib, folder, {"beta": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 1e9} | settings)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    moved = (trainer.model.lm_head.weight.detach() - before).abs().flatten() / SETTINGS["learning_rate"]
    return moved[moved > 0]


def share(found: torch.Tensor) -> float:
    return found.float().mean().item()


@part.behavior("optim-adafactor", "TrainingArguments")
def adafactor(lib: Library, folder: Path) -> None:
    adamw = movement(lib, folder / "adamw", {"max_steps": 1, "optim": "adamw_torch"})
    assert share((adamw - 1).abs() < 0.05) > 0.8, "AdamW's first step is the learning rate"
    other = movement(lib, folder / "adafactor", {"max_steps": 1, "optim": "adafactor"})
    assert share((other - 1).abs() < 0.05) < 0.5


@part.behavior("adam_betas", "TrainingArguments")
def adam_betas(lib: Library, folder: Path) -> None:
    # With both betas 0, each step is the sign of the gradient: two steps add to 0 or 2 times the learning rate.
    moved = movement(lib, folder, {"adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 1e-12})
    assert share((moved - 2).abs() < 0.05) + share(moved < 0.05) + share((moved - 1).abs() < 0.05) > 0.95


def schedule(lib: Library, folder: Path, settings: dict[str, Any], warmup: int) -> None:
    trainer = trained(lib, folder, {"max_steps": 4} | settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=SETTINGS["learning_rate"])
    expected = get_scheduler(
        settings["lr_scheduler_type"],
        optimizer,
        warmup,
        4,
        scheduler_specific_kwargs=settings.get("lr_scheduler_kwargs"),
    )
    rates = []
    for _ in range(4):
        rates.append(expected.get_last_lr()[0])
        optimizer.step()
        expected.step()
    found = logs(trainer, "learning_rate")
    assert found[warmup:] == pytest.approx(rates[warmup:])
    # The warmup rises to the peak; ours doesn't make its first step at 0, where nothing would be learned.
    assert found[:warmup] == sorted(found[:warmup]) and all(rate < found[warmup] for rate in found[:warmup])


for id, warmup, settings in (
    ("lr_scheduler-cosine-warmup_steps", 2, {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    ("lr_scheduler-constant_with_warmup", 2, {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}),
    (
        "lr_scheduler-cosine_with_min_lr",
        0,
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    ),
    ("warmup_steps-ratio", 2, {"lr_scheduler_type": "linear", "warmup_steps": 0.5}),
):
    part.behavior(id, "TrainingArguments")(partial(schedule, settings=settings, warmup=warmup))


@part.behavior("max_grad_norm-weight_decay", "TrainingArguments")
def decay_alone(lib: Library, folder: Path) -> None:
    # A gradient clipped to nothing leaves the weight decay.
    settings = {"max_grad_norm": 1e-15, "weight_decay": 0.5, "lr_scheduler_type": "constant", "max_steps": 1}
    trainer = make(lib, folder, settings)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert torch.allclose(trainer.model.lm_head.weight, before * (1 - 0.1 * 0.5), atol=1e-5)


@part.behavior("logging_steps", "TrainingArguments")
def every_second_step(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    trainer = trained(lib, folder, {"logging_steps": 2, "max_steps": 4}, reward_funcs=recorder)
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    rewards = [variety(call["completions"]) for call in recorder.calls]
    assert entries[0]["reward"] == pytest.approx(sum(rewards[0] + rewards[1]) / 6), "logs are means since the last"


@variant("logging_steps", "small change", "trackers log these steps; state.log_history has every step, not means")
def tracked_every_second_step(lib: Library, folder: Path) -> None:
    trained(lib, folder, {"logging_steps": 2, "max_steps": 4, "report_to": ["tensorboard"]})
    assert [event.step for event in tracked(folder, "reward")] == [2, 4]


@part.behavior("logging_dir-run_name", "examples/scripts/rloo.py")
def run_name(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"run_name": "my-run"})
    assert trainer.args.run_name == "my-run"


def checkpoints(folder: Path) -> list[int]:
    found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in (folder / "run").iterdir()]
    return sorted(int(match[1]) for match in found if match)


@part.behavior("save_steps-total_limit", "TrainingArguments")
def saved_steps(lib: Library, folder: Path) -> None:
    trained(lib, folder, {"save_steps": 1, "save_total_limit": 2, "max_steps": 4})
    assert checkpoints(folder) == [3, 4]


@variant("save_steps-total_limit", "names", "checkpoints are in output_dir/checkpoints/step-000003")
def saved_steps_in_a_folder(lib: Library, folder: Path) -> None:
    trained(lib, folder, {"save_steps": 1, "save_total_limit": 2, "max_steps": 4})
    found = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert found == ["step-000003", "step-000004"]


@part.behavior("save_strategy-no", "TrainingArguments")
def nothing_saved(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"save_strategy": "no"})
    assert checkpoints(folder) == [] and not any(folder.rglob("optimizer*"))
    trainer.save_model(folder / "final")
    assert (folder / "final" / "model.safetensors").exists()


def events(folder: Path) -> bool:
    return any(folder.rglob("events.out.tfevents*"))


def tracked(folder: Path, name: str) -> list[Any]:
    """Return the logged values of a metric, from the files of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(next(folder.rglob("events.out.tfevents*")).parent))
    read.Reload()
    tag = next(tag for tag in read.Tags()["scalars"] if tag in (name, f"train/{name}"))
    return read.Scalars(tag)


@part.behavior("report_to-tensorboard", "TrainingArguments")
def tensorboard(lib: Library, folder: Path) -> None:
    trained(lib, folder, {"report_to": ["tensorboard"]})
    assert len(tracked(folder, "rewards/variety/mean")) == 2


@part.behavior("report_to-plain-string", "TrainingArguments")
def one_tracker(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"report_to": "tensorboard"})
    assert "tensorboard" in trainer.args.report_to and events(folder)


@part.behavior("report_to-list", "TrainingArguments")
def list_of_trackers(lib: Library, folder: Path) -> None:
    trained(lib, folder, {"report_to": ["tensorboard"]})
    assert events(folder)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}


@part.behavior("eval-during-training", "test_train_with_eval")
def evaluated(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, EVALUATED, eval_dataset=prompts(2))
    entries = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [entry["step"] for entry in entries] == [1, 2]


@part.behavior("eval_on_start", "test_train_eval_on_start")
def evaluated_first(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, EVALUATED | {"eval_on_start": True}, eval_dataset=prompts(2))
    first = trainer.state.log_history[0]
    assert first["step"] == 0 and first["eval_reward"] > 0


@part.behavior("num_generations_eval", "test_train_with_num_generations_eval")
def two_per_prompt(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    settings = {"num_generations_eval": 2, "per_device_eval_batch_size": 4}
    trainer = make(lib, folder, settings, reward_funcs=recorder, eval_dataset=prompts(2))
    trainer.evaluate()
    assert sorted(recorder.all("prompts")) == sorted(2 * list(prompts(2)["prompt"]))


@variant("num_generations_eval", "small change", "omit it: evaluations generate one completion per prompt")
def one_per_prompt(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    make(lib, folder, reward_funcs=recorder, eval_dataset=prompts(2)).evaluate()
    assert sorted(recorder.all("prompts")) == sorted(prompts(2)["prompt"])


@part.behavior("chat_template_kwargs", "test_train_with_chat_template_kwargs")
def template_arguments(lib: Library, folder: Path) -> None:
    model, arguments = policy(template=tiny.THINKING), {"enable_thinking": False}
    data, tokenizer = prompts(2, conversational=True), load_tokenizer(model)
    form = partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False, **arguments)
    expected = [form(messages) for messages in data["prompt"]]
    assert "</think>" in tokenizer.decode(expected[0])
    reads_prompts(lib, folder, data, expected, {"chat_template_kwargs": arguments}, model=model)


@part.behavior("HfArgumentParser", "examples: HfArgumentParser((ScriptArguments, RLOOConfig, ModelConfig))")
def argument_parser(lib: Library, folder: Path) -> None:
    from trl import ModelConfig, ScriptArguments

    words = f"--output_dir {folder}/run --learning_rate 0.05 --num_generations 3 --max_steps 1 --bf16 False"
    words += f" --per_device_train_batch_size 3 --report_to none --model_name_or_path {policy()} --dataset_name none"
    parser = HfArgumentParser((ScriptArguments, lib.Config, ModelConfig))
    script, args, model = parser.parse_args_into_dataclasses(args=words.split())
    assert isinstance(args, lib.Config) and args.learning_rate == 0.05 and script.dataset_name == "none"
    train(lib.Trainer(model.model_name_or_path, variety, args, prompts()))


@part.behavior("TrlParser-with-yaml", "trl/scripts: TrlParser with --config")
def yaml_file(lib: Library, folder: Path) -> None:
    from trl import ModelConfig, ScriptArguments, TrlParser

    lines = [f"output_dir: {folder}/run", "learning_rate: 5.0e-2", "num_generations: 3", "max_steps: 1", "bf16: false"]
    lines += [
        "per_device_train_batch_size: 3",
        "report_to: none",
        f"model_name_or_path: {policy()}",
        "dataset_name: none",
    ]
    (folder / "settings.yaml").write_text("\n".join(lines))
    parser = TrlParser((ScriptArguments, lib.Config, ModelConfig))
    words = ["--config", str(folder / "settings.yaml"), "--max_completion_length", "8"]
    _script, args, model = parser.parse_args_and_config(args=words)
    assert args.learning_rate == 0.05 and args.max_completion_length == 8
    train(lib.Trainer(model.model_name_or_path, variety, args, prompts()))


@part.behavior("config-is-mutable", "user code: args.max_steps = 1")
def mutable(lib: Library, folder: Path) -> None:
    args = lib.Config(output_dir=str(folder / "run"), **SETTINGS)
    args.max_steps = 1
    trainer = lib.Trainer(policy(), variety, args, prompts())
    trainer.train()
    assert trainer.state.global_step == 1


@variant("config-is-mutable", "small change", "args = dataclasses.replace(args, max_steps=1)")
def replaced(lib: Library, folder: Path) -> None:
    args = lib.Config(output_dir=str(folder / "run"), **SETTINGS)
    args = replace(args, max_steps=1)
    trainer = lib.Trainer(policy(), variety, args, prompts())
    trainer.train()
    assert trainer.state.global_step == 1


@part.behavior("max_steps-minus-1", "TrainingArguments")
def default_steps(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"max_steps": -1, "num_train_epochs": 1}, train_dataset=prompts(3))
    assert trainer.state.global_step == 3


@part.behavior("num_train_epochs-fraction", "TrainingArguments")
def half_an_epoch(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"max_steps": -1, "num_train_epochs": 0.5}, train_dataset=prompts(4))
    assert trainer.state.global_step == 2


@variant("num_train_epochs-fraction", "small change", "max_steps instead of a fraction of an epoch")
def two_of_four_steps(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"max_steps": 2}, train_dataset=prompts(4))
    assert trainer.state.global_step == 2


@part.behavior("learning-rate-0.1-of-TRL-tests", "all tests")
def large_learning_rate(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"max_steps": 5})
    assert trainer.state.global_step == 5
