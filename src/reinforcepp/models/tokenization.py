"""From text to tokens and from logits to log-probabilities: frames, padding, masks.

One mechanism frames every text, at training and at use: the tokenizer's chat template. A base model without one is
given ``PLAIN_TEMPLATE``, which is saved with the model like any other template. Prompt and completion are tokenised
apart from each other, so the border between them is always a token border.
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


# --- framing --------------------------------------------------------------------------------------------------------


def format_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The text that the model continues: ``prompt`` in the tokenizer's chat template, ready for an answer."""
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def format_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that the model continues after ``messages``, each with ``role`` and ``content``, the last one the user's.

    A system message for which the template has no place stands in front of the first question.

    Raises:
        ModelError: the template refuses the conversation.
    """
    from jinja2 import TemplateError

    def framed(shown: Sequence[Mapping[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(list(shown), tokenize=False, add_generation_prompt=True))

    try:
        if messages[0]["role"] != "system":
            return framed(messages)
        system, first, *rest = messages
        try:
            text = framed(messages)
        except TemplateError:  # some refuse a system message
            text = ""
        if text and text != framed(messages[1:]):
            return text
        return framed([{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest])
    except TemplateError as error:
        raise ModelError(
            f"The model's chat template can't write this conversation: {error}; begin a new one."
        ) from error


def format_completion(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> str:
    """What follows :func:`format_prompt` when the model answers ``answer``, up to and without the EOS."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    start = format_prompt(tokenizer, prompt)
    if not whole.startswith(start):
        raise ModelError(
            "The chat template writes a prompt differently when an answer follows it, so training and use would "
            "disagree; give the tokenizer a template whose generation prompt is a prefix of the whole conversation."
        )
    completion = whole[len(start) :]
    eos = str(tokenizer.eos_token)
    return completion.rpartition(eos)[0] if eos in completion else completion


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text`` as it stands; templates already hold the special tokens they want."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, finished: bool = True) -> list[int]:
    """Ids of framed prompt and answer, closed by EOS only if the answer ``ended`` by itself."""
    ids = encode(tokenizer, format_prompt(tokenizer, prompt))
    ids += encode(tokenizer, format_completion(tokenizer, prompt, answer))
    return [*ids, eos_token_id(tokenizer)] if finished else ids


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends an answer."""
    return int(tokenizer.eos_token_id)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Any],
    *,
    max_prompt_length: int,
    long_prompts: LongPrompts = "cut",
) -> tuple[list[Prompt], list[int]]:
    """Frame and tokenise rows that have ``.prompt`` and maybe ``.columns``.

    A prompt over ``max_prompt_length`` tokens, frame included, loses tokens of its text from the left (``cut``) or is
    left out (``drop``); nothing of the frame is ever cut.

    Returns:
        The prompts, keyed by their place in ``rows``, and the places of those that were too long.
    """
    prompts: list[Prompt] = []
    too_long: list[int] = []
    for key, row in enumerate(rows):
        ids = encode(tokenizer, format_prompt(tokenizer, row.prompt))
        if len(ids) > max_prompt_length:
            too_long.append(key)
            if long_prompts == "drop":
                continue
            ids = _cut_left(tokenizer, row.prompt, max_prompt_length)
        prompts.append(Prompt(row.prompt, tuple(ids), key, dict(getattr(row, "columns", {}))))
    return prompts, too_long


class LazyPrompts(Sequence[Prompt]):
    """The prompts of ``rows``, each framed and tokenised, and cut to ``limit`` tokens, when it is asked for.

    ``digest`` names the contents of the rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], limit: int, digest: str) -> None:
        self.tokenizer, self.rows, self.limit, self.digest = tokenizer, rows, limit, digest

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...

    @overload
    def __getitem__(self, place: slice) -> list[Prompt]: ...

    def __getitem__(self, place: int | slice) -> Prompt | list[Prompt]:
        """One prompt, or several at once."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        ((prompt,), _) = encode_prompts(self.tokenizer, [self.rows[place]], max_prompt_length=self.limit)
        return replace(prompt, key=place)


def _cut_left(tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int) -> list[int]:
    content = encode(tokenizer, prompt)
    keep = limit - len(encode(tokenizer, format_prompt(tokenizer, "")))
    while keep > 0:
        text = str(tokenizer.decode(content[-keep:])).lstrip("\ufffd")
        ids = encode(tokenizer, format_prompt(tokenizer, text))
        if len(ids) <= limit:
            return ids
        keep -= len(ids) - limit
    raise DataError(
        f"max_prompt_length {limit} leaves no room for a prompt beside the model's own frame of "
        f"{len(encode(tokenizer, format_prompt(tokenizer, '')))} tokens; raise it."
    )


# --- padding and masks ----------------------------------------------------------------------------------------------


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """``(ids_BL, mask_BL)`` of ragged rows; the mask comes from lengths, never from comparing ids with ``pad_id``."""
    width = max(len(row) for row in rows)
    ids_BL = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask_BL = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids_BL[i, where] = torch.tensor(row, dtype=torch.long)
        mask_BL[i, where] = 1
    return ids_BL, mask_BL


def pad_values(rows: Sequence[Sequence[float]]) -> Tensor:
    """Ragged rows of numbers side by side, 0 where a row has ended. -> (B, T)"""
    if not rows:
        return torch.zeros(0, 0)
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def position_ids(mask_BL: Tensor) -> Tensor:
    """Positions counted from each row's first attended token, so that left padding changes nothing. -> (B, L)"""
    return (mask_BL.cumsum(-1) - 1).clamp_min(0)
