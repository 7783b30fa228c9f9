"""LoRA: small matrices that are trained beside a model's own weights, which stay as they are.

A trained adapter is a folder with ``adapter_config.json`` in peft's own format; it names the model that it belongs to.
Wherever such a folder is loaded to be used, it is merged into that model.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reinforcepp.config import AdapterConfig
from reinforcepp.data import builtin
from reinforcepp.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
"""What peft writes before the names of weights."""

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft loads it, and on a CPU it asks for more packages


# --- folders --------------------------------------------------------------------------------------------------------


def is_adapter_dir(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_model_name(folder: Path) -> str:
    """The name of the model that the adapter in ``folder`` belongs to.

    Raises:
        ModelError: its configuration is damaged or names none.
    """
    path = folder / ADAPTER_CONFIG
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}): copy the adapter from its origin again.") from error
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"{path} doesn't name its model: set base_model_name_or_path to the model's folder or hub name."
        )
    return name


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """``model`` with the adapter in ``folder`` added to its weights, which are changed; no adapter is left.

    Raises:
        ModelError: the adapter doesn't fit the model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            # it was trained beside weights of 4 bits, which GPT-2 lays out otherwise in full; peft sees that itself
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
    except (SafetensorError, RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"The adapter in {folder} can't be added to {base_model_name(folder)}: {reason}") from error
    plain: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return plain


# --- live models ----------------------------------------------------------------------------------------------------


def with_adapter(
    model: PreTrainedModel, settings: AdapterConfig, *, seed: int, head: nn.Module | None = None
) -> PreTrainedModel:
    """``model`` wrapped by peft with a fresh adapter; what the model says is unchanged.

    Args:
        model: is changed in place; nothing but the adapter can be trained then.
        settings: of the adapter.
        seed: of its first weights.
        head: a module that is trained whole and saved with the adapter, as a fresh scoring head has to be.

    Raises:
        ConfigError: no layer has one of the names in ``lora_target_modules``.
    """
    from peft import LoraConfig, get_peft_model

    if is_4bit(model):
        for part in model.modules():
            if hasattr(part, "support_avx512bf16_for_cpu"):
                part.support_avx512bf16_for_cpu = (
                    False  # or it repacks its weights for use only, without a backward pass
                )
    targets = tuple(settings.lora_target_modules)
    names = {part: name for name, part in model.named_modules()}
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        exclude_modules=None if head is None else [names[head]],
        modules_to_save=None if head is None else [names[head]],
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        fan_in_fan_out=any(type(part).__name__ == "Conv1D" for part in names),  # of GPT-2; peft warns unless it is told
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: PreTrainedModel = get_peft_model(model, config)
        except ValueError as error:
            layers = sorted({name.rsplit(".", 1)[-1] for part, name in names.items() if is_linear(part)})
            raise ConfigError(
                f"lora_target_modules {' '.join(targets)} names no layer that can have an adapter; this model has "
                f"{', '.join(layers)}."
            ) from error
    config.base_model_name_or_path = _lasting_name(model.config.name_or_path)
    return adapted.eval()


def _lasting_name(name: str) -> str:
    """By which a model is found from any working folder: built-in ones by their name, local ones by their path."""
    if name == str(builtin.model_path()):
        return builtin.MODEL_NAME
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def is_linear(part: Any) -> bool:
    """Whether ``part`` is a layer that multiplies by a matrix, be it torch's or GPT-2's."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(part, (nn.Linear, Conv1D))


def has_adapter(model: Any) -> bool:
    """Whether peft has wrapped ``model``."""
    return hasattr(model, "peft_config")


def is_4bit(model: Any) -> bool:
    """Whether the weights of ``model`` are those of QLoRA."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The language model itself, without what peft wraps round it."""
    base: PreTrainedModel = model.get_base_model() if has_adapter(model) else model
    return base


def make_reference(policy: PreTrainedModel) -> PreTrainedModel:
    """The policy as it is before training: a copy, or where an adapter is trained the policy without it."""
    if has_adapter(policy):
        return cast("PreTrainedModel", AdapterDisabled(policy))
    return copy.deepcopy(policy).requires_grad_(False)


class AdapterDisabled:
    """A model as it was before its adapter was trained: the same weights with the adapter switched off, no copy."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the model says with the adapter switched off."""
        with self._model.disable_adapter():
            return self._model(*arguments, **named)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's own weights."""
        with self._model.disable_adapter():
            return dict(full_weights(self._model))


# --- weights --------------------------------------------------------------------------------------------------------


def trainable_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a training changes, by the names under which it is saved: all weights, or those of the adapter."""
    if not has_adapter(model):
        return dict(model.state_dict())
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def load_trainable_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Take over what :func:`trainable_weights` gave."""
    if not has_adapter(model):
        model.load_state_dict(weights)
        return
    from peft import set_peft_model_state_dict

    told = set_peft_model_state_dict(model, weights)
    assert not told.unexpected_keys, told.unexpected_keys


def load_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a saved adapter, for :func:`load_trainable_weights`."""
    return load_file(folder / ADAPTER_WEIGHTS)


@torch.no_grad()
def full_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every entry of the state dict, tied ones under both names.

    Adapters are added to a copy of the weight they adapt, one weight at a time: merging in place and taking it out again
    would leave rounding errors in the trainer's own weights.
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
            weight = _merged_weight(adapted[name], weight)
        yield re.sub(r"\.modules_to_save\.[^.]+\.", ".", name.replace(".base_layer.", ".")), weight


def _merged_weight(layer: Any, weight: Tensor) -> Tensor:
    if layer.disable_adapters or layer.merged:
        return weight
    inner = layer.get_base_layer()
    own = inner.weight.data
    try:
        layer.merge(safe_merge=True)  # exchanges the tensor for another and leaves the old one as it is
        merged_weight: Tensor = inner.weight.data
    finally:
        inner.weight.data = own
        layer.merged_adapters.clear()
    return merged_weight
