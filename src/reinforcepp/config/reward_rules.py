"""Rewards that need no model: the rules behind ``rule:NAME?OPTION=VALUE&OPTION=VALUE``. Imports no torch.

Each rule is a frozen record of its options. It is called like any reward function and scores completions. ``name`` is the
name of its scores in the metrics. ``None`` means that the rule doesn't score a completion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

import regex

from reinforcepp.config.spec_options import read_options
from reinforcepp.errors import ConfigError, RewardError, nearest, shown

UNITS = ("tokens", "words", "characters")
FINAL_ANSWER = "####"
"""Marker before the final answer in GSM8K."""
MATCH_TIMEOUT_SECONDS = 10.0
"""CPU time in which a pattern must search one text."""
WORD_BREAK = regex.compile(r"\b", regex.WORD | regex.VERSION1)
_FLAG = regex.compile("[\U0001f1e6-\U0001f1ff]")
"""A regional indicator: two of them are a flag."""


def without_flags(text: str) -> str:
    """Return ``text`` with a bullet for each letter of a flag, which breaks words in the same places.

    In a run of such letters, ``regex`` counts back to its start at every letter.
    """
    return _FLAG.sub("\u2022", text)


class PlainText:
    """Marks reward functions that read texts, even if a prompt is a conversation."""

    plain_text = True


@dataclass(frozen=True)
class Length(PlainText):
    """Score 1 from ``min`` to ``max`` ``unit``; it falls linearly to 0 at length 0 and at twice ``max``."""

    min: int = 0
    max: int | None = None
    unit: str = "tokens"
    name: str = "length"

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.unit not in UNITS:
            raise ConfigError(f"unit must be one of {', '.join(UNITS)}, not {self.unit!r}.{nearest(self.unit, UNITS)}")
        if self.min < 0:
            raise ConfigError(f"min must be at least 0, not {self.min}.")
        if self.max is not None and self.max < 1:
            raise ConfigError(f"max must be at least 1, not {self.max}.")
        if self.max is not None and self.min > self.max:
            raise ConfigError(f"min {self.min} is above max {self.max}. Lower min or raise max.")

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: Sequence[Sequence[int]] = (), **_: Any
    ) -> list[float | None]:
        """Return scores from 0 to 1."""
        if self.unit == "tokens":
            return [self._of(len(ids)) for ids in completion_ids]
        return [self._of(len(words(text) if self.unit == "words" else text.strip())) for text in completions]

    def _of(self, length: int) -> float:
        if length < self.min:
            return length / self.min
        if self.max is not None and length > self.max:
            return max(0.0, 2 - length / self.max)
        return 1.0


@dataclass(frozen=True)
class Regex(PlainText):
    """Score 1 if ``pattern`` is found, otherwise 0."""

    pattern: str
    name: str = "regex"

    def __post_init__(self) -> None:
        """Check the pattern."""
        compiled(self.pattern)

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        """Return 0 or 1 for each completion."""
        return [float(next(matches(self.name, self.pattern, text.strip()), None) is not None) for text in completions]


@dataclass(frozen=True)
class Format(PlainText):
    """Score 1 if a completion is its ``tags`` in this order, each once, with text inside and nothing else; otherwise 0."""

    tags: str = "think,answer"
    name: str = "format"

    def __post_init__(self) -> None:
        """Check the names of the tags."""
        for tag in self.tags.split(","):
            if not re.fullmatch(r"[\w-]+", tag):
                raise ConfigError(
                    f"tags must be names separated by commas, as in think,answer, not {shown(self.tags)}."
                )

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        """Return 0 or 1 for each completion."""
        tags = self.tags.split(",")
        inside = rf"((?:(?!</?(?:{'|'.join(tags)})>).)*)"
        pattern = re.compile(r"\s*".join(rf"<{tag}>{inside}</{tag}>" for tag in tags), re.DOTALL)
        matches = [pattern.fullmatch(text.strip()) for text in completions]
        return [float(match is not None and all(part.strip() for part in match.groups())) for match in matches]


@dataclass(frozen=True)
class ExactMatch(PlainText):
    """Score 1 if a completion matches the data's ``column``, otherwise 0; a row without a value there isn't scored.

    With a ``pattern``, its last match (its first group, if any) is compared instead of the whole text, on both sides; a value
    in the data that doesn't match is compared as it is. Without one, the text after the last ``####`` is compared if there
    is one, as in GSM8K.

    Numbers are compared as numbers. Other text is compared without regard to case, extra spaces and a final period.
    """

    column: str = "answer"
    pattern: str | None = None
    name: str = "exact_match"

    def __post_init__(self) -> None:
        """Check the pattern."""
        if self.pattern is not None:
            compiled(self.pattern)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """Return 0 or 1, or None for a row without a value."""
        if self.column not in columns:
            there = sorted(set(columns) - {"completion_ids", "finish_reason"})
            raise ConfigError(
                f"{self.name}: column {self.column!r} not found in the data, which has "
                f"{', '.join(there) or 'only the prompt'}. Add it, or set the option column.{nearest(self.column, there)}"
            )
        return [
            None
            if wanted is None or not str(wanted).strip()
            else float(
                (answer := self._answer(text)) is not None and comparable(answer) == comparable(self._wanted(wanted))
            )
            for text, wanted in zip(completions, columns[self.column], strict=True)
        ]

    def _wanted(self, value: Any) -> Any:
        answer = self._answer(value) if isinstance(value, str) else None
        return value if answer is None else answer

    def _answer(self, text: str) -> str | None:
        if self.pattern is None:
            return text.rpartition(FINAL_ANSWER)[2]
        found = list(matches(self.name, self.pattern, text.strip()))
        if not found:
            return None
        return (found[-1][1] or "") if found[-1].re.groups else found[-1][0]


@dataclass(frozen=True)
class Repetition(PlainText):
    """Score minus the fraction of word n-grams that occurred before in the same completion: 0 to -1."""

    n: int = 3
    name: str = "repetition"

    def __post_init__(self) -> None:
        """Check the number of words."""
        if self.n < 1:
            raise ConfigError(f"n must be at least 1, not {self.n}.")

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        """Return scores from -1 to 0."""
        return [-repeated_share(text, self.n) for text in completions]


@dataclass(frozen=True)
class SoftOverlongPunishment(PlainText):
    """Score 0 up to ``max_completion_len - soft_punish_cache`` tokens; it falls linearly to -1 at ``max_completion_len``.

    The options are named as in TRL's ``get_soft_overlong_punishment``. [DAPO, arXiv 2503.14476 Eq. 13]
    """

    max_completion_len: int
    soft_punish_cache: int
    name: str = "soft_overlong_punishment"
    constant_at_first = True

    def __post_init__(self) -> None:
        """Check the lengths."""
        if self.max_completion_len < 1:
            raise ConfigError(f"max_completion_len must be at least 1, not {self.max_completion_len}.")
        if not 0 <= self.soft_punish_cache <= self.max_completion_len:
            raise ConfigError(
                f"soft_punish_cache must be from 0 to max_completion_len ({self.max_completion_len}), not "
                f"{self.soft_punish_cache}."
            )

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: Sequence[Sequence[int]] = (), **_: Any
    ) -> list[float | None]:
        """Return scores from -1 to 0."""
        return [self._of(len(ids)) for ids in completion_ids]

    def _of(self, length: int) -> float:
        excess = length - (self.max_completion_len - self.soft_punish_cache)
        if excess <= 0:
            return 0.0
        return -excess / self.soft_punish_cache if length <= self.max_completion_len else -1.0


Rule = Length | Regex | Format | ExactMatch | Repetition | SoftOverlongPunishment
RULES: dict[str, type[Rule]] = {
    "length": Length,
    "regex": Regex,
    "format": Format,
    "exact_match": ExactMatch,
    "repetition": Repetition,
    "soft_overlong_punishment": SoftOverlongPunishment,
}
EXAMPLES = {
    "regex": "pattern=^Yes",
    "soft_overlong_punishment": "max_completion_len=1024&soft_punish_cache=256",
}
"""Options of the rules that require some."""


def make_rule(text: str) -> Rule:
    """Return the rule that ``NAME?OPTION=VALUE&OPTION=VALUE`` means. Values aren't URL-decoded.

    Raises:
        ConfigError: If a rule or an option isn't found, a value is invalid, or a required option is missing.
    """
    name, _, options = text.partition("?")
    if name not in RULES:
        raise ConfigError(f"rule:{text}: rule {name!r} not found, only {', '.join(RULES)}.{nearest(name, RULES)}")
    try:
        given = read_options(RULES[name], options)
        for option in fields(RULES[name]):
            if option.default is MISSING and option.name not in given:
                raise ConfigError(f"option {option.name} is missing. Add it, as in rule:{name}?{EXAMPLES[name]}.")
        return RULES[name](**given)
    except ConfigError as error:
        raise ConfigError(f"rule:{text}: {error}") from None


@cache
def compiled(pattern: str) -> regex.Pattern[str]:
    """Return the compiled ``pattern``, which has the syntax of ``re``.

    The search is that of ``regex``, which has a timeout and lets other threads run. Texts of a policy can make the search of a
    harmless-looking pattern take years.

    Raises:
        ConfigError: If it isn't a regular expression.
    """
    try:
        re.compile(pattern)
        return regex.compile(_FOR_REGEX.sub(_escaped, pattern), regex.VERSION0)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"pattern {shown(pattern)} isn't a regular expression ({error}). Correct it.") from error


_FOR_REGEX = re.compile(
    r"\\N\{[^}]*\}|\\."  # an escaped character stays as it is
    r"|\[\^?\]?(?:\\.|[^\]\\])*\]"  # a set of characters, which can begin with a bracket
    r"|\{(?!\d+,?\d*\}|,\d*\})",  # not a number of repetitions
    re.DOTALL,
)


def _escaped(match: re.Match[str]) -> str:
    """Escape what ``regex`` would read as its own syntax: ``{e}`` as an approximate match, ``[[:alpha:]]`` as letters."""
    text = match[0]
    if text.startswith("["):
        return "[" + re.sub(r"(\\.)|\[", lambda part: part[1] or r"\[", text[1:], flags=re.DOTALL)
    return rf"\{text}" if text == "{" else text


def matches(name: str, pattern: str, text: str) -> Iterator[regex.Match[str]]:
    """Yield the matches of ``pattern`` in ``text``; ``name`` is that of the rule, for messages.

    Raises:
        RewardError: If the search takes longer than ``MATCH_TIMEOUT_SECONDS``.
    """
    try:
        yield from compiled(pattern).finditer(text, timeout=MATCH_TIMEOUT_SECONDS, concurrent=True)
    except TimeoutError as error:
        raise RewardError(
            f"Reward rule {name}: the pattern {shown(pattern)} needs more than {MATCH_TIMEOUT_SECONDS:g} seconds for the text "
            f"{shown(text, 60)}. Write a pattern that can match a text in only one way: not a repetition inside a repetition, "
            "as in (a+)+, and not several of .* in a row."
        ) from error


def comparable(value: Any) -> str | Decimal:
    """Return ``value`` as a number if it is one, otherwise as normalized text."""
    text = " ".join(str(value).split()).rstrip(".").casefold()
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return text
    return number if number.is_finite() else text


def words(text: str) -> list[str]:
    """Return the words of ``text`` by Unicode word breaks, which need no spaces; a piece without letters is a word, too."""
    found = []
    for piece, plain in zip(text.split(), without_flags(text).split(), strict=True):
        parts = [part for part in WORD_BREAK.split(plain) if any(map(str.isalnum, part))]
        found += parts or [piece]
    return found


def repeated_share(text: str, length: int) -> float:
    """Return the fraction of n-grams of ``length`` words that occurred before in ``text``; 0 for short texts."""
    found = words(text)
    ngrams = [tuple(found[i : i + length]) for i in range(len(found) - length + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
