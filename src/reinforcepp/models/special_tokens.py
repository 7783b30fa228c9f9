"""Special tokens: those that the tokenizer adds to a text, and those whose text occurs in the data.

The chat template writes special tokens, the data doesn't: the text of a special token in a prompt or an answer is encoded
as plain text, so that it can't end an answer or open another turn. Pairs of tags such as ``<think>`` and ``</think>``
are exempt, because models write them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from reinforcepp.runtime.terminal import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK, END_OF_MARK = "\ufdd0", "\ufdd1"
"""Noncharacters around the text of a special token that occurs in the data, until the text is encoded."""
SHOWN_CHARACTERS = 60
ANCHORS = ("\n", ".", "a")
"""Texts before another one, so that it isn't the first."""

log = logger(__name__)


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens of one tokenizer: the ``prefix`` that it puts before a text, its tags, and all others."""

    prefix: tuple[int, ...]
    tags: frozenset[str]
    others: frozenset[str]
    in_data: re.Pattern[str] | None
    """Matches a special token's text that isn't a tag."""
    adds_space_once: bool
    """Whether the tokenizer puts a space before a text, as SentencePiece does, but not after each special token."""
    reported: set[str]


_CACHE: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, SpecialTokens]] = WeakKeyDictionary()


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Return the special tokens of ``tokenizer``, cached until it gets more tokens."""
    size, found = _CACHE.get(tokenizer, (-1, None))
    if found is None or size != len(tokenizer):
        found = _special_tokens(tokenizer)
        _CACHE[tokenizer] = len(tokenizer), found
    return found


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    named = {str(text) for text in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if text}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | named
    special = {text for text in special if text.strip()}
    tags = frozenset(text for text in special - named if _partner(text) in special)
    others = frozenset(special - tags)
    longest_first = sorted(others, key=len, reverse=True)
    starts = "".join(sorted({text[0] for text in others}))  # spares most characters of a text hundreds of comparisons
    pattern = re.compile(f"(?=[{re.escape(starts)}])(?:{'|'.join(map(re.escape, longest_first))})") if others else None
    ids = {tokenizer.convert_tokens_to_ids(text) for text in special}
    prefix = tuple(takewhile(ids.__contains__, tokenizer("a")["input_ids"]))

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    alone, after_eos = encoded("a"), encoded(f"{tokenizer.eos_token}a")[1:]
    return SpecialTokens(prefix, tags, others, pattern, after_eos != alone, set())


def _partner(text: str) -> str | None:
    """Return the other tag of a pair, such as ``</think>`` for ``<think>``."""
    match = re.fullmatch(r"([<\[])(/?)([\w-]+)([>\]])", text)
    if match is None or (match[1] == "[" and "THINK" not in match[3]):  # [INST] and [/INST] belong to the chat template
        return None
    return f"{match[1]}{'' if match[2] else '/'}{match[3]}{match[4]}"


def marked(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return ``text`` of the data with marks around special tokens, which :func:`encode` then encodes as plain text."""
    special = special_tokens(tokenizer)
    if special.in_data is None or special.in_data.search(text) is None:
        return text

    def mark(match: re.Match[str]) -> str:
        if match[0] not in special.reported:
            special.reported.add(match[0])
            log.warning(
                "The text %r contains %r, a special token of the tokenizer. It was encoded as plain text, here and in all "
                "other texts.",
                text[max(0, match.start() - SHOWN_CHARACTERS) : match.end()],
                match[0],
            )
        return f"{MARK}{match[0]}{END_OF_MARK}"

    return special.in_data.sub(mark, text)


def unmarked(text: str) -> str:
    """Return ``text`` without the marks of :func:`marked`."""
    return re.sub(f"{MARK}([^{MARK}{END_OF_MARK}]*){END_OF_MARK}", r"\1", text) if MARK in text else text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of ``text`` without adding special tokens, because the chat template writes them."""
    if MARK not in text:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    special = special_tokens(tokenizer)
    structure = "|".join(map(re.escape, sorted(special.others | special.tags, key=len, reverse=True)))
    ids: list[int] = []
    plain = ""
    for piece in re.split(f"({MARK}[^{MARK}{END_OF_MARK}]*{END_OF_MARK}|{structure})", text):
        if piece in special.others or piece in special.tags:
            ids += [*_encode_plain(tokenizer, plain, first=not ids), tokenizer.convert_tokens_to_ids(piece)]
            plain = ""
        else:
            plain += unmarked(piece)
    return ids + _encode_plain(tokenizer, plain, first=not ids)


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of :func:`encode` for each text.

    Distinct texts without marks are tokenized together, which fast tokenizers do in parallel.
    """
    plain = list(dict.fromkeys(text for text in texts if text and MARK not in text))
    encoded = tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"] if plain else []
    ids = dict(zip(plain, encoded, strict=True))
    return [list(ids[text]) if text in ids else encode(tokenizer, text) for text in texts]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, *, first: bool) -> list[int]:
    """Return the token ids of ``text``, in which no special token is special; ``first`` if it isn't after one."""

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])

    if first or not special_tokens(tokenizer).adds_space_once:
        return ids_of(text) if text else []
    return _after(ids_of, text, anchors=ANCHORS)


def _after(ids_of: Callable[[str], list[int]], text: str, *, anchors: Sequence[str]) -> list[int]:
    """Return the token ids of ``text`` after the first anchor that isn't merged with its beginning."""
    for anchor in anchors:
        start, ids = ids_of(anchor), ids_of(anchor + text)
        if ids[: len(start)] == start:
            return ids[len(start) :]
    return ids_of(text)
