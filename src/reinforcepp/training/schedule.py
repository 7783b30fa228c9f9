"""The learning rate: its default, its warmup and its schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from reinforcepp.config import ReinforceConfig, RewardModelConfig, SftConfig
from reinforcepp.config.learning_rates import default_learning_rate
from reinforcepp.models.loading import parameter_count
from reinforcepp.monitoring import echo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AnyConfig = TypeVar("AnyConfig", bound=RewardModelConfig | SftConfig | ReinforceConfig)


def with_learning_rate(
    config: AnyConfig, model_config: PreTrainedConfig, started: Mapping[str, Any] | None = None
) -> AnyConfig:
    """Return ``config`` with a learning rate: the given one, or the default, which is printed.

    ``started`` holds the settings at the start of a resumed run, which keeps its learning rate.
    """
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


def make_scheduler(optimizer: Optimizer, kind: str, *, warmup: int, steps: int) -> LambdaLR:
    """Return the learning rate schedule ``kind`` of ``steps`` optimizer steps; see :func:`share_of_peak`."""
    return LambdaLR(optimizer, partial(share_of_peak, kind=kind, warmup=warmup, steps=steps))


def share_of_peak(step: int, *, kind: str, warmup: int, steps: int) -> float:
    """Return the factor on the peak learning rate at optimizer step ``step`` of ``steps``, counted from 0.

    (step + 1) / (warmup + 1) during the warmup, so that no step has a learning rate of 0. Then, with t the finished share of
    the remaining steps, 1 (``constant``), 1 - t (``linear``) or (1 + cos πt) / 2 (``cosine``).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(1, steps - warmup), 1.0)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind]
