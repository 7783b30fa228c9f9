"""Behaviors of the trainer object: LoRA, callbacks, state, evaluation, saving, resuming, subclasses and logs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hub
import pytest
import tiny
import torch
from datasets import DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from .common import (
    PROMPTS,
    SETTINGS,
    Library,
    Part,
    Recorder,
    base_policy,
    error_of,
    impossible,
    load,
    load_reward,
    load_tokenizer,
    logs,
    make,
    policy,
    printed,
    prompts,
    reads_prompts,
    reward_model,
    same_outputs,
    train,
    trained,
    unchanged,
    variant,
    variety,
    weights,
)

part = Part("trainer")


def only_adapter_moves(trainer: Any, words: tuple[str, ...] = ("lora_",)) -> None:
    """Train; the tensors whose names contain one of ``words`` must change, and no other."""
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved and all(any(word in name for word in words) for name in moved), moved


@part.behavior("peft_config", "test_train_peft_config; examples/scripts/rloo.py")
def peft_config(lib: Library, folder: Path) -> None:
    trainer = make(lib, folder, peft_config=LoraConfig())
    only_adapter_moves(trainer)
    trainer.save_model(folder / "adapter")
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


@part.behavior("peft_config-with-loaded-model", "test_train_peft_config")
def peft_config_and_loaded_model(lib: Library, folder: Path) -> None:
    only_adapter_moves(make(lib, folder, model=load(), peft_config=LoraConfig()))


@part.behavior("PeftModel-given", "test_train_peft_model")
def peft_model(lib: Library, folder: Path) -> None:
    only_adapter_moves(make(lib, folder, model=get_peft_model(load(), LoraConfig())))


@part.behavior("peft-modules_to_save-rank-pattern", "LoraConfig(modules_to_save=..., rank_pattern=...)")
def peft_details(lib: Library, folder: Path) -> None:
    trains_details(make(lib, folder, peft_config=detailed_adapter()))


@variant(
    "peft-modules_to_save-rank-pattern", "small change", "model=get_peft_model(model, peft_config), with its tokenizer"
)
def peft_details_of_given_model(lib: Library, folder: Path) -> None:
    model = get_peft_model(load(), detailed_adapter())
    trains_details(make(lib, folder, model=model, processing_class=load_tokenizer()))


def detailed_adapter() -> LoraConfig:
    return LoraConfig(target_modules=r".*\.(q|v)_proj", modules_to_save=["lm_head"], rank_pattern={"v_proj": 2})


def trains_details(trainer: Any) -> None:
    only_adapter_moves(trainer, ("lora_", "modules_to_save"))
    ranks = {name: tensor.shape[0] for name, tensor in weights(trainer.model).items() if "lora_A" in name}
    assert all(rank == (2 if "v_proj" in name else 8) for name, rank in ranks.items())
    assert not any("k_proj" in name for name in ranks)


@part.behavior("peft-and-gradient_checkpointing", "test_train_peft_with_gradient_checkpointing")
def peft_and_checkpointing(lib: Library, folder: Path) -> None:
    only_adapter_moves(make(lib, folder, {"gradient_checkpointing": True}, peft_config=LoraConfig()))


class Watcher(TrainerCallback):
    """Keep the events and the step at which each occurred."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.logged: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert kwargs["model"] is not None and args.max_steps == state.max_steps
        self.events.append(("train_begin", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("step_end", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.logged.append(dict(logs or {}))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        assert metrics["eval_reward"] > 0
        self.events.append(("evaluate", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("save", state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("train_end", state.global_step))


@part.behavior("callbacks", "callbacks=[...] of every TRL trainer")
def callbacks(lib: Library, folder: Path) -> None:
    watcher = Watcher()
    settings = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    trained(lib, folder, settings, callbacks=[watcher], eval_dataset=prompts(1))
    expected = ["train_begin 0", "step_end 1", "step_end 2", "evaluate 2", "save 2", "train_end 2"]
    assert [f"{name} {step}" for name, step in watcher.events] == expected
    assert any("rewards/variety/mean" in entry for entry in watcher.logged)


@part.behavior("add_callback", "Trainer.add_callback")
def add_callback(lib: Library, folder: Path) -> None:
    trainer, watcher = make(lib, folder), Watcher()
    trainer.add_callback(watcher)
    train(trainer)
    assert ("step_end", 2) in watcher.events


@part.behavior("callback-stops-training", "control.should_training_stop")
def stopped_by_callback(lib: Library, folder: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    recorder = Recorder()
    trainer = trained(lib, folder, {"max_steps": 5}, callbacks=[Stop()], reward_funcs=recorder)
    assert trainer.state.global_step == 2 and len(recorder.calls) == 2


@part.behavior("optimizers-arg", "RLOOTrainer.__init__")
def own_optimizer(lib: Library, folder: Path) -> None:
    steps = []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            steps.append(self.param_groups[0]["lr"])
            return super().step(closure)

    model = load()
    optimizer = Counting(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trained(lib, folder, {"max_steps": 3}, model=model, optimizers=(optimizer, schedule))
    assert steps == pytest.approx([0.5, 0.25, 0.125])


@part.behavior("state.log_history", "all tests")
def log_history(lib: Library, folder: Path) -> None:
    history = trained(lib, folder).state.log_history
    assert all({"loss", "grad_norm", "learning_rate", "epoch", "step"} <= set(entry) for entry in history[:2])
    assert [entry["step"] for entry in history] == [1, 2, 2]
    assert {"train_loss", "train_runtime"} <= set(history[-1])


@part.behavior("trainer.model", "all tests")
def model_of_trainer(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder)
    assert isinstance(trainer.model, torch.nn.Module) and trainer.model.config.model_type == "llama"


@part.behavior("trainer.args", "all tests")
def args_of_trainer(lib: Library, folder: Path) -> None:
    trainer = make(lib, folder)
    assert isinstance(trainer.args, lib.Config) and trainer.args.learning_rate == 0.1
    assert trainer.args.per_device_train_batch_size == 3 and trainer.args.output_dir == str(folder / "run")


@part.behavior("trainer.processing_class", "RewardTrainer tests")
def tokenizer_of_trainer(lib: Library, folder: Path) -> None:
    assert make(lib, folder).processing_class("a route")["input_ids"] == load_tokenizer()("a route")["input_ids"]


@part.behavior("trainer.train_dataset", "TRL tests")
def dataset_of_trainer(lib: Library, folder: Path) -> None:
    trainer = make(lib, folder)
    assert len(trainer.train_dataset) == 4 and trainer.train_dataset[0]["prompt"] == PROMPTS[0]


@part.behavior("trainer.ref_model", "test_train_with_sync_ref_model")
def reference_of_trainer(lib: Library, folder: Path) -> None:
    trainer = make(lib, folder, {"beta": 0.1})
    assert trainer.ref_model is not trainer.model and same_outputs(trainer.ref_model, trainer.model)
    before = weights(trainer.ref_model)
    train(trainer)
    assert unchanged(before, trainer.ref_model)


@part.behavior("evaluate-returns-metrics", "test_evaluate_with_eval_dataset; examples/scripts/reward_modeling.py")
def evaluate(lib: Library, folder: Path) -> None:
    trainer = make(lib, folder, {"per_device_eval_batch_size": 3}, eval_dataset=prompts(2))
    metrics = trainer.evaluate()
    wanted = "loss", "runtime", "reward", "reward_std", "rewards/variety/mean", "completions/mean_length"
    assert {f"eval_{name}" for name in wanted} <= set(metrics), metrics
    assert metrics["eval_reward"] == metrics["eval_rewards/variety/mean"] > 0


@variant("evaluate-returns-metrics", "small change", "read eval_reward: there is no eval_loss")
def evaluate_without_loss(lib: Library, folder: Path) -> None:
    metrics = make(lib, folder, eval_dataset=prompts(2)).evaluate()
    wanted = "reward", "reward_std", "rewards/variety/mean", "completions/mean_length"
    assert {f"eval_{name}" for name in wanted} <= set(metrics), metrics
    assert metrics["eval_reward"] == metrics["eval_rewards/variety/mean"] > 0


@part.behavior("evaluate-other-dataset", "test_evaluate_with_eval_dataset")
def evaluate_other(lib: Library, folder: Path) -> None:
    recorder, other = Recorder(), prompts(8).select(range(5, 8))
    settings = {"per_device_eval_batch_size": 3}
    trainer = make(lib, folder, settings, reward_funcs=recorder, train_dataset=prompts(4))
    metrics = trainer.evaluate(eval_dataset=other)
    assert set(recorder.all("prompts")) == set(other["prompt"]) and metrics["eval_reward"] > 0


@part.behavior("save_model-dir-and-reload", "examples")
def save_and_reload(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder)
    trainer.save_model(str(folder / "saved"))
    assert same_outputs(load(str(folder / "saved")), trainer.model)
    assert load_tokenizer(str(folder / "saved")).get_vocab() == load_tokenizer().get_vocab()


@part.behavior("save_model-no-argument", "Trainer.save_model")
def save_to_output_dir(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder)
    trainer.save_model()
    assert same_outputs(load(str(folder / "run")), trainer.model)


@cache
def hub_server() -> hub.Hub:
    """Start a server on this machine, once, because Hub clients remember its address."""
    server = hub.Hub()
    server.tokens["hf_test"] = "me"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@contextlib.contextmanager
def local_hub() -> Iterator[hub.Hub]:
    """Use a local server instead of the Hugging Face Hub."""
    from huggingface_hub import constants, hf_api

    server = hub_server()
    os.environ["HF_TOKEN"] = "hf_test"
    with (
        patch.object(constants, "ENDPOINT", server.url),
        patch.object(hf_api.api, "endpoint", server.url),
        patch.object(constants, "HF_HUB_OFFLINE", False),
    ):
        yield server


@part.behavior("push_to_hub", "examples")
def push_to_hub(lib: Library, folder: Path) -> None:
    with local_hub() as server:
        trainer = trained(lib, folder, {"hub_model_id": "me/routes"})
        trainer.push_to_hub(dataset_name="prompts")
    files = server.repos["me/routes"]["files"]
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= set(files), set(files)


def pushed_by_command(trainer: Any, folder: Path, repo: str) -> None:
    """Save the model and upload it with ``reinforcepp push``."""
    from reinforcepp.commands.cli import main

    trainer.save_model(folder)
    assert main(["push", "--model", str(folder), "--repo", repo]) == 0


@variant("push_to_hub", "small change", "trainer.save_model(FOLDER), and reinforcepp push --model FOLDER --repo NAME")
def push_with_the_command(lib: Library, folder: Path) -> None:
    with local_hub() as server:
        pushed_by_command(trained(lib, folder), folder / "saved", "me/saved")
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= set(server.repos["me/saved"]["files"])


@part.behavior("resume_from_checkpoint-True", "Trainer.train")
def resume(lib: Library, folder: Path, kept: Mapping[str, int] = {}) -> None:
    settings = {"save_steps": 1, "lr_scheduler_type": "constant", **kept}
    first = trained(lib, folder, settings | {"max_steps": 2}, reward_funcs=Recorder())
    saved = weights(first.model)
    recorder = Recorder()
    second, seen = make(lib, folder, settings | {"max_steps": 4}, reward_funcs=recorder), {}

    class FirstStep(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            seen.update(weights(model), step=state.global_step)

    second.add_callback(FirstStep())
    second.train(resume_from_checkpoint=True)
    assert seen.pop("step") == 2 and all(torch.equal(saved[name], tensor) for name, tensor in seen.items())
    assert second.state.global_step == 4 and len(recorder.calls) == 2
    assert [entry["step"] for entry in second.state.log_history if "reward" in entry] == [1, 2, 3, 4]


@variant(
    "resume_from_checkpoint-True", "small change", "save_total_limit in the first run, which keeps its last checkpoints"
)
def resume_with_kept_checkpoints(lib: Library, folder: Path) -> None:
    resume(lib, folder, {"save_total_limit": 2})


@part.behavior("train-returns-TrainOutput", "out.training_loss, out.metrics")
def train_output(lib: Library, folder: Path) -> None:
    out = make(lib, folder).train()
    assert out.global_step == 2 and isinstance(out.training_loss, float)
    assert {"train_runtime", "train_loss", "train_steps_per_second"} <= set(out.metrics)


@part.behavior("same-output_dir-twice", "running a script again")
def again_into_the_same_folder(lib: Library, folder: Path) -> None:
    trained(lib, folder)
    trainer = trained(lib, folder)
    assert trainer.state.global_step == 2 and len(logs(trainer)) == 2, "trained from the start"


@variant("same-output_dir-twice", "small change", "overwrite=True, because nothing of a run is deleted otherwise")
def again_with_overwrite(lib: Library, folder: Path) -> None:
    trained(lib, folder)
    trainer = trained(lib, folder, {"overwrite": True})
    assert trainer.state.global_step == 2 and len(logs(trainer)) == 2


@part.behavior("train-called-twice", "notebooks")
def train_twice(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder)
    train(trainer)


@variant("train-called-twice", "small change", "a second trainer with model=trainer.model")
def second_trainer(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder)
    train(make(lib, folder / "more", model=trainer.model, processing_class=trainer.processing_class))


@part.behavior("generate-after-train-with-trainer.model", "notebooks")
def generate(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder)
    inputs = trainer.processing_class(PROMPTS[0], return_tensors="pt").to(trainer.model.device)
    ids = trainer.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > inputs["input_ids"].shape[1] and trainer.processing_class.decode(ids[0])


@part.behavior("two-trainers-in-one-process", "notebooks, sweeps")
def two_trainers(lib: Library, folder: Path) -> None:
    one, two = make(lib, folder / "one"), make(lib, folder / "two", {"learning_rate": 0.01})
    train(one)
    train(two)
    assert not all(torch.equal(tensor, two.model.get_parameter(name)) for name, tensor in weights(one.model).items())


@part.behavior("train-in-a-thread", "notebooks, services")
def in_a_thread(lib: Library, folder: Path) -> None:
    finished = []
    thread = threading.Thread(target=lambda: finished.append(trained(lib, folder)))
    thread.start()
    thread.join()
    assert finished[0].state.global_step == 2


@part.behavior("subclass-_calculate_rewards", "user code that overrides")
def overridden_rewards(lib: Library, folder: Path) -> None:
    class Raised(lib.Trainer):
        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list) + 10

    args = lib.Config(output_dir=str(folder / "run"), **SETTINGS)
    recorder = Recorder()
    trainer = Raised(policy(), recorder, args, prompts())
    trainer.train()
    means = [sum(variety(call["completions"])) / 3 for call in recorder.calls]
    assert logs(trainer) == pytest.approx([mean + 10 for mean in means])


@variant("subclass-_calculate_rewards", "small change", "the change of the rewards goes into the reward function")
def rewards_changed_in_the_function(lib: Library, folder: Path) -> None:
    recorder = Recorder(lambda completions, **kwargs: [reward + 10 for reward in variety(completions)])
    trainer = trained(lib, folder, reward_funcs=recorder)
    means = [sum(variety(call["completions"])) / 3 for call in recorder.calls]
    assert logs(trainer) == pytest.approx([mean + 10 for mean in means])


@part.behavior("subclass-compute_loss", "user code that overrides")
def overridden_loss(lib: Library, folder: Path) -> None:
    class Nothing(lib.Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return 0 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = Nothing(policy(), variety, lib.Config(output_dir=str(folder / "run"), **SETTINGS), prompts())
    before = weights(trainer.model)
    trainer.train()
    assert unchanged(before, trainer.model) and logs(trainer, "grad_norm") == [0, 0]


@part.behavior("rollout_func", "test_generate_prefers_rollout_func")
def rollout_function(lib: Library, folder: Path) -> None:
    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        encode = trainer.processing_class
        answers = [[5, 6, 7 + i] for i in range(len(prompts))]
        ids = [encode(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": [[-5.0] * 3 for _ in answers]}

    recorder = Recorder(lambda completions, **kwargs: [float(i) for i in range(len(completions))])
    train(make(lib.grpo, folder, rollout_func=rollouts, reward_funcs=recorder))
    assert all(ids[:2] == [5, 6] for ids in recorder.all("completion_ids"))


def qwen3_template() -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()


@part.behavior("tools", "test_train_with_tools")
def tools(lib: Library, folder: Path) -> None:
    def ping(host: str) -> str:
        """Ping a host.

        Args:
            host: Name of the host.

        Returns:
            The loss in percent.
        """
        return "0"

    data, model = prompts(conversational=True), policy(template=qwen3_template())
    trainer = train(make(lib.grpo, folder, model=model, train_dataset=data, tools=[ping], reward_funcs=variety))
    assert logs(trainer, "tools/call_frequency") == [0, 0]


@part.behavior("environment_factory", "test_train_with_environment_factory")
def environment(lib: Library, folder: Path) -> None:
    started = []

    class Counter:
        def reset(self, **kwargs: Any) -> None:
            started.append(self)

        def increment(self, step: int) -> int:
            """Increment the counter.

            Args:
                step: Value to add.

            Returns:
                The new value.
            """
            return step

    data, model = prompts(conversational=True), policy(template=qwen3_template())
    train(make(lib.grpo, folder, model=model, train_dataset=data, environment_factory=Counter))
    assert len(started) >= 6


@part.behavior("log_completions-shown", "log_completions=True prints a table")
def completions_printed(lib: Library, folder: Path) -> None:
    with printed() as out:
        trained(lib, folder, {"log_completions": True, "num_completions_to_print": 2})
    assert any(prompt in out.getvalue() for prompt in PROMPTS) and "variety" in out.getvalue()


@part.behavior("model-card-written", "BaseTrainer.create_model_card")
def model_card(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"save_steps": 1})
    assert (folder / "run" / "README.md").exists(), "saving a checkpoint writes the card"
    trainer.create_model_card(model_name="Routes", dataset_name="prompts", tags=["networking"])
    text = (folder / "run" / "README.md").read_text()
    assert "Routes" in text and "networking" in text


@variant("model-card-written", "small change", "reinforcepp export --model FOLDER writes the model with a card")
def card_by_command(lib: Library, folder: Path) -> None:
    from reinforcepp.commands.cli import main

    trained(lib, folder)
    assert main(["export", "--model", str(folder / "run"), "--output_dir", str(folder / "export")]) == 0
    assert (folder / "export" / "README.md").exists()


@part.behavior("log_metrics-save_metrics-save_state", "examples/scripts/reward_modeling.py")
def metrics_files(lib: Library, folder: Path) -> None:
    trainer = make(lib, folder)
    out = trainer.train()
    trainer.log_metrics("train", out.metrics)
    trainer.save_metrics("train", out.metrics)
    trainer.save_state()
    assert (folder / "run" / "train_results.json").exists() and (folder / "run" / "trainer_state.json").exists()


@part.behavior("trainer.accelerator-is_main_process", "user code under accelerate launch")
def main_process(lib: Library, folder: Path) -> None:
    trainer = make(lib, folder)
    assert trainer.accelerator.is_main_process and trainer.accelerator.num_processes == 1


@part.behavior("positional-arguments", "RLOOTrainer.__init__")
def positional(lib: Library, folder: Path) -> None:
    args = lib.Config(output_dir=str(folder / "run"), **SETTINGS)
    train(lib.Trainer(policy(), variety, args, prompts()))


@part.behavior("positional-7th-argument", "RLOOTrainer.__init__")
def positional_reward_tokenizer(lib: Library, folder: Path) -> None:
    args = lib.Config(output_dir=str(folder / "run"), **SETTINGS)
    model = load_reward(reward_model())
    train(lib.Trainer(policy(), model, args, prompts(), None, load_tokenizer(), load_tokenizer(reward_model())))


KEYS = """
loss grad_norm learning_rate epoch step num_tokens step_time reward reward_std frac_reward_zero_std kl entropy
rewards/variety/mean rewards/variety/std
completions/mean_length completions/min_length completions/max_length completions/clipped_ratio
completions/mean_terminated_length completions/min_terminated_length completions/max_terminated_length
clip_ratio/low_mean clip_ratio/low_min clip_ratio/high_mean clip_ratio/high_max clip_ratio/region_mean
"""


@part.behavior("metrics-keys-as-TRL's", "dashboards")
def metric_keys(lib: Library, folder: Path) -> None:
    entry = trained(lib, folder, {"beta": 0.1}).state.log_history[0]
    missing = set(KEYS.split()) - set(entry)
    assert not missing, sorted(missing)


@part.behavior("use_vllm", "examples/scripts/rloo.py", not_on_trl="TRL 1.16 doesn't support vLLM 0.32 on CPUs")
def vllm(lib: Library, folder: Path) -> None:
    settings = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
    model = str(tiny.save(folder / "model", "llama"))
    trainer = trained(lib, folder, settings | {"learning_rate": 1e-3}, model=model)
    assert trainer.args.use_vllm and "vllm" in type(trainer.engine).__name__.lower()


@part.behavior("output_dir-as-Path", "TrainingArguments(output_dir=Path(...))")
def path(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"output_dir": folder / "elsewhere"})
    trainer.save_model()
    assert (folder / "elsewhere" / "config.json").exists()


@part.behavior("train_dataset-is-DatasetDict", "load_dataset without split")
def no_split(lib: Library, folder: Path) -> None:
    splits = DatasetDict(train=prompts(), test=prompts())
    assert "DatasetDict" in error_of(lambda: make(lib, folder, train_dataset=splits))


@part.behavior("long-prompt-kept-whole", "TRL 1.x has no max_prompt_length")
def long_prompt(lib: Library, folder: Path) -> None:
    data, tokenizer = prompts(1), load_tokenizer()
    data = data.map(lambda row: {"prompt": row["prompt"] * 15})
    expected = [tokenizer(text)["input_ids"] for text in data["prompt"]]
    assert len(expected[0]) > 100
    reads_prompts(lib, folder, data, expected, model=base_policy())


@part.behavior("tokenizer-not-changed", "two trainers with one tokenizer")
def tokenizer_kept(lib: Library, folder: Path) -> None:
    tokenizer = load_tokenizer()
    template, side, ids = tokenizer.chat_template, tokenizer.padding_side, tokenizer(PROMPTS)["input_ids"]
    for name in ("one", "two"):
        trained(lib, folder / name, processing_class=tokenizer)
    assert (tokenizer.chat_template, tokenizer.padding_side) == (template, side)
    assert tokenizer(PROMPTS)["input_ids"] == ids


@part.behavior("eval-of-all-rows", "evaluate() goes over the whole eval_dataset")
def all_rows(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    settings = {"per_device_eval_batch_size": 3}
    trainer = make(lib, folder, settings, reward_funcs=recorder, train_dataset=prompts(1), eval_dataset=prompts(8))
    trainer.evaluate()
    assert set(recorder.all("prompts")) == set(PROMPTS)


@part.behavior("rollout-default-engine", "use_vllm defaults to False")
def default_engine(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder)
    assert trainer.args.use_vllm is False


impossible(
    "subclass-compute_loss", "The loss is a pure function of the settings, computed in one place. Use loss_type."
)
impossible("rollout_func", "Completions come from an engine. Pass an object with generate() as engine=.")
impossible("tools", "Rollouts are one turn: the trainer runs no tools.")
impossible("environment_factory", "Rollouts are one turn: the trainer runs no environments.")
