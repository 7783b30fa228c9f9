"""Behaviors of TRL's settings for batches, rewards, advantages and losses; each check is about an effect."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from .common import (
    Library,
    Part,
    Recorder,
    impossible,
    load,
    load_tokenizer,
    logs,
    make,
    optimizer_steps,
    prompts,
    trained,
    unchanged,
    variant,
    variety,
    weights,
    with_estimator,
)

part = Part("settings")


def moves(lib: Library, folder: Path, settings: dict[str, Any], **given: Any) -> bool:
    """Tell whether a run without a KL penalty moves the weights."""
    trainer = make(lib, folder, {"beta": 0.0, "max_steps": 1} | settings, **given)
    before = weights(trainer.model)
    trainer.train()
    return not unchanged(before, trainer.model)


def rewards_from(start: float) -> Any:
    """Return a reward function that scores the completions of a step ``start``, ``start + 1``, ..."""

    def counting(completions: list[Any], **kwargs: Any) -> list[float]:
        return [start + i for i in range(len(completions))]

    return counting


@part.behavior("reward_clip_range", "test_train_with_clipped_rewards")
def clipped_rewards(lib: Library, folder: Path) -> None:
    settings = {"reward_clip_range": (-1.0, 1.0)}
    assert not moves(lib, folder / "above", settings, reward_funcs=rewards_from(5))
    assert not moves(lib, folder / "below", settings, reward_funcs=rewards_from(-9))
    assert moves(lib, folder / "within", settings, reward_funcs=rewards_from(-1))


@part.behavior("reward_clip_range-asymmetric", "RLOOConfig.reward_clip_range")
def clipped_on_one_side(lib: Library, folder: Path) -> None:
    settings = {"reward_clip_range": (0.0, 9.0)}
    assert not moves(lib, folder / "below", settings, reward_funcs=rewards_from(-5))
    assert moves(lib, folder / "within", settings, reward_funcs=rewards_from(5))


def second_gradient(lib: Library, folder: Path, beta: float) -> float:
    calls = []

    def equal_from_the_second_call(completions: list[Any], **kwargs: Any) -> list[float]:
        calls.append(1)
        return variety(completions) if len(calls) == 1 else [1.0] * len(completions)

    return logs(trained(lib, folder, {"beta": beta}, reward_funcs=equal_from_the_second_call), "grad_norm")[1]


@part.behavior("beta-0", "test_train_beta_zero")
def no_reference(lib: Library, folder: Path) -> None:
    # Once the policy has moved, equal rewards have a gradient only through the KL penalty.
    assert second_gradient(lib, folder / "without", 0.0) == pytest.approx(0, abs=1e-6)
    assert second_gradient(lib, folder / "with", 0.5) > 1e-3


@part.behavior("beta-positive-kl-logged", "test_train_beta_non_zero")
def kl_logged(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"beta": 0.1, "max_steps": 3})
    kl = logs(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-4) and kl[-1] > 1e-3


@part.behavior("num_iterations-2", "test_train_multiple_iterations")
def two_updates_per_rollout(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    with optimizer_steps() as steps:
        trained(lib, folder, {"num_iterations": 2, "max_steps": 4}, reward_funcs=recorder)
    assert len(steps) == 4 and len(recorder.calls) == 2


@part.behavior("num_generations-above-device-batch", "test_train_num_generations_larger_than_batch_size")
def group_over_two_batches(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    settings = {"num_generations": 6, "gradient_accumulation_steps": 2}
    trained(lib, folder, settings, reward_funcs=recorder)
    assert [len(call["prompts"]) for call in recorder.calls] == [6, 6]
    assert all(len(set(call["prompts"])) == 1 for call in recorder.calls)


@part.behavior("gradient_accumulation_steps", "TrainingArguments")
def accumulation(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    with optimizer_steps() as steps:
        trained(lib, folder, {"gradient_accumulation_steps": 2}, reward_funcs=recorder)
    assert len(steps) == 2
    assert len(recorder.all("prompts")) == 12, "two batches of three completions per step"


def one_rollout_for_four_steps(lib: Library, folder: Path, settings: dict[str, int]) -> None:
    recorder = Recorder()
    with optimizer_steps() as steps:
        trained(lib, folder, {"max_steps": 4} | settings, reward_funcs=recorder)
    assert len(steps) == 4
    assert [len(call["prompts"]) for call in recorder.calls] == [12]


for id, settings in {
    "steps_per_generation": {"steps_per_generation": 4},
    "generation_batch_size": {"generation_batch_size": 12},
}.items():
    part.behavior(id, "test_prepare_input_called_with_correct_data; examples/scripts/rloo.py")(
        partial(one_rollout_for_four_steps, settings=settings)
    )


TWO_PROMPTS = {"per_device_train_batch_size": 6, "max_steps": 1, "beta": 0.0}


def gradient(lib: Library, folder: Path, settings: dict[str, Any], all: float = 1, first: float = 1) -> float:
    """Return the gradient's norm at the first step for rewards times ``all``, those of one prompt also times ``first``."""
    chosen = prompts(2)["prompt"][0]

    def scaled(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        rewards = zip(prompts, variety(completions), strict=True)
        return [all * reward * (first if prompt == chosen else 1) for prompt, reward in rewards]

    name = f"{all}-{first}-{abs(hash(str(settings)))}"
    trainer = make(lib, folder / name, TWO_PROMPTS | settings, reward_funcs=scaled, train_dataset=prompts(2))
    trainer.train()
    return logs(trainer, "grad_norm")[0]


def near(value: float) -> Any:
    return pytest.approx(value, rel=0.02)


@part.behavior("normalize_advantages", "test_train_with_normalized_advantages")
def normalized(lib: Library, folder: Path) -> None:
    on = {"normalize_advantages": True}
    assert gradient(lib, folder, on, all=100) == near(gradient(lib, folder, on))
    off = {"normalize_advantages": False}
    assert gradient(lib, folder, off, all=100) == near(100 * gradient(lib, folder, off))


@part.behavior("scale_rewards-group", "test_train_scale_rewards")
def scale_by_group(lib: Library, folder: Path) -> None:
    group = {"scale_rewards": "group"}
    assert gradient(lib.grpo, folder, group, first=100) == near(gradient(lib.grpo, folder, group))


@part.behavior("scale_rewards-batch", "test_train_scale_rewards")
def scale_by_batch(lib: Library, folder: Path) -> None:
    batch = {"scale_rewards": "batch"}
    norm = gradient(lib.grpo, folder, batch)
    assert gradient(lib.grpo, folder, batch, all=100) == near(norm)
    assert gradient(lib.grpo, folder, batch, first=100) != near(norm)


@part.behavior("scale_rewards-none", "test_train_scale_rewards")
def no_scale(lib: Library, folder: Path) -> None:
    none = {"scale_rewards": "none"}
    assert gradient(lib.grpo, folder, none, all=100) == near(100 * gradient(lib.grpo, folder, none))


for id, check, estimator in (
    ("normalize_advantages", normalized, "rloo"),
    ("scale_rewards-group", scale_by_group, "grpo"),
    ("scale_rewards-batch", scale_by_batch, "grpo"),
    ("scale_rewards-none", no_scale, "grpo"),
):
    variant(id, "small change", f'estimator="{estimator}", which TRL chooses by the class')(
        lambda lib, folder, check=check, estimator=estimator: check(with_estimator(lib, estimator), folder)
    )


def ends_early() -> dict[str, Any]:
    """Return a model that ends a completion with one token in eight, and its tokenizer."""
    model = load()
    model.generation_config.eos_token_id = list(range(100, 140))
    return {"model": model, "processing_class": load_tokenizer()}


def loss_type_result(lib: Library, folder: Path, loss_type: str, **settings: Any) -> dict[str, torch.Tensor]:
    """Return the weights after two steps of two prompts, off-policy in the second half, from the same samples."""
    settings |= {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    settings |= TWO_PROMPTS | {"loss_type": loss_type, "num_iterations": 2, "max_steps": 2}
    torch.manual_seed(0)
    trainer = trained(lib, folder / loss_type, settings, train_dataset=prompts(2), **ends_early())
    return weights(trainer.model)


def loss_type_trains(lib: Library, folder: Path, loss_type: str, differs: bool) -> None:
    result = loss_type_result(lib.grpo, folder, loss_type)
    if differs:  # the others equal dapo for one device and one micro-batch
        dapo = loss_type_result(lib.grpo, folder, "dapo")
        assert any(not torch.allclose(tensor, dapo[name], atol=1e-3) for name, tensor in result.items())


for loss_type in ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"):
    differs = loss_type not in ("bnpo", "dapo")
    part.behavior(f"loss_type-{loss_type}", "test_train_loss_types")(
        partial(loss_type_trains, loss_type=loss_type, differs=differs)
    )


@part.behavior("epsilon-epsilon_high", "GRPOConfig")
def clip_range(lib: Library, folder: Path) -> None:
    settings = {"num_iterations": 2, "max_steps": 4, "learning_rate": 0.01}
    narrow = settings | {"epsilon": 0.01, "epsilon_high": 0.02}
    assert max(logs(trained(lib.grpo, folder / "narrow", narrow), "clip_ratio/region_mean")) > 0
    wide = settings | {"epsilon": 0.99, "epsilon_high": 100.0}
    assert max(logs(trained(lib.grpo, folder / "wide", wide), "clip_ratio/region_mean")) == 0


@part.behavior("delta-two-sided-clip", "test_train_delta_clipping")
def two_sided_clip(lib: Library, folder: Path) -> None:
    results = []
    for delta in (1.25, 100.0):  # ratios above it have no gradient even for negative advantages
        settings = TWO_PROMPTS | {"delta": delta, "num_iterations": 2, "max_steps": 2}
        trainer = trained(lib.grpo, folder / str(delta), settings, train_dataset=prompts(2))
        results.append(weights(trainer.model))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


@part.behavior(
    "importance_sampling_level-sequence", "test_train_sequence_importance_sampling; examples/scripts/gspo.py"
)
def sequence_ratios(lib: Library, folder: Path) -> None:
    results = []
    for level in ("sequence", "token"):
        settings = TWO_PROMPTS | {"importance_sampling_level": level, "loss_type": "grpo", "num_iterations": 2}
        trainer = trained(lib.grpo, folder / level, settings | {"max_steps": 2}, train_dataset=prompts(2))
        results.append(weights(trainer.model))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


@part.behavior("multi_objective-normalize_then_sum", "test_train_normalize_then_sum_aggregation")
def normalize_then_sum(lib: Library, folder: Path) -> None:
    norms = []
    for scale in (1, 100):

        def scaled(completions: list[str], scale: int = scale, **kwargs: Any) -> list[float]:
            return [scale * reward for reward in variety(completions)]

        def unrelated(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
            return [float(ids[0] % 7) for ids in completion_ids]

        settings = TWO_PROMPTS | {"multi_objective_aggregation": "normalize_then_sum"}
        trainer = make(
            lib.grpo, folder / str(scale), settings, reward_funcs=[scaled, unrelated], train_dataset=prompts(2)
        )
        trainer.train()
        norms += logs(trainer, "grad_norm")
    assert norms[0] == near(norms[1])


variant("multi_objective-normalize_then_sum", "small change", 'estimator="grpo", which TRL chooses by the class')(
    lambda lib, folder: normalize_then_sum(with_estimator(lib, "grpo"), folder)
)


def constant(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


@part.behavior("entropy_coef", "test_train_with_static_entropy")
def entropy_bonus(lib: Library, folder: Path) -> None:
    assert moves(lib.grpo, folder / "with", {"entropy_coef": 0.1}, reward_funcs=constant)
    assert not moves(lib.grpo, folder / "without", {"entropy_coef": 0.0}, reward_funcs=constant)


@part.behavior("top_entropy_quantile", "test_train_with_entropy_filter")
def entropy_filter(lib: Library, folder: Path) -> None:
    all_tokens = gradient(lib.grpo, folder, {"top_entropy_quantile": 1.0})
    assert gradient(lib.grpo, folder, {"top_entropy_quantile": 0.2}) != near(all_tokens)


@part.behavior("off_policy_mask_threshold", "test_train_with_off_policy_mask")
def off_policy_mask(lib: Library, folder: Path) -> None:
    results = []
    for threshold in (1e-9, 1e6):
        settings = TWO_PROMPTS | {"off_policy_mask_threshold": threshold, "num_iterations": 2, "max_steps": 2}
        settings |= {
            "epsilon": 0.99,
            "epsilon_high": 100.0,
            "learning_rate": 1e-3,
        }  # otherwise clipping removes the same sequences
        trainer = trained(lib.grpo, folder / str(threshold), settings, train_dataset=prompts(2))
        results.append(weights(trainer.model))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


impossible("loss_type-vespo", "The loss isn't implemented. Use another loss_type, such as cispo or sapo.")
