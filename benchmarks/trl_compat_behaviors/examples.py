"""TRL's example scripts, with tiny models and a local dataset."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from .common import PROMPTS, Library, Part, policy, reward_model, unchanged, variant, weights
from .trainer import local_hub, pushed_by_command

part = Part("examples")


def problems() -> Dataset:
    rows = {"problem": PROMPTS * 5, "messages": ["-"] * 40, "solution": [r"\boxed{4}"] * 40}

    def make_conversation(example: dict[str, str]) -> dict[str, Any]:
        system = {"role": "system", "content": "Think first, within <think></think> tags."}
        return {"prompt": [system, {"role": "user", "content": example["problem"]}]}

    return Dataset.from_dict(rows).map(make_conversation, remove_columns=["messages", "problem"])


@part.behavior("example-rloo.py", "examples/scripts/rloo.py")
def rloo(lib: Library, folder: Path) -> None:
    trainer = rloo_script(lib)
    with local_hub() as server:
        trainer.push_to_hub(dataset_name="AI-MO/NuminaMath-TIR")
    assert "adapter_model.safetensors" in server.repos["me/Policy-RLOO"]["files"]


@variant("example-rloo.py", "small change", "reinforcepp push --model FOLDER --repo NAME instead of push_to_hub")
def rloo_pushed_by_command(lib: Library, folder: Path) -> None:
    trainer = rloo_script(lib)
    with local_hub() as server:
        pushed_by_command(trainer, folder / "saved", "me/rloo")
    assert "model.safetensors" in server.repos["me/rloo"]["files"]


def rloo_script(lib: Library) -> Any:
    """Run the script up to the upload; return its trainer."""
    from trl.rewards import accuracy_reward, think_format_reward

    training_args = lib.Config(
        output_dir="Policy-RLOO",
        model_init_kwargs={"dtype": torch.bfloat16},
        learning_rate=1e-2,
        log_completions=True,
        num_completions_to_print=2,
        max_completion_length=8,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
        run_name="RLOO-NuminaMath",
        # of this machine
        max_steps=4,
        bf16=False,
        report_to="none",
    )
    data = problems()
    trainer = lib.Trainer(
        model=policy(),
        args=training_args,
        reward_funcs=[think_format_reward, accuracy_reward],
        train_dataset=data.select(range(32)),
        eval_dataset=data.select(range(32, 40)),
        peft_config=LoraConfig(),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert trainer.state.log_history[0]["rewards/think_format_reward/mean"] == 0
    return trainer


def ppo_parts() -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(policy(), padding_side="left")
    load = AutoModelForSequenceClassification.from_pretrained
    return {
        "processing_class": tokenizer,
        "model": AutoModelForCausalLM.from_pretrained(policy()),
        "ref_model": AutoModelForCausalLM.from_pretrained(policy()),
        "reward_model": load(reward_model(), num_labels=1),
        "value_model": load(reward_model(), num_labels=1),
    }


@part.behavior("example-ppo.py", "examples/scripts/ppo/ppo.py", not_on_trl="TRL 1.16 has no PPO")
def ppo(lib: Library, folder: Path) -> None:
    args = lib.Config(
        output_dir="ppo", per_device_train_batch_size=4, gradient_accumulation_steps=1, total_episodes=8, bf16=False
    )
    parts = ppo_parts()
    data = Dataset.from_dict({"input_ids": parts["processing_class"](PROMPTS)["input_ids"]})
    before = weights(parts["model"])
    trainer = lib.Trainer(args=args, train_dataset=data, eval_dataset=data.select(range(2)), **parts)
    trainer.train()
    trainer.save_model("ppo")
    assert not unchanged(before, parts["model"]) and os.path.exists("ppo/model.safetensors")


@variant("example-ppo.py", "small change", "text prompts, reward_funcs, estimator='ppo'; no ref_model and value_model")
def ppo_with_text_prompts(lib: Library, folder: Path) -> None:
    args = lib.Config(
        output_dir="ppo",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=2,  # total_episodes / batch
        max_completion_length=53,  # response_length
        estimator="ppo",
        bf16=False,
    )
    parts = ppo_parts()
    before = weights(parts["model"])
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = lib.Trainer(
        args=args,
        processing_class=parts["processing_class"],
        model=parts["model"],
        reward_funcs=parts["reward_model"],
        train_dataset=data,
        eval_dataset=data.select(range(2)),
    )
    trainer.train()
    trainer.save_model("ppo")
    assert not unchanged(before, parts["model"]) and os.path.exists("ppo/model.safetensors")


@part.behavior("example-gspo.py", "examples/scripts/gspo.py")
def gspo(lib: Library, folder: Path) -> None:
    def with_model_init_kwargs(training_args: Any, **kwargs: Any) -> Any:
        training_args.model_init_kwargs = kwargs
        return training_args

    gspo_script(lib, with_model_init_kwargs)


@variant("example-gspo.py", "small change", "training_args = dataclasses.replace(training_args, model_init_kwargs=...)")
def gspo_with_replaced_settings(lib: Library, folder: Path) -> None:
    gspo_script(lib, lambda training_args, **kwargs: replace(training_args, model_init_kwargs=kwargs))


def gspo_script(lib: Library, with_model_init_kwargs: Callable[..., Any]) -> None:
    from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
    from trl.rewards import think_format_reward

    words = f"""--model_name_or_path {policy()} --output_dir gspo --learning_rate 1e-2 --dtype bfloat16
        --max_completion_length 8 --use_peft --lora_target_modules q_proj v_proj --log_completions
        --per_device_train_batch_size 8 --num_generations 8 --importance_sampling_level sequence
        --epsilon 3e-4 --epsilon_high 4e-4 --beta 0.0 --loss_type grpo --gradient_accumulation_steps 2
        --steps_per_generation 8 --max_steps 4 --bf16 False --report_to none"""
    parser = TrlParser((ScriptArguments, lib.grpo.Config, ModelConfig))
    _script_args, training_args, model_args = parser.parse_args_and_config(args=words.split())
    training_args = with_model_init_kwargs(
        training_args,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=getattr(torch, model_args.dtype),
    )
    data = problems()
    trainer = lib.grpo.Trainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=[think_format_reward, length],
        train_dataset=data.select(range(32)),
        eval_dataset=data.select(range(32, 40)),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    before = weights(trainer.model)
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert not unchanged(before, trainer.model) and os.path.exists("gspo/adapter_model.safetensors")


def length(completions: list[Any], **kwargs: Any) -> list[float]:
    """Stand for accuracy_reward, which random models never earn."""
    return [float(len(completion[0]["content"])) for completion in completions]
