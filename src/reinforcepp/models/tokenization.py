"""Format conversations with the chat template, tokenize and pad them.

The tokenizer's chat template formats every text in training and inference. A base model without one gets
``PLAIN_TEMPLATE``, which is saved with the model. Prompt and completion are tokenized separately, so that a token
boundary lies between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from reinforcepp.errors import DataError, ModelError
from reinforcepp.models.special_tokens import MARK, encode_after, marked, special_tokens, unmarked
from reinforcepp.models.special_tokens import encode as encode
from reinforcepp.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}Question: {{ m['content'] }}\n"
    "{% elif m['role'] == 'assistant' %}Answer: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
PROBE_PROMPT, PROBE_ANSWER = "How do I see my routes?", "Run ip route."
"""A question and its answer, by which the chat template shows how it writes a turn."""

LongPrompts = Literal["cut", "drop"]


# --- prompt format --------------------------------------------------------------------------------------------------


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return ``PLAIN_TEMPLATE``, after the special tokens that ``tokenizer`` puts before a text, such as BOS."""
    prefix = str(tokenizer.decode(list(special_tokens(tokenizer).prefix)))
    return "{{ '" + prefix.replace("'", "\\'") + "' }}" + PLAIN_TEMPLATE if prefix else PLAIN_TEMPLATE


