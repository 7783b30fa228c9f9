"""Encoders such as BERT, DeBERTa and ModernBERT: they read texts in both directions, so they can be reward models only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reinforcepp.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ENCODER_TEMPLATE = "{{ cls_token }}{% for m in messages %}{{ m['content'] }}{{ sep_token }}{% endfor %}"
"""Texts as encoders are pretrained on them: the prompt and the answer, each with a separator at its end."""
SKIPS_POSITIONS = (
    *("camembert", "data2vec-text", "ibert", "longformer"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Types whose first position is the one after the pad token's id, so that they have fewer positions than embeddings."""


def is_encoder(config: PreTrainedConfig) -> bool:
    """Return whether the model reads texts in both directions, so that it can't generate."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    decodes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes


def check_generates(config: PreTrainedConfig) -> None:
    """Raise a ModelError if the model is an encoder."""
    if is_encoder(config):
        name = config.name_or_path or "the given model"
        raise ModelError(
            f"{name}: {config.model_type} models are encoders, which can't generate text. Give a causal language model, or "
            f"use the encoder as a reward model: reinforcepp reward --model {name}"
        )


def add_missing_parts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give an encoder's tokenizer an EOS token, its separator, and a chat template, if they are missing."""
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.chat_template is None and tokenizer.cls_token is not None and tokenizer.sep_token is not None:
        tokenizer.chat_template = ENCODER_TEMPLATE


def skipped_positions(config: PreTrainedConfig) -> int:
    """Return the number of position embeddings before the one of a text's first token."""
    if config.model_type == "mpnet":  # always skips 2
        return 2
    return int(config.pad_token_id or 0) + 1 if config.model_type in SKIPS_POSITIONS else 0
