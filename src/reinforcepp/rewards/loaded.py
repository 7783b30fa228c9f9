"""Reward models that the caller has loaded: they score the texts that TRL's trainers give them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from reinforcepp.errors import ConfigError
from reinforcepp.models.encoders import is_encoder
from reinforcepp.models.loading import tokenizer_for
from reinforcepp.models.reward_models import ScoreReading
from reinforcepp.models.reward_texts import form_of
from reinforcepp.rewards.trained import PROBES, TrainedReward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_model(reward: Any) -> bool:
    """Return whether ``reward`` is a loaded model of transformers or PEFT, also a compiled one."""
    return isinstance(reward, nn.Module) and hasattr(reward, "config")


def loaded_reward(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, *, texts_are_messages: bool = True
) -> TrainedReward:
    """Return a loaded classifier as a reward function, which scores as TRL's trainers do.

    A conversation is formatted by the chat template. A prompt that is a text precedes its completion without special tokens,
    unless ``texts_are_messages``: then it is a user message, as it is for the policy. The first output is the score.

    Args:
        model: a sequence classifier; its configuration gets the tokenizer's pad token.
        tokenizer: of the model; default: the one in the model's folder.
        texts_are_messages: whether the policy reads a prompt that is a text as a user message.

    Raises:
        ConfigError: it isn't a classifier, or has no tokenizer.
    """
    config, name = model.config, str(getattr(model.config, "_name_or_path", "") or "")
    if model.get_output_embeddings() is not None:
        raise ConfigError(
            f"reward_funcs: {type(model).__name__} isn't a sequence classifier. Load the reward model with "
            "AutoModelForSequenceClassification."
        )
    if tokenizer is None and not name:
        raise ConfigError(
            "reward_processing_classes: missing, but a reward model created in memory has no tokenizer. Pass the tokenizer."
        )
    reward = TrainedReward(model.eval(), tokenizer_for(config, tokenizer))
    text_config = config.get_text_config()
    text_config.pad_token_id = reward.tokenizer.pad_token_id
    reward.name, reward.given = name.rstrip("/").rpartition("/")[2] or TrainedReward.name, True
    reward.form, reward.text_form = "conversation", None if texts_are_messages else "continuation"
    reward.reading = ScoreReading(skipped_token=None if is_encoder(config) else text_config.pad_token_id)
    if config.num_labels > 1:
        reward.output_weights = (1.0, *[0.0] * (config.num_labels - 1))
        reward.labels = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
    return reward


def use_tokenizer(reward: TrainedReward, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a reward model that was loaded from the folder ``name`` use ``tokenizer``.

    Raises:
        ConfigError: the model has a card, and ``tokenizer`` gives other token ids than its own.
    """
    other = TrainedReward(reward.model, tokenizer_for(reward.model.config, tokenizer))
    other.form = reward.form if reward.card is not None else form_of(other.tokenizer, reward.model.config)
    if [other.encode(*probe) for probe in PROBES] == [reward.encode(*probe) for probe in PROBES]:
        return
    if reward.card is not None:
        raise ConfigError(
            f"reward_processing_classes: the tokenizer differs from the one with which {name} was trained. Pass None for it."
        )
    reward.tokenizer, reward.form = other.tokenizer, other.form
