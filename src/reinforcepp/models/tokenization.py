"""Format conversations with the chat template, tokenize and pad them.

The tokenizer's chat template formats every text in training and inference. A base model without one gets
``PLAIN_TEMPLATE``, which is saved with the model. Prompt and completion are tokenized separately, so that a token
boundary lies between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from reinforcepp.errors import DataError, ModelError
from reinforcepp.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}Question: {{ m['content'] }}\n"
    "{% elif m['role'] == 'assistant' %}Answer: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)

LongPrompts = Literal["cut", "drop"]


# --- prompt format --------------------------------------------------------------------------------------------------


def format_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return ``prompt`` in the chat template, with the generation prompt at the end."""
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def format_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Return ``messages`` in the chat template, with the generation prompt at the end.

    Each message has ``role`` and ``content``; the last one is the user's. If the template doesn't support a system message,
    its text is put before the first user message.

    Raises:
        ModelError: the template rejects the conversation.
    """
    from jinja2 import TemplateError

    def formatted(conversation: Sequence[Mapping[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True))

    try:
        if messages[0]["role"] != "system":
            return formatted(messages)
        system, first, *rest = messages
        try:
            text = formatted(messages)
        except TemplateError:  # some templates reject a system message
            text = ""
        if text and text != formatted(messages[1:]):
            return text
        return formatted([{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest])
    except TemplateError as error:
        raise ModelError(
            f"The model's chat template can't format this conversation: {error}. Start a new one."
        ) from error


def format_completion(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> str:
    """Return the text after :func:`format_prompt` for the answer ``answer``, without EOS.

    Raises:
        ModelError: the template formats a prompt differently if a completion follows.
    """
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    start = format_prompt(tokenizer, prompt)
    if not whole.startswith(start):
        raise ModelError(
            "The chat template formats a prompt differently if a completion follows it, so training and inference would "
            "differ. Use a template whose generation prompt is a prefix of the whole conversation."
        )
    completion = whole[len(start) :]
    eos = str(tokenizer.eos_token)
    return completion.rpartition(eos)[0] if eos in completion else completion


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of ``text`` without adding special tokens, because the chat template writes them."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, finished: bool = True) -> list[int]:
    """Return the token ids of the formatted prompt and answer, with EOS unless the answer was truncated."""
    ids = encode(tokenizer, format_prompt(tokenizer, prompt))
    ids += encode(tokenizer, format_completion(tokenizer, prompt, answer))
    return [*ids, eos_token_id(tokenizer)] if finished else ids


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokenizer's EOS id."""
    return int(tokenizer.eos_token_id)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Any],
    *,
    max_prompt_length: int,
    long_prompts: LongPrompts = "cut",
) -> tuple[list[Prompt], list[int]]:
    """Format and tokenize rows with ``.prompt`` and optionally ``.columns``.

    A prompt of more than ``max_prompt_length`` tokens, chat template included, is truncated on the left of its text
    (``cut``) or skipped (``drop``). The template's tokens are never truncated.

    Returns:
        The prompts, whose keys are their indices in ``rows``, and the indices of those that were too long.
    """
    prompts: list[Prompt] = []
    too_long: list[int] = []
    for key, row in enumerate(rows):
        ids = encode(tokenizer, format_prompt(tokenizer, row.prompt))
        if len(ids) > max_prompt_length:
            too_long.append(key)
            if long_prompts == "drop":
                continue
            ids = _truncate_left(tokenizer, row.prompt, max_prompt_length)
        prompts.append(Prompt(row.prompt, tuple(ids), key, dict(getattr(row, "columns", {}))))
    return prompts, too_long


class LazyPrompts(Sequence[Prompt]):
    """Prompts that are formatted, tokenized and truncated to ``limit`` tokens on access.

    ``digest`` identifies the contents of ``rows``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], limit: int, digest: str) -> None:
        self.tokenizer, self.rows, self.limit, self.digest = tokenizer, rows, limit, digest

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """Return one prompt, or a list for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        ((prompt,), _) = encode_prompts(self.tokenizer, [self.rows[index]], max_prompt_length=self.limit)
        return replace(prompt, key=index)


def _truncate_left(tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int) -> list[int]:
    content = encode(tokenizer, prompt)
    keep = limit - len(encode(tokenizer, format_prompt(tokenizer, "")))
    while keep > 0:
        text = str(tokenizer.decode(content[-keep:])).lstrip("\ufffd")
        ids = encode(tokenizer, format_prompt(tokenizer, text))
        if len(ids) <= limit:
            return ids
        keep -= len(ids) - limit
    raise DataError(
        f"max_prompt_length: {limit} leaves no room for a prompt, because the chat template alone has "
        f"{len(encode(tokenizer, format_prompt(tokenizer, '')))} tokens. Raise it."
    )


# --- padding and masks ----------------------------------------------------------------------------------------------


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return ``(ids_BL, mask_BL)`` of ragged rows. The mask comes from lengths, because ``pad_id`` can be a real token."""
    width = max(len(row) for row in rows)
    ids_BL = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask_BL = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids_BL[i, columns] = torch.tensor(row, dtype=torch.long)
        mask_BL[i, columns] = 1
    return ids_BL, mask_BL


def pad_values(rows: Sequence[Sequence[float]]) -> Tensor:
    """Return ragged rows of numbers, padded with 0 on the right. -> (B, T)"""
    if not rows:
        return torch.zeros(0, 0)
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def position_ids(mask_BL: Tensor) -> Tensor:
    """Return positions counted from each row's first attended token, so that left padding has no effect. -> (B, L)"""
    return (mask_BL.cumsum(-1) - 1).clamp_min(0)
