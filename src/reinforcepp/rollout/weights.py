"""What an engine outside the trainer is given of a model beside its weights: configuration and ends of answers."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

from reinforcepp.models import loading as models
from reinforcepp.models.lora import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def named_config(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy that names its architecture, which a configuration made in code doesn't."""
    config = deepcopy(base_model(model).config)
    config.architectures = [type(base_model(model)).__name__]
    return config


def saved_eos_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All ids that end an answer of a saved model: see :func:`~reinforcepp.models.loading.eos_token_ids`."""
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(models.resolve(name)).eos_token_id
    except OSError:  # the file is optional
        own = models.load_config(name).get_text_config().eos_token_id
    listed = own if isinstance(own, list) else [own]
    return frozenset(int(i) for i in [tokenizer.eos_token_id, *listed] if i is not None)
