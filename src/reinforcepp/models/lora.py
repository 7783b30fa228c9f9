"""LoRA adapters: create, merge, save and load them.

A trained adapter is a folder in peft's format; its ``adapter_config.json`` names the base model. Loading such a folder for
inference merges the adapter into the base model.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from reinforcepp.config import AdapterConfig
from reinforcepp.data import builtin
from reinforcepp.errors import ConfigError, ModelError, useful_line
from reinforcepp.models.folder_checks import NO_PICKLES
from reinforcepp.runtime.terminal import warn_once

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
"""Prefix that peft adds to the names of weights."""
EMBEDDINGS = re.compile(r"\b(embed_tokens|wte|embed_in|word_embeddings|lm_head|embed_out)\.weight$")
"""Names of the weights that have one row per token."""

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and on a CPU it warns


# --- folders --------------------------------------------------------------------------------------------------------


def is_adapter_dir(folder: Path) -> bool:
    """Return whether ``folder`` holds an adapter and no full model."""
    return (folder / ADAPTER_CONFIG).is_file() and not has_full_weights(folder)


def has_full_weights(folder: Path) -> bool:
    """Return whether ``folder`` holds a full model, whatever adapter files are next to it."""
    patterns = ("model*.safetensors", "pytorch_model*.bin")
    return (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in patterns)


@contextmanager
def full_model_folder(folder: Path) -> Iterator[Path]:
    """Yield ``folder``, or one with links to its files but those of an adapter, which transformers would apply to the weights."""
    if not (folder / ADAPTER_CONFIG).is_file():
        yield folder
        return
    warn_once(
        f"{folder}: the folder holds full weights and an adapter. Using the full weights and ignoring the adapter."
    )
    with tempfile.TemporaryDirectory(prefix="reinforcepp-model-") as name:
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                (Path(name) / path.name).symlink_to(path.resolve())
        yield Path(name)


def adapter_vocabulary(folder: Path) -> int | None:
    """Return the number of tokens in the embeddings that an adapter replaces, or None if it keeps those of its base model.

    Raises:
        ModelError: the weights are damaged.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                if EMBEDDINGS.search(key):
                    return int(weights.get_slice(key).get_shape()[0])
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged ({error}). Copy the adapter from its origin again.") from error
    return None


def base_model_name(folder: Path) -> str:
    """Return the name of the base model of the adapter in ``folder``.

    Raises:
        ModelError: the adapter's configuration is damaged or names no model.
    """
    path = folder / ADAPTER_CONFIG
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: damaged ({error}). Copy the adapter from its origin again.") from error
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"{path}: no base model. Set base_model_name_or_path to the model's folder or its name on the Hub."
        )
    return name


def check_no_cycle(folder: Path) -> None:
    """Check that the chain of base models of the adapter in ``folder`` ends.

    Raises:
        ModelError: it doesn't, or a configuration in it is damaged.
    """
    chain: list[Path] = []
    while is_adapter_dir(folder):
        if (resolved := folder.resolve()) in chain:
            raise ModelError(
                f"{folder / ADAPTER_CONFIG}: the adapter is its own base model. Set base_model_name_or_path to the model that it "
                "was trained on."
            )
        chain.append(resolved)
        folder = Path(base_model_name(folder)).expanduser()


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge the adapter in ``folder`` into the weights of ``model``, in place, and return the model without an adapter.

    Raises:
        ModelError: the adapter doesn't match the model.
    """
    from peft import PeftConfig, PeftModel

    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = f" {NO_PICKLES}" * any(folder.glob("*.bin"))
        raise ModelError(
            f"{folder}: no {ADAPTER_WEIGHTS}.{pickled} Save the adapter as safetensors, with peft's save_pretrained."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        # Mixtures and prompts would read other files, and Megatron would import a module, which the configuration names.
        if config.is_prompt_learning or config.peft_type == "XLORA" or getattr(config, "megatron_config", None):
            raise ModelError(
                f"{folder}: an adapter with this {type(config).__name__} can't be merged into its base model. Use LoRA."
            )
        vocabulary = adapter_vocabulary(folder)
        if vocabulary is not None and vocabulary != model.config.get_text_config().vocab_size:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)  # the adapter replaces the new rows
        with warnings.catch_warnings():
            # Unquantized GPT-2 stores its weights transposed, unlike in 4 bits. peft detects that and warns.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
    except (SafetensorError, RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder}: the adapter can't be merged into {base_model_name(folder)}: {useful_line(error)}"
        ) from error
    plain: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return plain


# --- models in memory ------------------------------------------------------------------------------------------------


def with_adapter(
    model: PreTrainedModel, settings: AdapterConfig, *, seed: int, heads: Sequence[nn.Module] = ()
) -> PreTrainedModel:
    """Return ``model`` with a newly initialized adapter, which doesn't change the model's output.

    Args:
        model: changed in place; afterwards only the adapter is trainable.
        settings: of the adapter.
        seed: of the adapter's initial weights.
        heads: modules that are trained in full and saved with the adapter, such as a newly initialized score head.

    Raises:
        ConfigError: no layer has one of the names in ``lora_target_modules``.
    """
    from peft import LoraConfig, get_peft_model

    if is_4bit(model):
        for part in model.modules():
            if hasattr(part, "support_avx512bf16_for_cpu"):
                part.support_avx512bf16_for_cpu = (
                    False  # bitsandbytes would repack weights for inference, which has no backward pass
                )
    targets = tuple(settings.lora_target_modules)
    names = {part: name for name, part in model.named_modules()}
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        exclude_modules=[names[part] for head in heads for part in head.modules()] or None,
        modules_to_save=[names[head] for head in heads] or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        fan_in_fan_out=any(
            type(part).__name__ == "Conv1D" for part in names
        ),  # GPT-2; peft warns if it detects this itself
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: PreTrainedModel = get_peft_model(model, config)
        except ValueError as error:
            layers = sorted({name.rsplit(".", 1)[-1] for part, name in names.items() if is_linear(part)})
            raise ConfigError(
                f"lora_target_modules: {' '.join(targets)} matches no layer that can have an adapter. "
                f"Choose from {', '.join(layers)}."
            ) from error
    config.base_model_name_or_path = _absolute_name(model.config.name_or_path)
    return adapted.eval()


def add_adapter(
    model: PreTrainedModel, peft_config: PeftConfig, *, seed: int, heads: Sequence[nn.Module]
) -> PreTrainedModel:
    """Return ``model`` with an adapter of ``peft_config``; ``heads`` are trained in full and saved with it.

    Raises:
        ConfigError: it isn't a configuration of peft, or doesn't fit the model.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config: {type(peft_config).__name__} isn't a configuration of peft. Give a LoraConfig."
        )
    peft_config = copy.deepcopy(peft_config)
    names = {part: name for name, part in model.named_modules()}
    saved = list(getattr(peft_config, "modules_to_save", None) or ())
    if hasattr(peft_config, "modules_to_save"):
        peft_config.modules_to_save = [*saved, *(names[head] for head in heads if names[head] not in saved)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: PreTrainedModel = get_peft_model(model, peft_config)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"peft_config: the adapter can't be added: {useful_line(error)}") from error
    return adapted.eval()


