"""The learning rate: its default, its warmup and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from reinforcepp.config import ReinforceConfig, RewardModelConfig, SftConfig
from reinforcepp.config.learning_rates import default_learning_rate
from reinforcepp.config.shared import OptimizerConfig
from reinforcepp.errors import ConfigError
from reinforcepp.models.loading import parameter_count
from reinforcepp.runtime.terminal import echo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AnyConfig = TypeVar("AnyConfig", bound=RewardModelConfig | SftConfig | ReinforceConfig)


def with_learning_rate(
    config: AnyConfig, model_config: PreTrainedConfig, started: Mapping[str, Any] | None = None
) -> AnyConfig:
    """Return ``config`` with a learning rate: the given one, or the default, which is printed.

    ``started`` holds the settings at the start of a resumed run, which keeps its learning rate.

    Raises:
        ConfigError: the schedule can't use its arguments.
    """
    config = _with_learning_rate(config, model_config, started)
    kind, arguments = config.lr_scheduler_type, config.schedule_arguments
    schedule_factor(kind, warmup=0, steps=1, peak=config.peak_learning_rate, arguments=arguments)
    return config


def _with_learning_rate(
    config: AnyConfig, model_config: PreTrainedConfig, started: Mapping[str, Any] | None
) -> AnyConfig:
    if config.learning_rate is not None:
        return config
    if started is not None:
        rate = float(started["learning_rate"])
        echo(f"Learning rate {rate:g}, as at the start of the run.")
        return replace(config, learning_rate=rate)
    count = parameter_count(model_config)
    rate = default_learning_rate(config.TRAINING, count, lora=config.use_peft)
    kind = "LoRA" if config.use_peft else "full"
    echo(f"Learning rate {rate:g}: the default for {kind} training of {_millions(count)} million parameters.")
    return replace(config, learning_rate=rate)


def _millions(count: int) -> str:
    """Return a number of parameters in millions, with two digits or more."""
    return f"{count / 1e6:,.0f}" if count >= 1e7 else f"{count / 1e6:.2g}"


def make_scheduler(optimizer: Optimizer, config: OptimizerConfig, steps: int) -> LambdaLR:
    """Return the learning rate schedule of ``optimizer`` over ``steps`` optimizer steps; see :func:`schedule_factor`."""
    factor = schedule_factor(
        config.lr_scheduler_type,
        warmup=config.warmup_of(steps),
        steps=steps,
        peak=optimizer.defaults["lr"],
        arguments=config.schedule_arguments,
    )
    return LambdaLR(optimizer, factor)


def schedule_factor(
    kind: str, *, warmup: int, steps: int, peak: float = 1.0, arguments: Mapping[str, Any] | None = None
) -> Callable[[int], float]:
    """Return the factor on the ``peak`` learning rate as a function of the optimizer step, counted from 0.

    It is that of ``transformers.get_scheduler``, except that the warmup also applies to ``constant``, and that a warmup which
    would start at 0 is one step further: it rises from 1 / (warmup + 1), so that no step is made at learning rate 0.

    Args:
        kind: name of the schedule in transformers.
        warmup: optimizer steps of the warmup.
        steps: optimizer steps of the training.
        peak: learning rate to which absolute rates in ``arguments`` are related.
        arguments: of the schedule.

    Raises:
        ConfigError: the schedule doesn't have these arguments.
    """
    from transformers import get_scheduler

    def factor_with(warmup: int) -> Callable[[int], float]:
        unused = torch.optim.SGD([torch.zeros(1)], lr=peak)
        name = "constant_with_warmup" if kind == "constant" else kind
        try:
            scheduler = get_scheduler(name, unused, warmup, max(steps, warmup + 1), dict(arguments or {}))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"lr_scheduler_kwargs: {kind} can't use {dict(arguments or {})} ({error}).") from None
        return cast(Callable[[int], float], scheduler.lr_lambdas[0])

    after = factor_with(warmup)
    rising = factor_with(warmup + 1) if after(0) == 0 else None

    def factor(step: int) -> float:
        step = min(step, steps)  # a cosine would rise again
        return rising(step + 1) if rising is not None and step < warmup else after(step)

    return factor
