"""Load models with a score head, newly initialized or trained.

A language model reads its score at the last token of a text, an encoder with its own pooling and classification head.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
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
    local_folder,
    meta_model,
    resolve,
)
from reinforcepp.models.logprobs import is_packable
from reinforcepp.models.lora import base_model, has_adapter, is_4bit, merge_adapter
from reinforcepp.models.packed_attention import on_device, packed_inputs
from reinforcepp.models.score_heads import StoredHead, declared_labels, find_head, has_head, read_head, score_head
from reinforcepp.models.tokenization import position_ids

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def new_reward_model(name: str, seed: int, outputs: Sequence[str] = (), **settings: Any) -> PreTrainedModel:
    """Return :func:`new_classifier`, which reads its scores at the last attended token."""
    return prepare_scoring(new_classifier(name, seed, outputs, **settings))


def new_classifier(name: str, seed: int, outputs: Sequence[str] = (), **settings: Any) -> PreTrainedModel:
    """Return the model ``name`` with its score head, newly initialized if it has none, as plain transformers runs it.

    ``outputs`` are the names of the scores; by default, the model has a single score without a name. ``settings`` go to
    ``from_pretrained``.

    Raises:
        ModelError: the model can't be loaded, or transformers has no classifier of its type.
    """
    head = _head_of(name)
    _check_outputs(name, head, outputs)
    torch.manual_seed(seed)
    if outputs:
        settings["num_labels"] = len(outputs)
        settings["id2label"] = dict(enumerate(outputs))
        settings["label2id"] = {label: i for i, label in enumerate(outputs)}
    model = _classifier(base_of_adapter(name) or name, new=True, initialize=_initialize_head, **settings)
    if base_of_adapter(name) is not None:
        if is_4bit(model):
            raise _adapter_in_4bit(name)
        model.base_model.load_state_dict(load_policy(name).base_model.state_dict())
    if head is not None and not head.is_standard:
        _keep_renamed_head(model, name, head)
    tokenizer = load_tokenizer(name)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def as_classifier(model: PreTrainedModel, seed: int, outputs: Sequence[str] = ()) -> PreTrainedModel:
    """Return ``model`` if it has a score head; a loaded language model gets a new one, and its layers are shared.

    ``outputs`` are as for :func:`new_classifier`.

    Raises:
        ConfigError: the model has other outputs, no head, or an adapter on a language model.
        ModelError: transformers has no classifier of its type.
    """
    plain, wanted = base_model(model), max(1, len(outputs))
    if plain.get_output_embeddings() is None:
        has_head = plain.base_model is not plain and head_modules(plain)
        if has_head and plain.config.num_labels == wanted:
            return model
        found = f"{plain.config.num_labels} outputs" if has_head else "no score head"
        raise ConfigError(
            f"model: the given {type(plain).__name__} has {found}, but the training needs num_labels={wanted}. Load it with "
            f"AutoModelForSequenceClassification.from_pretrained(..., num_labels={wanted}), or give its name."
        )
    if has_adapter(model):
        raise ConfigError(
            "model: the adapter of the given model belongs to a language model. Give the language model and a peft_config."
        )
    config = copy.deepcopy(model.config)
    register_classifier(config)
    config.num_labels = wanted
    if outputs:
        config.id2label = dict(enumerate(outputs))
        config.label2id = {label: i for i, label in enumerate(outputs)}
    built = meta_model(config, model.dtype, CLASSIFIER)
    setattr(built, built.base_model_prefix, model.base_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weight = torch.randn(wanted, score_head(built)[1].in_features)
    _install_head(built, weight / (weight.shape[1] + 1), None, device=model.device)
    return built


def _head_of(name: str) -> StoredHead | None:
    """Return the score head in the weights of ``name``; None for a language model without one."""
    folder = Path(resolve(name))
    if not any(folder.glob("model*.safetensors")):
        return None
    try:
        return find_head(folder, _skeleton(name))
    except ModelError:
        return None


def _check_outputs(name: str, head: StoredHead | None, outputs: Sequence[str]) -> None:
    """Check that a trained head has the wanted outputs, because weights of another output would be trained silently."""
    if head is None or (head.outputs == 1 and len(outputs) <= 1):
        return
    labels = declared_labels(Path(resolve(name)), head.outputs)
    if labels != list(outputs):
        wanted = ", ".join(outputs) if outputs else "a single one"
        raise ModelError(
            f"{name}: its score head has the outputs {', '.join(labels)}, but the training needs {wanted}. Give the same "
            "criteria in the same order, or a language model."
        )


@torch.no_grad()
def _keep_renamed_head(model: PreTrainedModel, name: str, head: StoredHead) -> None:
    """Copy the weights of a head with a name that transformers doesn't know. A bias changes no preference, so it is dropped."""
    score_head(model)[1].weight.copy_(read_head(Path(resolve(name)), head)[0])


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


