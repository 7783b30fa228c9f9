"""Tokenize prompts and answers in the chat template, truncate and pad them.

A conversation is tokenized as one text, as the chat template renders it, up to the token that ends the answer. A base model
without a template gets one from :mod:`reinforcepp.models.prompt_format`, which is saved with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from reinforcepp.errors import DataError
from reinforcepp.models.conversations import (
    Variables,
    as_messages,
    marked_example,
    marked_prompt,
    marked_turn,
    prefill,
    turn_format,
)
from reinforcepp.models.special_tokens import encode as encode
from reinforcepp.models.special_tokens import encode_all, marked, special_tokens
from reinforcepp.types import Conversation, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reinforcepp.data import PromptRow

LongPrompts = Literal["cut", "drop"]
BATCH_ROWS = 256


# --- conversations -----------------------------------------------------------------------------------------------------


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of plain or formatted text, with the tokenizer's prefix (BOS) exactly once.

    Special tokens in ``text`` are special, because formatted conversations have them.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of :func:`encode_text` for each text, tokenized together."""
    prefix = special_tokens(tokenizer).prefix
    return [ids if tuple(ids[: len(prefix)]) == prefix else [*prefix, *ids] for ids in encode_all(tokenizer, texts)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, **template_kwargs: Any) -> list[int]:
    """Return the token ids of a prompt in the chat template, with the generation prompt at the end.

    They are those of ``tokenizer.apply_chat_template(messages, add_generation_prompt=True, **template_kwargs)``, except that
    special tokens in the contents are encoded as plain text, and that a system message that the template rejects or omits is
    put before the first user message.

    Args:
        tokenizer: the model's tokenizer.
        prompt: messages (``role``, ``content``), or a text, which is a user message.
        template_kwargs: variables of the chat template, such as ``enable_thinking``, and ``tools``.

    Raises:
        ModelError: the template rejects the conversation.
    """
    return encode(tokenizer, marked_prompt(tokenizer, prompt, template_kwargs))


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Conversation, answer: str, **template_kwargs: Any
) -> list[int]:
    """Return the token ids of a whole conversation: the prompt, the answer, and the token that ends a turn.

    They are those of the chat template up to that token; the arguments, exceptions and errors are those of
    :func:`encode_prompt`. If the template would omit a part of the answer, such as its reasoning, the answer follows the
    generation prompt as it is.
    """
    return encode_example(tokenizer, prompt, answer, variables=template_kwargs)


def encode_turn(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    observation: Sequence[Mapping[str, Any]],
    variables: Variables | None = None,
) -> list[int]:
    """Return the tokens between the end token of an answer and the next answer: ``observation`` in the chat template.

    No earlier token is encoded again; see :func:`reinforcepp.models.conversations.marked_turn`, also for errors.
    """
    variables = variables or {}
    end, text = turn_format(tokenizer, variables).end, marked_turn(tokenizer, prompt, observation, variables)
    end_ids = encode(tokenizer, end)
    ids = encode(tokenizer, end + text)  # a tokenizer can treat the start of a text differently
    return ids[len(end_ids) :] if ids[: len(end_ids)] == end_ids else encode(tokenizer, text)


def split_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    answer: str,
    *,
    finished: bool = True,
    variables: Variables | None = None,
) -> tuple[list[int], list[int]]:
    """Return the token ids of the formatted prompt and of the answer, which ends with its end token if it is finished.

    The two are tokenized as one text. If a token contains the end of one and the start of the other, it belongs to the answer.
    """
    context, target = marked_example(tokenizer, prompt, answer, finished, variables or {})
    ids = encode(tokenizer, context + target)
    ids = [*ids, end_token_id(tokenizer, variables)] if finished else ids
    return _split(encode(tokenizer, context), ids)


def _split(context: list[int], ids: list[int]) -> tuple[list[int], list[int]]:
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(context, ids, strict=False)))
    return ids[:length], ids[length:]


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    answer: str,
    *,
    finished: bool = True,
    variables: Variables | None = None,
) -> list[int]:
    """Return the token ids of :func:`split_example` in one list."""
    ids = encode(tokenizer, "".join(marked_example(tokenizer, prompt, answer, finished, variables or {})))
    return [*ids, end_token_id(tokenizer, variables)] if finished else ids


class Answers(NamedTuple):
    """A prompt with some answers, and the variables of the chat template."""

    prompt: Conversation
    answers: Sequence[str]
    variables: Mapping[str, Any] = {}


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Answers], starts: Sequence[str] | None = None
) -> list[list[list[int]]]:
    """Return the token ids of :func:`encode_example` for every answer of every row.

    A prompt is formatted once, and all texts of ``rows`` are tokenized together, which fast tokenizers do in parallel.
    ``starts`` are the formatted prompts, if they are known.
    """
    texts: list[str] = []
    starts = starts or [marked_prompt(tokenizer, row.prompt, row.variables) for row in rows]
    for (prompt, answers, variables), start in zip(rows, starts, strict=True):
        texts += ["".join(marked_example(tokenizer, prompt, answer, True, variables, start)) for answer in answers]
    ids = iter(encode_all(tokenizer, texts))
    return [[[*next(ids), end_token_id(tokenizer, row.variables)] for _ in row.answers] for row in rows]


