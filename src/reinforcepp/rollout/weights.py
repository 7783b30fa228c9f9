"""A model's weights under the names of its checkpoint, adapters merged in: what an engine outside the trainer loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The language model itself, without what peft wraps round it."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    return base


@torch.no_grad()
def full_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every entry of the state dict, tied ones under both names.

    LoRA adapters are added to a copy of the weight they adapt, one weight at a time: merging in place and taking it
    out again would leave rounding errors in the trainer's own weights.
    """
    base = base_model(model)
    adapted: dict[str, Any] = {
        f"{name}.base_layer.weight": module
        for name, module in base.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")
    }
    for name, weight in base.state_dict().items():
        if "lora_" in name or ".original_module." in name:
            continue
        if name in adapted:
            layer = adapted[name]
            for adapter in () if layer.disable_adapters or layer.merged else layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        yield re.sub(r"\.modules_to_save\.[^.]+\.", ".", name.replace(".base_layer.", ".")), weight