def load_reward_weights(folder: Path, outputs: int | None = 1, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a reward model that this package trained with ``outputs`` scores; None accepts any number.

    Raises:
        ModelError: the score head is missing or has the wrong shape.
    """
    model, _ = load_classifier(folder, dtype, outputs)
    return prepare_scoring(model)


@dataclass(frozen=True)
class ScoreReading:
    """How scores are read from a classifier, apart from its weights.

    Attributes:
        has_bias: whether the score head of a language model has a bias, which transformers gives to none.
        skipped_token: token that never holds the score of a language model, although it can end a text.
        separator: token of an encoder after which the tokens of a text are of the second type.
    """

    has_bias: bool = False
    skipped_token: int | None = None
    separator: int | None = None


def load_classifier(
    folder: Path, dtype: torch.dtype = torch.float32, outputs: int | None = None, **settings: Any
) -> tuple[PreTrainedModel, ScoreReading]:
    """Load any sequence classifier, whatever its head is called, and return how plain transformers reads its scores.

    Args:
        folder: of a classifier, of a language model with a value head, or of an adapter of one of them.
        dtype: of the weights.
        outputs: number of scores, if it is known.
        settings: for ``from_pretrained``.

    Raises:
        ModelError: a part of the score head is missing, so that it would be newly initialized.
        ConfigError: an adapter can't be loaded in 4 bits.
    """
    skeleton = _skeleton(str(folder))
    base = base_of_adapter(str(folder))
    if base is not None and "quantization_config" in settings:
        raise _adapter_in_4bit(str(folder))
    owner = _head_owner(folder, skeleton)
    head = find_head(owner, skeleton)
    if outputs not in (None, head.outputs):
        width = score_head(skeleton)[1].in_features
        raise ModelError(
            f"{folder}: the score head has shape {[head.outputs, width]}, but the model needs {[outputs, width]}. Train the "
            "reward model again."
        )
    arguments: dict[str, Any] = {**settings, "num_labels": head.outputs, "dtype": dtype}
    if head.prefix is not None:
        arguments["key_mapping"] = {f"^{re.escape(head.prefix)}": f"{skeleton.base_model_prefix}."}
    new = {f"{score_head(skeleton)[0]}.{part}" for part in ("weight", "bias")}
    if base is None:
        model = load_weights(
            _auto_class(), str(folder), new=None if head.is_standard else new.__contains__, **arguments
        )
    else:
        model = _classifier(base, new=True, **arguments) if owner == folder else load_classifier(owner, dtype)[0]
        model = merge_adapter(model, folder)
    if not head.is_standard:
        _install_head(model, *read_head(owner, head))
    config = model.config.get_text_config()
    plain = str((config.architectures or [""])[0]).endswith("ForSequenceClassification")
    plain = plain and not hasattr(config, "value_head_prefix")  # OpenRLHF
    plain = plain or (base is not None and owner == folder and head.is_standard)
    skipped = getattr(config, "pad_token_id", None) if plain and not is_encoder(config) else None
    return model.eval(), ScoreReading(head.has_bias, skipped)


def stored_head(folder: Path) -> StoredHead:
    """Return the score head of the classifier in ``folder`` without loading weights; errors are those of loading."""
    skeleton = _skeleton(str(folder))
    return find_head(_head_owner(folder, skeleton), skeleton)


def _head_owner(folder: Path, skeleton: PreTrainedModel) -> Path:
    """Return the folder that holds the score head: that of the base model if an adapter has none."""
    base = base_of_adapter(str(folder))
    return folder if base is None or has_head(folder, skeleton) else local_folder(base)


def _auto_class() -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification


def _adapter_in_4bit(name: str) -> ConfigError:
    return ConfigError(
        f"load_in_4bit: {name} is an adapter, which can't be quantized. Merge it first: "
        f"reinforcepp export {name} --output_dir merged"
    )


@torch.no_grad()
def _install_head(
    model: PreTrainedModel, weight: Tensor, bias: Tensor | None, device: torch.device | None = None
) -> None:
    """Replace the last layer of the score head by one with these parameters, by default on the same device."""
    name, old = score_head(model)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=device or old.weight.device)
    head.weight.copy_(weight)
    if bias is not None:
        head.bias.copy_(bias)
    dtype = old.weight.dtype if old.weight.is_floating_point() else model.dtype
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, head.to(dtype))


def _classifier(name: str, *, new: bool = False, **settings: Any) -> PreTrainedModel:
    """Return a classifier, by default with one output. With ``new``, only its pretrained layers must be in the weights."""
    pretrained = f"{_skeleton(name).base_model_prefix}."

    def is_new(key: str) -> bool:
        return not key.startswith(pretrained) or key.startswith(f"{pretrained}pooler.")

    settings = {"num_labels": 1, "dtype": torch.float32, **settings}
    return load_weights(_auto_class(), name, new=is_new if new else None, **settings)


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


TAKES_PACKED_ROWS = "takes_packed_rows"
"""Attribute of models whose forward takes ``packed_rows``."""


def scores_packed_rows(model: PreTrainedModel, longest: int) -> bool:
    """Return whether :func:`prepare_scoring` made ``model`` score packed texts of up to ``longest`` tokens exactly."""
    plain = base_model(model)
    return bool(getattr(plain, TAKES_PACKED_ROWS, False)) and is_packable(plain.base_model, longest)


def prepare_scoring(model: PreTrainedModel, reading: ScoreReading | None = None) -> PreTrainedModel:
    """Make ``model`` compute scores from token ids and the attention mask alone, and return it.

    A language model also scores ``packed_rows``, which are texts of token ids in one row; see :func:`scores_packed_rows`.
    A language model reads the score at the last token in the mask. Transformers reads it at the last token that isn't the pad
    token, which misses the EOS if pad and EOS are the same. A model that was trained so has its pad token in ``reading``.
    """
    from transformers.modeling_outputs import SequenceClassifierOutput

    reading = reading or ScoreReading()

    def encoder_forward(self: Any, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        types = {}
        if reading.separator is not None:
            ended_BL = (input_ids == reading.separator).long()
            types = {"token_type_ids": (ended_BL.cumsum(-1) - ended_BL).clamp_max(1) * attention_mask}
        own = type(self).forward(self, input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **types)
        return SequenceClassifierOutput(logits=own.logits)

    def read_index(row: Sequence[int]) -> int:
        return next((i for i in reversed(range(len(row))) if row[i] != reading.skipped_token), 0)

    def packed_forward(self: Any, rows: Sequence[Sequence[int]]) -> SequenceClassifierOutput:
        hidden_LD = self.base_model(**packed_inputs(self.base_model, rows)).last_hidden_state[0]
        starts = [0, *accumulate(map(len, rows[:-1]))]
        read_B = torch.tensor([start + read_index(row) for start, row in zip(starts, rows, strict=True)])
        return SequenceClassifierOutput(logits=self.score(hidden_LD[on_device(read_B, hidden_LD.device)]))

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        packed_rows: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        if packed_rows is not None:
            return packed_forward(self, packed_rows)
        assert input_ids is not None and attention_mask is not None
        hidden_BLD = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state
        read_BL = attention_mask
        if reading.skipped_token is not None:
            read_BL = attention_mask * (input_ids != reading.skipped_token)
        positions_BL = torch.arange(input_ids.shape[1], device=input_ids.device) * read_BL
        rows_B = torch.arange(input_ids.shape[0], device=input_ids.device)
        return SequenceClassifierOutput(logits=self.score(hidden_BLD[rows_B, positions_BL.argmax(-1)]))

    def forward_by_row(self: Any, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        rows = [ids[mask.bool()][None] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return SequenceClassifierOutput(
            logits=torch.cat([type(self).forward(self, input_ids=row).logits for row in rows])
        )

    if is_encoder(model.config):
        chosen: Any = encoder_forward
    else:  # XLNet and a few others have a head with a pooling of its own
        chosen = forward if isinstance(getattr(model, "score", None), nn.Linear) else forward_by_row
    if reading.has_bias and chosen is forward and model.score.bias is None:
        _install_head(model, model.score.weight, torch.zeros_like(model.score.weight[:, 0]))
    model.forward = MethodType(chosen, model)
    setattr(model, TAKES_PACKED_ROWS, chosen is forward)
    return model