def _absolute_name(name: str) -> str:
    """Return a name that is valid in any working directory: built-in models by name, local ones by absolute path."""
    if name == str(builtin.model_path()):
        return builtin.MODEL_NAME
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def is_linear(part: Any) -> bool:
    """Return whether ``part`` is a linear layer, torch's or GPT-2's."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(part, (nn.Linear, Conv1D))


def has_adapter(model: Any) -> bool:
    """Return whether ``model`` has an adapter."""
    return hasattr(model, "peft_config")


def is_4bit(model: Any) -> bool:
    """Return whether ``model`` has 4-bit weights (QLoRA)."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def is_quantized(model: Any) -> bool:
    """Return whether ``model`` has weights of 4 or 8 bits, by bitsandbytes."""
    return is_4bit(model) or bool(getattr(model, "is_loaded_in_8bit", False))


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the language model inside the wrapper of peft."""
    base: PreTrainedModel = model.get_base_model() if has_adapter(model) else model
    return base


def make_reference(policy: PreTrainedModel, *, new_adapter: bool) -> PreTrainedModel:
    """Return the reference policy, which is the policy as it is now.

    A new adapter changes no output, so disabling it is enough. An adapter that the user gave can be trained already.
    """
    return cast("PreTrainedModel", AdapterDisabled(policy)) if new_adapter else frozen_copy(policy)


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """Return a copy that keeps the policy's current weights; it shares frozen weights, such as those below an adapter."""
    shared = {id(weight): weight for weight in policy.parameters() if not weight.requires_grad}
    return copy.deepcopy(policy, shared).requires_grad_(False)


class AdapterDisabled:
    """A model with its adapter disabled; it shares the weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the model with the adapter disabled."""
        with self._model.disable_adapter():
            return self._model(*arguments, **named)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights without the adapter."""
        with self._model.disable_adapter():
            return dict(full_weights(self._model))


# --- weights --------------------------------------------------------------------------------------------------------


def trainable_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights that training changes, by their names in a saved model: all, or those of the adapter."""
    if not has_adapter(model):
        return dict(model.state_dict())
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def load_trainable_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Load weights from :func:`trainable_weights`."""
    if not has_adapter(model):
        model.load_state_dict(weights)
        return
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys, result.unexpected_keys


def load_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Load the weights of a saved adapter, for :func:`load_trainable_weights`."""
    return load_file(folder / ADAPTER_WEIGHTS)


@torch.no_grad()
def full_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every entry of the state dict with its adapter merged; tied weights under both names.

    The adapter is merged into a copy, one weight at a time: merging in place and unmerging would leave rounding errors in
    the trained weights.
    """
    base = base_model(model)
    layers: dict[str, Any] = {
        f"{name}.base_layer.weight": module
        for name, module in base.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")
    }
    for name, weight in base.state_dict().items():
        if "lora_" in name or ".original_module." in name:
            continue
        if name in layers:
            weight = _merged_weight(layers[name], weight)
        yield re.sub(r"\.modules_to_save\.[^.]+\.", ".", name.replace(".base_layer.", ".")), weight


def _merged_weight(layer: Any, weight: Tensor) -> Tensor:
    if layer.disable_adapters or layer.merged:
        return weight
    inner = layer.get_base_layer()
    original = inner.weight.data
    try:
        layer.merge(safe_merge=True)  # replaces the tensor and leaves the original one unchanged
        merged_weight: Tensor = inner.weight.data
    finally:
        inner.weight.data = original
        layer.merged_adapters.clear()
    return merged_weight
