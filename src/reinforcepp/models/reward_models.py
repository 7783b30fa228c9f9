"""Load models with a score head, newly initialized or trained.

A language model reads its score at the last token of a text, an encoder with its own pooling and classification head.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.models.encoders import is_encoder
from reinforcepp.models.loading import (
    CLASSIFIER,
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
    """Return the model ``name`` with a newly initialized score head; ``settings`` go to ``from_pretrained``.

    Raises:
        ModelError: the model can't be loaded, or transformers has no classifier of its type.
    """
    torch.manual_seed(seed)
    model = _classifier(base_of_adapter(name) or name, new=True, initialize=_initialize_head, **settings)
    if base_of_adapter(name) is not None:
        if is_4bit(model):
            raise ConfigError(
                f"load_in_4bit: {name} is an adapter, which can't be quantized. Merge it first: "
                f"reinforcepp export {name} --output_dir merged"
            )
        model.base_model.load_state_dict(load_policy(name).base_model.state_dict())
    tokenizer = load_tokenizer(name)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return prepare_scoring(model)


def score_head(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Return the layer whose output is the score, and its name: ``score`` in language models, the last layer of encoders."""
    inside = set(model.base_model.modules())
    layers = [
        (name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear) and part not in inside
    ]
    return layers[-1]


def head_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules between the pretrained layers and the score, which are trained in full next to an adapter."""
    pooler = getattr(model.base_model, "pooler", None)
    parts = [pooler, *(part for part in model.children() if part is not model.base_model)]
    return [part for part in parts if part is not None and next(part.parameters(), None) is not None]


@torch.no_grad()
def _initialize_head(model: PreTrainedModel, missing: set[str]) -> None:
    """Draw a missing score head from a normal distribution with the standard deviation 1 / (inputs + 1).

    Scores then start close to 0. With the initialization of transformers, whose deviation is 0.02 at any width, the loss of
    wide models rises to many times its first value.
    """
    name, head = score_head(model)
    if f"{name}.weight" in missing:
        head.weight.normal_(std=1 / (head.in_features + 1))


def load_reward_weights(folder: Path) -> PreTrainedModel:
    """Load a trained reward model.

    Raises:
        ModelError: the score head is missing or has the wrong shape.
    """
    _check_head(folder)
    if (base := base_of_adapter(str(folder))) is not None:
        return prepare_scoring(merge_adapter(_classifier(base, new=True), folder)).eval()
    return prepare_scoring(_classifier(str(folder))).eval()


def _classifier(name: str, *, new: bool = False, **settings: Any) -> PreTrainedModel:
    """Return a model with one score as its output. With ``new``, only its pretrained layers must be in the weights."""
    from transformers import AutoModelForSequenceClassification

    pretrained = f"{_skeleton(name).base_model_prefix}."

    def is_new(key: str) -> bool:
        return not key.startswith(pretrained) or key.startswith(f"{pretrained}pooler.")

    return load_weights(
        AutoModelForSequenceClassification,
        name,
        new=is_new if new else None,
        num_labels=1,
        dtype=torch.float32,
        **settings,
    )


def _skeleton(name: str) -> PreTrainedModel:
    """Return the reward model of the configuration of ``name``, without weights.

    Raises:
        ModelError: transformers has none.
    """
    config = load_config(name)
    if config.is_encoder_decoder:
        raise ModelError(
            f"{name}: {config.model_type} models have an encoder and a decoder, and can't be reward models. Give a causal "
            "language model or an encoder."
        )
    register_classifier(config)
    config.num_labels = 1
    return meta_model(config, torch.float32, CLASSIFIER)


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
    name, layer = score_head(_skeleton(str(folder)))
    head, needed = shapes.get(f"{name}.weight"), list(layer.weight.shape)
    if head is None:
        raise ModelError(
            f"{folder}: no score head ({name}.weight). It isn't a reward model, and a newly initialized head scores at random. "
            "Train a reward model: reinforcepp reward"
        )
    if head != needed:
        raise ModelError(
            f"{folder}: the score head has shape {head}, but the model needs {needed}. Train the reward model again."
        )


def prepare_scoring(model: PreTrainedModel) -> PreTrainedModel:
    """Make ``model`` compute scores from token ids and the attention mask alone, and return it.

    A language model reads the score at the last token in the mask. Transformers reads it at the last token that isn't the pad
    token, which misses the EOS if pad and EOS are the same.
    """
    from transformers.modeling_outputs import SequenceClassifierOutput

    def encoder_forward(self: Any, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        own = type(self).forward(self, input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return SequenceClassifierOutput(logits=own.logits)

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

    model.forward = MethodType(encoder_forward if is_encoder(model.config) else forward, model)
    return model
