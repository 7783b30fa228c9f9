"""Token ids of the texts that a reward model scores, in the form in which the model was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from reinforcepp.data import conversation_text
from reinforcepp.models.conversations import Variables, marked_conversation
from reinforcepp.models.encoders import ENCODER_TEMPLATE, is_encoder
from reinforcepp.models.loading import context_length
from reinforcepp.models.prompt_format import prompt_form
from reinforcepp.models.special_tokens import encode, marked
from reinforcepp.models.tokenization import encode_example, encode_text, split_example
from reinforcepp.runtime.terminal import warn_once
from reinforcepp.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TextForm = Literal["answer", "conversation", "pair", "continuation"]
"""Form of a scored text.

answer: The prompt and the answer up to its end token, as ``reinforcepp reward`` and OpenRLHF train.
conversation: The chat template's rendering of the whole conversation, as TRL trains and model cards show.
pair: The tokenizer's pair of two sentences, as classifiers without a chat template are trained.
continuation: The prompt and the answer as one text without special tokens, as TRL's trainers score prompts that are texts.
"""
OPENRLHF_CLASSES = ("RewardModel", "CriticModel")
LENGTH_LIMIT = 1_000_000
"""Tokenizers without a length limit state a larger one."""


def form_of(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> TextForm:
    """Return the form of the texts that a classifier of unknown origin was trained on."""
    if is_encoder(config) and tokenizer.chat_template == ENCODER_TEMPLATE:
        return "pair"
    names = set(config.architectures or ())
    if names & set(OPENRLHF_CLASSES) or hasattr(config, "value_head_prefix"):
        return "answer"
    return "conversation" if prompt_form(tokenizer) == "chat template" else "answer"


def split_scored(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    answer: str,
    form: TextForm,
    *,
    finished: bool = True,
    limit: int | None = None,
    variables: Variables | None = None,
) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt and of the answer; in the form answer, an unfinished answer gets no end token.

    Args:
        tokenizer: of the reward model.
        prompt: of the policy.
        answer: to the prompt.
        form: in which both become one text.
        finished: whether the answer was sampled to its end.
        limit: most tokens of a pair; the tokenizer truncates a longer one.
        variables: of the chat template.

    Raises:
        ModelError: the chat template can't format the conversation.
    """
    if form == "pair":
        return _pair(tokenizer, prompt if isinstance(prompt, str) else conversation_text(prompt), answer, limit)
    context, target = split_example(tokenizer, prompt, answer, finished=finished, variables=variables)
    if form == "answer":
        return context, target
    ids = encode_scored(tokenizer, prompt, answer, form, variables=variables)
    start = max(len(ids) - len(target), 0)
    return ids[:start], ids[start:]


def encode_scored(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    answer: str,
    form: TextForm,
    *,
    finished: bool = True,
    limit: int | None = None,
    variables: Variables | None = None,
) -> list[int]:
    """Return the token ids of :func:`split_scored` in one list, without tokenizing the prompt once more."""
    if form == "pair":
        context, target = split_scored(tokenizer, prompt, answer, form, limit=limit)
        return context + target
    if form == "continuation":
        return encode(tokenizer, marked(tokenizer, f"{prompt}{answer}"))
    if form == "answer":
        return encode_example(tokenizer, prompt, answer, finished=finished, variables=variables)
    return encode(tokenizer, marked_conversation(tokenizer, prompt, answer, variables or {}))


def encode_formatted(tokenizer: PreTrainedTokenizerBase, text: str, form: TextForm, limit: int | None) -> list[int]:
    """Return the token ids of a conversation that is formatted already, for a model of the form conversation or pair."""
    if form == "pair":
        return list(tokenizer(text, truncation=limit is not None, max_length=limit)["input_ids"])
    return encode_text(tokenizer, text)


def _pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, limit: int | None
) -> tuple[list[int], list[int]]:
    special = {"split_special_tokens": True}  # the text of a special token isn't special
    ids = list(tokenizer(prompt, answer, **special)["input_ids"])
    if limit is not None and len(ids) > limit:
        warn_once(
            f"{tokenizer.name_or_path or 'The reward model'}: texts longer than {limit} tokens are truncated, the longer one of "
            "prompt and answer first."
        )
        ids = list(tokenizer(prompt, answer, truncation=True, max_length=limit, **special)["input_ids"])
    start = min(len(tokenizer(prompt, **special)["input_ids"]), len(ids))
    return ids[:start], ids[start:]


def pair_limit(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int | None:
    """Return the most tokens of a pair: the positions of the encoder, or the limit of its tokenizer if that is lower."""
    limits = [context_length(config), tokenizer.model_max_length]
    return min((int(limit) for limit in limits if limit and limit < LENGTH_LIMIT), default=None)


def pair_separator(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int | None:
    """Return the token after which an encoder's tokens are of the second type; None if it has one type only."""
    if (getattr(config, "type_vocab_size", 0) or 0) < 2:
        return None
    encoded = tokenizer("a", "b")
    types = list(encoded.get("token_type_ids") or [0])
    if not any(types):
        return None
    return int(encoded["input_ids"][types.index(1) - 1])
