"""Load language models with a score head, newly initialized or trained."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.models.loading import (
    base_of_adapter,
    load_config,
    load_policy,
    load_tokenizer,
    load_weights,
    meta_model,
)
from reinforcepp.models.lora import ADAPTER_PREFIX, is_4bit, is_adapter_dir, merge_adapter
from reinforcepp.models.tokenization import position_ids

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def new_reward_model(name: str, seed: int, **settings: Any) -> PreTrainedModel:
    """Return the language model ``name`` with a newly initialized score head; ``settings`` go to ``from_pretrained``."""
    torch.manual_seed(seed)
    model = _classifier(base_of_adapter(name) or name, initialize=_initialize_head, **settings)
    if base_of_adapter(name) is not None:
        if is_4bit(model):
            raise ConfigError(
                f"load_in_4bit: {name} is an adapter, which can't be quantized. Merge it first: "
                f"reinforcepp export {name} --output_dir merged"
            )
        model.base_model.load_state_dict(load_policy(name).base_model.state_dict())
    tokenizer = load_tokenizer(name)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return score_at_last_attended(model)


@torch.no_grad()
def _initialize_head(model: PreTrainedModel) -> None:
    """Draw the score head from a normal distribution with the standard deviation 1 / (inputs + 1).

    Scores then start close to 0. With the initialization of transformers, whose deviation is 0.02 at any width, the loss of
    wide models rises to many times its first value.
    """
    model.score.weight.normal_(std=1 / (model.score.in_features + 1))


def load_reward_weights(folder: Path) -> PreTrainedModel:
    """Load a trained reward model.

    Raises:
        ModelError: the score head is missing or has the wrong shape.
    """
    _check_head(folder)
    if (base := base_of_adapter(str(folder))) is not None:
        return score_at_last_attended(merge_adapter(_classifier(base), folder)).eval()
    return score_at_last_attended(_classifier(str(folder), new=None)).eval()


def _classifier(name: str, new: str | None = "score.", **settings: Any) -> PreTrainedModel:
    """Return a model with one score as its output; weights with the prefix ``new`` can be missing."""
    from transformers import AutoModelForSequenceClassification

    register_classifier(load_config(name))
    return load_weights(
        AutoModelForSequenceClassification, name, new=new, num_labels=1, dtype=torch.float32, **settings
    )


def register_classifier(config: PreTrainedConfig) -> None:
    """Give the family of ``config`` a sequence classifier if transformers has none (Granite, Cohere, XGLM and others).

    It is defined as that of Llama: the family's layers and a linear score head.

    Raises:
        ModelError: the family has no causal language model.
    """
    from transformers import AutoModelForSequenceClassification, PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto import modeling_auto as auto

    family = type(config)
    if family in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return
    if family not in auto.MODEL_FOR_CAUSAL_LM_MAPPING or family not in auto.MODEL_MAPPING:
        raise ModelError(
            f"{config.name_or_path}: the type {config.model_type} has no sequence classifier. Give a causal language model."
        )
    layers = auto.MODEL_MAPPING[family]
    pretrained = next(c for c in layers.__mro__[1:] if issubclass(c, PreTrainedModel))
    name = pretrained.__name__.removesuffix("PreTrainedModel") + "ForSequenceClassification"
    attributes = {"base_model_prefix": pretrained.base_model_prefix, "config_class": family}
    classifier = type(name, (GenericForSequenceClassification, pretrained), attributes)
    # Without exist_ok, transformers silently ignores a new class for its own configurations.
    AutoModelForSequenceClassification.register(family, classifier, exist_ok=True)


def _check_head(folder: Path) -> None:
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    pattern = "adapter*.safetensors" if is_adapter_dir(folder) else "model*.safetensors"
    for file in sorted(folder.glob(pattern)):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                shapes[key.removeprefix(ADAPTER_PREFIX)] = list(weights.get_slice(key).get_shape())
    if not shapes:
        raise ModelError(f"{folder}: no safetensors weights, so it isn't a reward model. Train one: reinforcepp reward")
    head = shapes.get("score.weight")
    if head is None:
        raise ModelError(
            f"{folder}: no score head (score.weight). It is a language model, not a reward model, and a newly initialized "
            "head scores at random. Train a reward model: reinforcepp reward"
        )
    config = load_config(str(folder))
    register_classifier(config)
    width = meta_model(config, torch.float32, "AutoModelForSequenceClassification").score.in_features
    if head != [1, width]:
        raise ModelError(
            f"{folder}: the score head has shape {head}, but the model needs [1, {width}]. Train the reward model again."
        )


def score_at_last_attended(model: PreTrainedModel) -> PreTrainedModel:
    """Make ``model`` read its score at the last token in the attention mask, and return it.

    Transformers reads it at the last token that isn't the pad token, which misses the EOS if pad and EOS are the same.
    """
    from transformers.modeling_outputs import SequenceClassifierOutput

    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        hidden_BLD = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state
        positions_BL = torch.arange(input_ids.shape[1], device=input_ids.device) * attention_mask
        rows_B = torch.arange(input_ids.shape[0], device=input_ids.device)
        return SequenceClassifierOutput(logits=self.score(hidden_BLD[rows_B, positions_BL.argmax(-1)]))

    model.forward = MethodType(forward, model)
    return model
