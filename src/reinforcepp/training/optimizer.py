"""The optimizer of a training, built as transformers builds it, or the one that the user gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from reinforcepp.config import ReinforceConfig
from reinforcepp.config.shared import OptimizerConfig
from reinforcepp.errors import ConfigError
from reinforcepp.runtime.terminal import echo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Optimizers: TypeAlias = tuple[torch.optim.Optimizer | None, Any]
"""The user's optimizer and learning rate schedule, or None for those of the settings."""

ADAMW = ("adamw_torch", "adamw_torch_fused")
NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Names of weights without weight decay, as in transformers' Trainer."""
OPTIMIZER_SETTINGS = ("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
"""Settings of the optimizer, by their names in transformers; a given optimizer replaces them."""

OTHER_TENSORS = (
    "the optimizer holds tensors that aren't trainable parameters of the given model. Load the model, create the optimizer "
    "from model.parameters(), and give both."
)


def make_optimizer(model: nn.Module, config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    """Return the optimizer ``config.optim`` of the model's trainable parameters.

    Norms and biases have no weight decay, as in transformers. Without weight decay there is one parameter group.
    """
    from transformers import Trainer

    settings = {name: getattr(config, name) for name in OPTIMIZER_SETTINGS}
    arguments: Any = SimpleNamespace(**settings, learning_rate=learning_rate, optim_args=None)
    optimizer_class, values = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer: torch.optim.Optimizer = optimizer_class(_parameter_groups(model, config.weight_decay), **values)
    return optimizer


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = set(get_parameter_names(model, [nn.LayerNorm], list(NO_DECAY))) if weight_decay else set()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = [[p for name, p in named if (name in decayed) == decays] for decays in (True, False)]
    groups = zip(parts, (weight_decay, 0.0), strict=True)
    return [{"params": part, "weight_decay": decay} for part, decay in groups if part]


def check_optimizers(optimizers: Optimizers, config: ReinforceConfig, *, loaded: bool, sharded: bool) -> None:
    """Check, before models load, that the optimizer of the settings, or the given one, can be used.

    Args:
        optimizers: the user's, if any.
        config: the settings.
        loaded: whether the user gave a loaded model, instead of a name.
        sharded: whether weights are sharded.

    Raises:
        ConfigError: it can't, and why.
    """
    optimizer, scheduler = optimizers
    if optimizer is None:
        if scheduler is not None:
            raise ConfigError("optimizers: a scheduler without its optimizer. Give both, or None for both.")
        if sharded and config.optim not in ADAMW:
            raise ConfigError(
                f"optim: {config.optim} can't be combined with sharded weights (FSDP2, DeepSpeed). Use adamw_torch_fused."
            )
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizers: {type(optimizer).__name__} isn't a torch.optim.Optimizer. Give one.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "optimizers: LBFGS computes the loss several times per step, which isn't supported. Give another."
        )
    if scheduler is not None and (
        not isinstance(scheduler, LRScheduler)
        or isinstance(scheduler, ReduceLROnPlateau)
        or scheduler.optimizer is not optimizer
    ):
        raise ConfigError(
            f"optimizers: {type(scheduler).__name__} isn't a schedule of the given optimizer that depends on the step alone. "
            "Give an LRScheduler of that optimizer other than ReduceLROnPlateau, or None."
        )
    if scheduler is not None and config.kl_action == "rollback":
        raise ConfigError(
            "kl_action: rollback halves the learning rate, which a given scheduler doesn't support. Use stop."
        )
    if sharded:
        raise ConfigError(
            "optimizers: can't be combined with sharded weights (FSDP2, DeepSpeed). Use the setting optim."
        )
    if config.use_peft:
        raise ConfigError(
            "optimizers: the LoRA weights are created after the optimizer. Apply peft.get_peft_model, then create the "
            "optimizer, and omit use_peft and peft_config."
        )
    defaults = {setting.name: setting.default for setting in fields(config)}
    for name in OPTIMIZER_SETTINGS:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(f"{name} and optimizers are both given. Remove one of the two.")


def peak_of(group: Mapping[str, Any]) -> float:
    """Return the peak learning rate of a parameter group, also if a schedule has begun its warmup."""
    return float(group.get("initial_lr", group["lr"]))


def with_given_rate(config: ReinforceConfig, optimizer: Any) -> ReinforceConfig:
    """Return ``config`` with the learning rate of the given optimizer, if ``config`` has none."""
    if config.learning_rate is not None or not isinstance(optimizer, torch.optim.Optimizer):
        return config
    return replace(config, learning_rate=max(map(peak_of, optimizer.param_groups)))


def with_given_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the user's ``optimizer`` of ``model``; parameters that it doesn't hold are frozen.

    Raises:
        ConfigError: it holds parameters of another model.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not held <= {id(parameter) for parameter in trainable}:
        raise ConfigError(f"optimizers: {OTHER_TENSORS}")
    rates = sorted({peak_of(group) for group in optimizer.param_groups})
    echo(f"Learning rate {', '.join(f'{rate:g}' for rate in rates)}: that of the given optimizer.")
    frozen = [parameter for parameter in trainable if id(parameter) not in held]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if frozen:
        echo(
            f"optimizers: {len(frozen)} of {len(trainable)} trainable tensors aren't in the optimizer; they are frozen."
        )
    return optimizer