def format_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return ``prompt`` in the chat template, with the generation prompt at the end."""
    return unmarked(_format_prompt(tokenizer, prompt))


def _format_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    return _render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """Return ``messages`` in the chat template; special tokens in their contents are marked."""
    conversation = [{**message, "content": marked(tokenizer, message["content"])} for message in messages]
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt))


def format_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Return ``messages`` in the chat template, with the generation prompt at the end.

    Each message has ``role`` and ``content``; the last one is the user's. If the template doesn't support a system message,
    its text is put before the first user message.

    Raises:
        ModelError: the template rejects the conversation.
    """
    return unmarked(_format_conversation(tokenizer, messages))


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the token ids of :func:`format_conversation`."""
    return encode(tokenizer, _format_conversation(tokenizer, messages))


def _format_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    from jinja2 import TemplateError

    def formatted(conversation: Sequence[Mapping[str, str]]) -> str:
        return _render(tokenizer, conversation, add_generation_prompt=True)

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


@dataclass(frozen=True)
class Turn:
    """How a chat template writes an answer after the generation prompt.

    Attributes:
        before: text between the generation prompt and the answer, such as a space or an empty ``<think></think>``.
        after: text between the answer and its end token.
        end: text of the token that ends an answer; EOS if the template writes none.
        dropped: end of the generation prompt that isn't part of a whole conversation, such as ``<think>``.
        prefill: start of the answer that the generation prompt writes: an open tag such as ``<think>``.
    """

    before: str
    after: str
    end: str
    dropped: str
    prefill: str


_TURNS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, Turn]] = WeakKeyDictionary()
OPEN_TAG = re.compile(r"<([\w-]+)>\s*\Z")
THOUGHT = re.compile(r"\s*<([\w-]+)>")


def turn_format(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """Return how the tokenizer's chat template writes an answer.

    Raises:
        ModelError: the template omits the answer, or formats a prompt differently if an answer follows.
    """
    template = str(tokenizer.chat_template)
    cached, turn = _TURNS.get(tokenizer, ("", None))
    if turn is None or cached != template:
        turn = _turn_format(tokenizer)
        _TURNS[tokenizer] = template, turn
    return turn


def _turn_format(tokenizer: PreTrainedTokenizerBase) -> Turn:
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": PROBE_PROMPT}, {"role": "assistant", "content": PROBE_ANSWER}]
    try:
        start, whole = _format_prompt(tokenizer, PROBE_PROMPT), _render(tokenizer, messages)
    except (TemplateError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ModelError(f"The chat template can't format a prompt and an answer ({reason}). Fix it.") from error
    if PROBE_ANSWER not in whole:
        raise ModelError("The chat template omits the message of the role assistant. Write it in the template.")
    context = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(start, whole, strict=False)))
    if PROBE_PROMPT in start and PROBE_PROMPT not in context:
        raise ModelError(
            "The chat template formats a prompt differently if a completion follows it, so training and inference would "
            "differ. Use a template that writes both alike up to the end of the prompt."
        )
    before, _, tail = whole[len(context) :].rpartition(PROBE_ANSWER)
    end = _end_token(tokenizer, tail)
    after = tail.partition(end)[0]
    dropped, prefill = start[len(context) :], ""
    if (tag := OPEN_TAG.search(start)) is not None:
        name, is_thought = tag[1], bool(dropped) or f"</{tag[1]}>" in before
        prefill = tag[0] if (is_thought or name.startswith(("think", "reason"))) and f"</{name}>" not in tail else ""
    return Turn(before, after, end, dropped, prefill)


def _end_token(tokenizer: PreTrainedTokenizerBase, tail: str) -> str:
    """Return the first special token in the text after an answer, or any other added token, otherwise EOS."""
    added = [tokenizer.added_tokens_decoder[i] for i in encode(tokenizer, tail) if i in tokenizer.added_tokens_decoder]
    added = sorted((token for token in added if token.content.strip()), key=lambda token: not token.special)
    return added[0].content if added else str(tokenizer.eos_token)


def format_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, finished: bool = True
) -> tuple[str, str]:
    """Return the formatted prompt, and the text that follows it for ``answer``, without its end token.

    The template writes the answer of a finished turn. If it would omit a part of the answer, as templates do that remove
    the reasoning, the answer follows the generation prompt as it is, as does one that was truncated. If the generation
    prompt opens a tag such as ``<think>`` that the answer doesn't have, the formatted prompt ends before the tag.
    """
    context, target = _format_example(tokenizer, prompt, answer, finished)
    return unmarked(context), unmarked(target)


def _format_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, finished: bool, start: str | None = None
) -> tuple[str, str]:
    """Return the marked texts of :func:`format_example`; ``start`` is the formatted prompt, if it is known."""
    turn, start = turn_format(tokenizer), _format_prompt(tokenizer, prompt) if start is None else start
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    answer = marked(tokenizer, answer)
    if finished:
        whole = _render(tokenizer, messages)
        context = start if whole.startswith(start) else start.removesuffix(turn.dropped)
        written = whole[len(context) :]
        written = written.rpartition(turn.end)[0] if turn.end in written else written
        if whole.startswith(context) and _contains(written, answer) and not _adds_thought(turn, written, answer):
            return context, written
    after = turn.after if finished else ""
    tag = turn.prefill.strip()
    if tag and answer.lstrip().startswith(tag):
        return start, answer.lstrip().removeprefix(tag).lstrip("\n") + after
    if tag and tag.replace("<", "</") in answer:
        return start, answer + after
    before = turn.before if not turn.before.strip() else ""
    return start.removesuffix(turn.dropped), before + answer + after


def _contains(text: str, answer: str) -> bool:
    return answer.strip() in text or "".join(answer.split()) in "".join(text.split())


def _adds_thought(turn: Turn, written: str, answer: str) -> bool:
    """Return whether the template put an empty thought before an answer that begins with one."""
    return bool(turn.before.strip() and THOUGHT.match(answer) and written.startswith(turn.before))


def format_completion(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> str:
    """Return the text after the formatted prompt for the answer ``answer``, without its end token.

    Raises:
        ModelError: the template omits the answer, or formats a prompt differently if an answer follows.
    """
    return format_example(tokenizer, prompt, answer)[1]


# --- tokens ---------------------------------------------------------------------------------------------------------


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of plain or formatted text, with the tokenizer's prefix (BOS) exactly once.

    Special tokens in ``text`` are special, because formatted conversations have them.
    """
    prefix, ids = special_tokens(tokenizer).prefix, encode(tokenizer, text)
    return ids if tuple(ids[: len(prefix)]) == prefix else [*prefix, *ids]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of :func:`format_prompt`."""
    return encode(tokenizer, _format_prompt(tokenizer, prompt))


def split_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, finished: bool = True
) -> tuple[list[int], list[int]]:
    """Return the token ids of the formatted prompt and of the answer, which ends with its end token if it is finished."""
    written, target = _format_example(tokenizer, prompt, answer, finished)
    context = encode(tokenizer, written)
    ids = encode_after(tokenizer, context, target)
    return context, [*ids, end_token_id(tokenizer)] if finished else ids


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, finished: bool = True) -> list[int]:
    """Return the token ids of :func:`split_example` in one list."""
    context, target = split_example(tokenizer, prompt, answer, finished=finished)
    return context + target


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, Sequence[str]]]
) -> list[list[list[int]]]:
    """Return the token ids of :func:`encode_example` for every answer of prompts with their answers.

    A prompt is formatted once, and all texts of ``rows`` are tokenized together, which fast tokenizers do in parallel.
    """
    formatted: list[list[tuple[str, str]]] = []
    for prompt, answers in rows:
        start = _format_prompt(tokenizer, prompt)
        formatted.append([_format_example(tokenizer, prompt, answer, True, start) for answer in answers])
    # After a prompt, such a tokenizer encodes an answer differently than alone; texts with marks need care, too.
    batched = not special_tokens(tokenizer).adds_space
    texts = dict.fromkeys(text for row in formatted for example in row for text in example) if batched else {}
    plain = [text for text in texts if text and MARK not in text]
    encoded = tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else []
    ids, end = dict(zip(plain, encoded, strict=True)), end_token_id(tokenizer)

    def joined(context: str, target: str) -> list[int]:
        start = ids[context] if context in ids else encode(tokenizer, context)
        return [*start, *(ids[target] if target in ids else encode_after(tokenizer, start, target)), end]

    return [[joined(*example) for example in row] for row in formatted]


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokenizer's EOS id."""
    return int(tokenizer.eos_token_id)


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends an answer in the chat template."""
    end = turn_format(tokenizer).end
    return eos_token_id(tokenizer) if end == tokenizer.eos_token else int(tokenizer.convert_tokens_to_ids(end))


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
        ids = encode_prompt(tokenizer, row.prompt)
        if len(ids) > max_prompt_length:
            too_long.append(key)
            if long_prompts == "drop":
                continue
            ids = _truncate_left(tokenizer, row.prompt, max_prompt_length)
        columns = dict(getattr(row, "columns", {}))
        prompts.append(Prompt(row.prompt, tuple(ids), key, columns, prefill(tokenizer)))
    return prompts, too_long


def prefill(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the start of an answer that the generation prompt writes, such as ``<think>``; usually empty."""
    try:
        return turn_format(tokenizer).prefill
    except ModelError:  # generation works with a template that can't format whole conversations
        return ""


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
    content = encode(tokenizer, marked(tokenizer, prompt))
    keep = limit - len(encode_prompt(tokenizer, ""))
    while keep > 0:
        text = str(tokenizer.decode(content[-keep:])).lstrip("\ufffd")
        ids = encode_prompt(tokenizer, text)
        if len(ids) <= limit:
            return ids
        keep -= len(ids) - limit
    raise DataError(
        f"max_prompt_length: {limit} leaves no room for a prompt, because the chat template alone has "
        f"{len(encode_prompt(tokenizer, ''))} tokens. Raise it."
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
