"""What an engine outside the trainer is given of a model: configuration, ends of answers, weights with adapters merged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinforcepp import models

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The language model itself, without what peft wraps round it."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    return base


def named_config(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy that names its architecture, which a configuration made in code doesn't."""
    config = deepcopy(base_model(model).config)
    config.architectures = [type(base_model(model)).__name__]
    return config


def saved_eos_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All ids that end an answer of a saved model: see :func:`~reinforcepp.models.eos_ids`."""
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(models.resolve(name)).eos_token_id
    except OSError:  # the file is optional
        own = models.load_config(name).get_text_config().eos_token_id
    listed = own if isinstance(own, list) else [own]
    return frozenset(int(i) for i in [tokenizer.eos_token_id, *listed] if i is not None)


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
