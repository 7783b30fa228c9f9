"""What loading returns: prompts and texts as records, and the usable rows of a data setting with their summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from reinforcepp.data.readers import count
from reinforcepp.data.rows import HasWeight, Skipped, describe_skipped
from reinforcepp.types import Conversation, Messages, Preference, RowId

MAX_LISTED_CONTRADICTIONS = 3


@dataclass(frozen=True)
class PromptRow:
    """A prompt with the row's other cells.

    Attributes:
        prompt: The prompt's text.
        columns: Other cells by column, for reward functions.
        row: The row's number.
        weight: How often the row counts in training.
        messages: The prompt's messages; empty for a prompt that is a text.
        chat_template_kwargs: The row's variables of the chat template.
    """

    prompt: str
    columns: Mapping[str, Any]
    row: RowId = 0
    weight: float = 1.0
    messages: Messages = field(default=(), hash=False)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def conversation(self) -> Conversation:
        """The prompt as the chat template takes it."""
        return self.messages or self.prompt


@dataclass(frozen=True)
class SftRow:
    """A text to train on.

    Attributes:
        question: The prompt; None if the completion is plain text.
        completion: The answer, or the plain text.
        row: The row's number.
        weight: How often the row counts in training.
        messages: The prompt's messages; empty for a prompt that is a text.
        chat_template_kwargs: The row's variables of the chat template.
    """

    question: str | None
    completion: str
    row: RowId = 0
    weight: float = 1.0
    messages: Messages = field(default=(), hash=False)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def prompt(self) -> str:
        """The text that decides whether the row is held out; for plain text, the text itself."""
        return self.completion if self.question is None else self.question

    @property
    def conversation(self) -> Conversation:
        """The prompt as the chat template takes it."""
        return self.messages or self.prompt


R = TypeVar("R", bound=HasWeight)


@dataclass(frozen=True)
class LoadedData(Generic[R]):
    """The usable rows of a data setting.

    Attributes:
        source: Name for messages.
        sha256: Hash of the file's bytes; for several files and for built-in data, of their joined digests.
        rows: Usable rows, in the order of the file.
        skipped: Skipped rows.
        notes: Remarks for the user on how the data was read.
    """

    source: str
    sha256: str
    rows: Sequence[R]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()

    noun = "row"

    def summary(self) -> str:
        """Return, for example, ``my.csv: 24 rows; skipped 2 rows: 2 duplicates (rows 8, 9)``."""
        parts = [f"{Path(self.source).name}: {count(len(self.rows), self.noun)}", *self.notes]
        return "; ".join([*parts, describe_skipped(self.skipped)] if self.skipped else parts)


@dataclass(frozen=True)
class PreferenceData(LoadedData[Preference]):
    """Usable preference pairs; ``contradictions`` are the rows of pairs that prefer the same two answers both ways."""

    contradictions: tuple[tuple[RowId, RowId], ...] = ()

    noun = "usable pair"

    @property
    def pairs(self) -> Sequence[Preference]:
        """The rows."""
        return self.rows

    def summary(self) -> str:
        """Return the counts of usable, skipped and contradictory pairs."""
        text = super().summary()
        if not self.contradictions:
            return text
        listed = ", ".join(f"{first} and {second}" for first, second in self.contradictions[:MAX_LISTED_CONTRADICTIONS])
        more = ", ..." if len(self.contradictions) > MAX_LISTED_CONTRADICTIONS else ""
        return f"{text}; kept {count(len(self.contradictions), 'contradiction')} (rows {listed}{more})"


@dataclass(frozen=True)
class PromptData(LoadedData[PromptRow]):
    """Distinct prompts, in order of first appearance."""

    noun = "prompt"

    @property
    def prompts(self) -> Sequence[PromptRow]:
        """The rows."""
        return self.rows


@dataclass(frozen=True)
class TextData(LoadedData[SftRow]):
    """Texts for SFT."""