def count_tokens(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Answers]) -> list[tuple[int, int]]:
    """Return the number of tokens of each row's prompt, and of its longest conversation, 0 without answers."""
    starts = [marked_prompt(tokenizer, row.prompt, row.variables) for row in rows]
    prompts, examples = encode_all(tokenizer, starts), encode_examples(tokenizer, rows, starts)
    return [(len(ids), max(map(len, each), default=0)) for ids, each in zip(prompts, examples, strict=True)]


def split_examples(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Answers]) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of :func:`split_example` for the first answer of every row, tokenized together."""
    formatted = [marked_example(tokenizer, row.prompt, row.answers[0], True, row.variables) for row in rows]
    contexts = encode_all(tokenizer, [context for context, _ in formatted])
    whole = encode_all(tokenizer, ["".join(parts) for parts in formatted])
    return [
        _split(context, [*ids, end_token_id(tokenizer, row.variables)])
        for context, ids, row in zip(contexts, whole, rows, strict=True)
    ]


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokenizer's EOS id."""
    return int(tokenizer.eos_token_id)


def end_token_id(tokenizer: PreTrainedTokenizerBase, variables: Variables | None = None) -> int:
    """Return the id of the token that ends an answer in the chat template."""
    end = turn_format(tokenizer, variables).end
    return eos_token_id(tokenizer) if end == tokenizer.eos_token else int(tokenizer.convert_tokens_to_ids(end))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PromptRow],
    *,
    max_prompt_length: int,
    long_prompts: LongPrompts = "cut",
    on_progress: Callable[[float], None] = lambda share: None,
    variables: Variables | None = None,
) -> tuple[list[Prompt], list[int]]:
    """Format and tokenize the prompts of ``rows``.

    A prompt of more than ``max_prompt_length`` tokens, chat template included, is truncated (``cut``) or skipped (``drop``).
    Truncation removes the oldest turns but keeps the system message; if the last user message alone is too long, it loses the
    beginning of its text. The template's tokens are never truncated. ``variables`` of the chat template are those of rows that
    don't have them.

    Returns:
        The prompts, whose keys are their indices in ``rows``, and the indices of those that were too long.
    """
    rows = with_defaults(rows, variables)
    prompts: list[Prompt] = []
    too_long: list[int] = []
    for key, (row, ids) in enumerate(zip(rows, _prompt_ids(tokenizer, rows, on_progress), strict=True)):
        own = row.chat_template_kwargs
        if len(ids) > max_prompt_length:
            too_long.append(key)
            if long_prompts == "drop":
                continue
            ids = _truncated(tokenizer, row.conversation, max_prompt_length, own)
        known = (dict(row.columns), prefill(tokenizer, own), row.messages, own)
        prompts.append(Prompt(row.prompt, tuple(ids), key, *known))
    return prompts, too_long


def with_defaults(rows: Sequence[PromptRow], variables: Variables | None) -> Sequence[PromptRow]:
    """Return ``rows`` with values of the chat template's variables that they don't have."""
    if not variables:
        return rows
    return [replace(row, chat_template_kwargs={**variables, **row.chat_template_kwargs}) for row in rows]


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow], on_progress: Callable[[float], None]
) -> Iterator[list[int]]:
    """Yield the token ids of each row's whole prompt; the prompts of ``BATCH_ROWS`` rows are tokenized together."""
    for start in range(0, len(rows), BATCH_ROWS):
        on_progress(start / len(rows))
        yield from encode_all(
            tokenizer,
            [
                marked_prompt(tokenizer, row.conversation, row.chat_template_kwargs)
                for row in rows[start : start + BATCH_ROWS]
            ],
        )
    on_progress(1.0)


class LazyPrompts(Sequence[Prompt]):
    """Prompts that are formatted, tokenized and truncated to ``limit`` tokens on access.

    ``digest`` identifies the contents of ``rows``, and ``variables`` are as for :func:`encode_prompts`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[PromptRow],
        limit: int,
        digest: str,
        variables: Variables | None = None,
    ) -> None:
        self.tokenizer, self.rows, self.limit, self.digest = tokenizer, rows, limit, digest
        self.variables = variables

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
        rows, limit = [self.rows[index]], self.limit
        ((prompt,), _) = encode_prompts(self.tokenizer, rows, max_prompt_length=limit, variables=self.variables)
        return replace(prompt, key=index)


def _truncated(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, limit: int, variables: Variables) -> list[int]:
    messages = as_messages(prompt)
    system = messages[:1] if messages[0].get("role") == "system" else []
    questions = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    for start in questions[1:]:
        ids = encode_prompt(tokenizer, [*system, *messages[start:]], **variables)
        if len(ids) <= limit:
            return ids
    last = messages[questions[-1] :] if questions else messages[len(system) :]

    def with_text(text: str) -> list[int]:
        return encode_prompt(tokenizer, [*system, {**last[0], "content": text}, *last[1:]], **variables)

    template = len(with_text(""))
    content = encode(tokenizer, marked(tokenizer, str(last[0]["content"])))
    keep = limit - template
    while keep > 0:
        ids = with_text(str(tokenizer.decode(content[-keep:])).lstrip("\ufffd"))
        if len(ids) <= limit:
            return ids
        keep -= len(ids) - limit
    what = "the chat template and the system message have" if system else "the chat template alone has"
    raise DataError(
        f"max_prompt_length: {limit} leaves no room for a prompt, because {what} {template} tokens. Raise it."
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
