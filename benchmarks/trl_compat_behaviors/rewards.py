"""Behaviors of reward functions and reward models: arguments, results, weights and log keys."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from .common import (
    Library,
    Part,
    Recorder,
    base_policy,
    error_of,
    load_reward,
    load_tokenizer,
    logs,
    make,
    printed,
    prompts,
    reward_model,
    scores,
    trained,
    variant,
    variety,
    weights,
)

part = Part("rewards")


@part.behavior("reward-standard", "test_train_reward_func_standard")
def texts(lib: Library, folder: Path) -> None:
    recorder = Recorder(lambda completions, **kwargs: [float(len(completion)) for completion in completions])
    trainer = trained(lib, folder, reward_funcs=recorder)
    assert all(isinstance(text, str) for key in ("prompts", "completions") for text in recorder.all(key))
    lengths = [np.mean([len(text) for text in call["completions"]]) for call in recorder.calls]
    assert logs(trainer) == pytest.approx(lengths)


@part.behavior("reward-conversational-completions", "test_train_reward_func_conversational")
def messages_of_completions(lib: Library, folder: Path) -> None:
    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        contents = [completion[0]["content"] for completion in completions]
        return [float(len(set(content))) for content in contents]

    trained(lib, folder, train_dataset=prompts(conversational=True), reward_funcs=reward)


@part.behavior("reward-conversational-prompts", "docs/grpo: prompts[i][-1]['content']")
def messages_of_prompts(lib: Library, folder: Path) -> None:
    data = prompts(system="Be brief.")

    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        assert [prompt[0] for prompt in prompts] == [{"role": "system", "content": "Be brief."}] * len(prompts)
        assert {prompt[-1]["content"] for prompt in prompts} <= {prompt[-1]["content"] for prompt in data["prompt"]}
        return variety(completions)

    trained(lib, folder, train_dataset=data, reward_funcs=reward)


def reward_func1(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def reward_func2(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


@part.behavior("rewards-several", "test_train_multiple_reward_funcs")
def several(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, reward_funcs=[reward_func1, reward_func2])
    both = zip(logs(trainer, "rewards/reward_func1/mean"), logs(trainer, "rewards/reward_func2/mean"), strict=True)
    assert logs(trainer) == pytest.approx([one + two for one, two in both])


def ones(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def zeros(completions: list[Any], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


@part.behavior("rewards-weights-in-args", "test_reward_metric_reflects_reward_weights")
def weighted(lib: Library, folder: Path) -> None:
    trainer = make(lib, folder, {"reward_weights": [0.7, 0.3]}, reward_funcs=[ones, zeros])
    trainer.train()
    assert logs(trainer) == pytest.approx([0.7, 0.7])


@part.behavior("rewards-sync-and-async", "test_train_sync_and_async_reward_funcs")
def sync_and_async(lib: Library, folder: Path) -> None:
    async def slow(completions: list[Any], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0.01)
        return [0.5] * len(completions)

    trainer = trained(lib, folder, reward_funcs=[reward_func2, slow])
    assert logs(trainer, "rewards/slow/mean") == pytest.approx([0.5, 0.5])
    assert logs(trainer) == pytest.approx([mean + 0.5 for mean in logs(trainer, "rewards/reward_func2/mean")])


@part.behavior("rewards-None-of-one", "test_train_multiple_reward_funcs_with_None_output")
def none_of_one(lib: Library, folder: Path) -> None:
    def sometimes(completions: list[Any], **kwargs: Any) -> list[float | None]:
        return [3.0 if i % 2 else None for i in range(len(completions))]

    trainer = trained(lib, folder, reward_funcs=[reward_func2, sometimes])
    assert logs(trainer, "rewards/sometimes/mean") == pytest.approx([3.0, 3.0]), "the mean is over scored rows"


@part.behavior("rewards-all-None", "test_warning_raised_all_rewards_none")
def all_none(lib: Library, folder: Path) -> None:
    def nothing(completions: list[Any], **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    trainer = make(lib, folder, reward_funcs=nothing)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trainer.model).items())


def logs_scores_of(trainer: Any, recorder: Recorder, folders: dict[str, Any]) -> None:
    """Check logged means against outputs of the reward models for prompt and completion. Runs of one step."""
    trainer.train()
    pairs = zip(recorder.all("prompts"), recorder.all("completions"), strict=True)
    texts = [prompt + completion for prompt, completion in pairs]
    for folder, tokenizer in folders.items():
        mean = logs(trainer, f"rewards/{Path(folder).name}/mean")[0]
        assert mean == pytest.approx(np.mean(scores(folder, texts, tokenizer)), abs=1e-4)


ONE_STEP = {"max_steps": 1}


@part.behavior("reward-model-str-TRL-folder", "test_train")
def model_folder(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    trainer = make(lib, folder, ONE_STEP, model=base_policy(), reward_funcs=[reward_model(), recorder])
    logs_scores_of(trainer, recorder, {reward_model(): None})


@part.behavior("reward-mixed-func-and-model", "test_train_multiple_mixed_reward_funcs")
def function_and_folder(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, reward_funcs=[reward_func2, reward_model()])
    names = [f"rewards/{name}/mean" for name in ("reward_func2", Path(reward_model()).name)]
    assert logs(trainer) == pytest.approx(
        [sum(pair) for pair in zip(*(logs(trainer, name) for name in names), strict=True)]
    )


@part.behavior("reward-model-loaded-own-tokenizer", "test_single_reward_model_with_single_processing_class")
def loaded_model_and_tokenizer(lib: Library, folder: Path) -> None:
    recorder, tokenizer = Recorder(), tiny.tokenizer(300)
    models = [load_reward(reward_model()), recorder]
    trainer = make(
        lib, folder, ONE_STEP, model=base_policy(), reward_funcs=models, reward_processing_classes=[tokenizer, None]
    )
    logs_scores_of(trainer, recorder, {reward_model(): tokenizer})


@part.behavior("reward-model-loaded-no-tokenizer", "RLOOTrainer.__init__")
def loaded_model_alone(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    trainer = make(lib, folder, ONE_STEP, model=base_policy(), reward_funcs=[load_reward(reward_model()), recorder])
    logs_scores_of(trainer, recorder, {reward_model(): None})


@part.behavior("reward_processing_classes-list", "test_correct_reward_processing_classes_list")
def list_of_tokenizers(lib: Library, folder: Path) -> None:
    recorder, one, two = Recorder(), reward_model(), reward_model(2)
    tokenizers = [load_tokenizer(one), tiny.tokenizer(300), None]
    models = [load_reward(one), load_reward(two), recorder]
    trainer = make(
        lib, folder, ONE_STEP, model=base_policy(), reward_funcs=models, reward_processing_classes=tokenizers
    )
    logs_scores_of(trainer, recorder, {one: tokenizers[0], two: tokenizers[1]})


@part.behavior("reward-gets-trainer_state", "test_train_with_reward_func_accessing_trainer_state")
def trainer_state(lib: Library, folder: Path) -> None:
    steps = []

    def reward(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        return variety(completions)

    trained(lib, folder, {"max_steps": 3}, reward_funcs=reward)
    assert steps == [(0, 3), (1, 3), (2, 3)]


LOGGED = {"log_completions": True}


@part.behavior("reward-log_extra", "test_train_reward_func_with_log_extra")
def log_extra(lib: Library, folder: Path, settings: Mapping[str, Any] = LOGGED) -> None:
    def reward(completions: list[Any], log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("verdict", ["fine"] * len(completions))
        return variety(completions)

    with printed() as out:
        trained(lib, folder, settings, reward_funcs=reward)
    assert "verdict" in out.getvalue().lower() and "fine" in out.getvalue(), "the printed table has the column"


variant("reward-log_extra", "small change", "num_completions_to_print, because log_completions alone writes files")(
    partial(log_extra, settings={"log_completions": True, "num_completions_to_print": 3})
)


@part.behavior("reward-log_metric", "test_train_reward_func_with_log_metric")
def log_metric(lib: Library, folder: Path) -> None:
    def reward(completions: list[Any], log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("custom_accuracy", 0.75)
        return variety(completions)

    trainer = trained(lib, folder, reward_funcs=reward)
    assert logs(trainer, "custom_accuracy") == [0.75, 0.75]


@part.behavior("reward-gets-completion_ids", "docs/grpo: completion_ids")
def completion_ids(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    trainer = trained(lib, folder, reward_funcs=recorder)
    decoded = trainer.processing_class.batch_decode(recorder.all("completion_ids"), skip_special_tokens=True)
    assert decoded == recorder.all("completions")


@part.behavior("trl.rewards.think_format_reward", "test_rewards.py; examples/scripts/rloo.py")
def think_format(lib: Library, folder: Path) -> None:
    from trl.rewards import think_format_reward

    trainer = make(lib, folder, reward_funcs=think_format_reward, train_dataset=prompts(conversational=True))
    trainer.train()
    assert logs(trainer, "rewards/think_format_reward/mean") == [0.0, 0.0]


@part.behavior("trl.rewards.get_soft_overlong_punishment", "test_rewards.py")
def overlong(lib: Library, folder: Path) -> None:
    from trl.rewards import get_soft_overlong_punishment

    punish = get_soft_overlong_punishment(
        max_completion_len=6, soft_punish_cache=2
    )  # below the 8 tokens of completions
    trainer = make(lib, folder, reward_funcs=[punish, variety])
    trainer.train()
    assert logs(trainer, "rewards/soft_overlong_punishment_reward/mean")[0] < -0.5


@part.behavior("trl.rewards.get_repetition_penalty_reward", "test_rewards.py")
def repetition(lib: Library, folder: Path) -> None:
    from trl.rewards import get_repetition_penalty_reward

    penalty, recorder = get_repetition_penalty_reward(ngram_size=1), Recorder()
    settings = {"max_completion_length": 32, "max_steps": 1}
    trainer = make(lib, folder, settings, reward_funcs=[penalty, recorder])
    trainer.train()
    expected = np.mean(penalty(completion_ids=recorder.all("completion_ids")))
    assert expected < 0 and logs(trainer, "rewards/repetition_penalty_reward/mean") == pytest.approx([expected])


@part.behavior("trl.rewards.accuracy_reward", "test_rewards.py; examples/scripts/rloo.py")
def accuracy(lib: Library, folder: Path) -> None:
    from trl.rewards import accuracy_reward

    data = prompts(conversational=True, solution=[r"\boxed{4}"] * 4)
    trainer = make(lib, folder, reward_funcs=accuracy_reward, train_dataset=data)
    trainer.train()
    assert logs(trainer, "rewards/accuracy_reward/mean") == [0.0, 0.0]


@part.behavior("log-rewards-NAME-std", "test_train_multiple_reward_funcs_with_weights")
def logged_deviation(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    trainer = trained(lib, folder, reward_funcs=[reward_func2, recorder])
    expected = [np.std([len(set(text)) for text in call["completions"]], ddof=1) for call in recorder.calls]
    assert logs(trainer, "rewards/reward_func2/std") == pytest.approx(expected, rel=1e-3)


@part.behavior("reward-partial-object-lambda", "user code")
def callables(lib: Library, folder: Path) -> None:
    class Brevity:
        def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
            return [-float(len(completion)) for completion in completions]

    def scaled(completions: list[Any], scale: float, **kwargs: Any) -> list[float]:
        return [scale * reward for reward in variety(completions)]

    functions = [partial(scaled, scale=2.0), Brevity(), lambda completions, **kwargs: variety(completions)]
    trainer = trained(lib, folder, reward_funcs=functions)
    assert "rewards/scaled/mean" in trainer.state.log_history[0]
    assert "rewards/Brevity/mean" in trainer.state.log_history[0]


@part.behavior("reward-returns-tensor-or-numpy", "user code")
def arrays(lib: Library, folder: Path) -> None:
    def tensor(completions: list[Any], **kwargs: Any) -> Any:
        return torch.tensor(variety(completions))

    def array(completions: list[Any], **kwargs: Any) -> Any:
        return np.array(variety(completions), dtype=np.float32)

    trainer = trained(lib, folder, reward_funcs=[tensor, array])
    assert logs(trainer, "rewards/tensor/mean") == pytest.approx(logs(trainer, "rewards/array/mean"))


@part.behavior("reward-wrong-count-is-told", "RLOOTrainer._calculate_rewards")
def wrong_count(lib: Library, folder: Path) -> None:
    def short(completions: list[Any], **kwargs: Any) -> list[float]:
        return [1.0]

    message = error_of(lambda: make(lib, folder, reward_funcs=short).train())
    assert "short" in message and "1" in message and "3" in message
