"""Records that rules, reports and fixes share: the checked rows, the findings and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from reinforcepp.data import Skipped, count, normalize
from reinforcepp.monitoring.turns import turn_lines
from reinforcepp.types import Conversation, Messages, RowId

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

_MAX_LISTED = 5
_MAX_EXAMPLES = 3
_EXCERPT_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class UsableRow:
    """A row that training would use.

    Attributes:
        row: The row's number.
        texts: Prompt, chosen and rejected, or the prompt alone.
        messages: The prompt's messages; empty for a prompt that is a text.
        chat_template_kwargs: The row's variables of the chat template.
    """

    row: RowId
    texts: tuple[str, ...]
    messages: Messages = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The prompt."""
        return self.texts[0]

    @property
    def conversation(self) -> Conversation:
        """The prompt as the chat template takes it."""
        return self.messages or self.prompt


@dataclass(frozen=True)
class CheckedFile:
    """A file as the rules see it.

    Attributes:
        name: The file's name.
        columns: Names of a row's texts.
        num_rows: Number of rows, usable or not.
        rows: Usable rows.
        skipped: Rows that training skips.
    """

    name: str
    columns: tuple[str, ...]
    num_rows: int
    rows: tuple[UsableRow, ...]
    skipped: tuple[Skipped, ...]

    @property
    def noun(self) -> str:
        """``prompt`` or ``pair``."""
        return "prompt" if len(self.columns) == 1 else "pair"


@dataclass(frozen=True)
class Finding:
    """One problem of a file, for any number of rows.

    Attributes:
        rule: Name of the rule.
        severity: error, warning or info.
        file: The file's name.
        message: The problem, without a period.
        fix: What to do, an imperative clause without a period.
        rows: Affected rows.
        pairs: If a row is affected because of another one, (that row, the other).
        examples: Short excerpts of the data, each one line or one for each turn of a conversation.
        fixable: Whether a cleaned copy removes the problem.
    """

    rule: str
    severity: Severity
    file: str
    message: str
    fix: str
    rows: tuple[RowId, ...] = ()
    pairs: tuple[tuple[RowId, RowId], ...] = ()
    examples: tuple[str, ...] = ()
    fixable: bool = False

    def __str__(self) -> str:
        """Return problem and fix."""
        return f"{self.message}. {self.fix}."

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the file format calls the fix ``cure``."""
        return {"cure" if name == "fix" else name: value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class FileSummary:
    """How many rows of a file are usable."""

    file: str
    noun: str
    rows: int
    usable: int


@dataclass(frozen=True)
class Change:
    """A row that the cleaned copy drops or changes; ``before`` and ``after`` hold the texts that differ."""

    row: RowId
    action: Literal["changed", "dropped"]
    reason: str
    before: Mapping[str, str]
    after: Mapping[str, str] | None = None


@dataclass(frozen=True)
class LintReport:
    """All findings on ``data``, the most severe first. Iterate over it for the findings.

    Attributes:
        data: The data's name.
        files: Numbers of usable rows.
        findings: Each problem, with the rows that have it.
        changes: Rows that the fixed copy drops or changes, if one was written.
    """

    data: str
    files: tuple[FileSummary, ...]
    findings: tuple[Finding, ...]
    changes: tuple[Change, ...] = ()

    def __iter__(self) -> Iterator[Finding]:
        """Yield the findings."""
        return iter(self.findings)

    def __len__(self) -> int:
        """Return the number of findings."""
        return len(self.findings)

    @property
    def worst(self) -> Severity | None:
        """The severity of the worst finding: error, warning or info; None if there is none."""
        return self.findings[0].severity if self.findings else None

    @property
    def rows(self) -> tuple[RowId, ...]:
        """The rows with a finding, in order of the findings: indices, or row numbers of a file."""
        return tuple(dict.fromkeys(row for finding in self.findings for row in finding.rows))

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings by severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}

    def fails(self, threshold: str) -> bool:
        """Return whether a finding is at least as severe as ``threshold``; never for ``never``."""
        counted = {"error": ("error",), "warning": ("error", "warning")}.get(threshold, ())
        return any(self.counts[severity] for severity in counted)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "data": self.data,
            "files": [asdict(file) for file in self.files],
            "counts": self.counts,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def first_few(parts: Iterable[str], limit: int = _MAX_LISTED) -> str:
    """Return ``a, b, c``, followed by ``, ...`` if there are more than ``limit``."""
    listed = list(parts)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")


def count_with_verb(number: int, noun: str, singular: str, plural: str) -> str:
    """Return, for example, ``1 row has`` or ``3 rows have``."""
    return f"{count(number, noun)} {singular if number == 1 else plural}"


def list_rows(rows: Sequence[RowId]) -> str:
    """Return ``row 4`` or ``rows 4, 9``."""
    return f"{'row' if len(rows) == 1 else 'rows'} {first_few(map(str, rows))}"


def examples(parts: Iterable[tuple[RowId, str]]) -> tuple[str, ...]:
    """Return the first few rows with an excerpt of their text, each on one line."""
    return tuple(f"row {row}: {excerpt(text)}" for row, text in list(parts)[:_MAX_EXAMPLES])


def prompt_examples(rows: Iterable[UsableRow]) -> tuple[str, ...]:
    """Return the prompts of the first few rows: an excerpt on one line, or a conversation with one line for each turn."""
    return tuple(
        "\n".join([f"row {row.row}:", *turn_lines(row.messages, _EXCERPT_CHARACTERS)])
        if len(row.messages) > 1
        else f"row {row.row}: {excerpt(row.prompt)}"
        for row in list(rows)[:_MAX_EXAMPLES]
    )


def excerpt(text: str, position: int = 0) -> str:
    """Return a part of a text on one line: its beginning, or the surroundings of ``position``."""
    start = max(0, position - _EXCERPT_CHARACTERS // 3)
    part = normalize(text[start : start + _EXCERPT_CHARACTERS])
    return ("..." if start else "") + part + ("..." if len(text) > start + _EXCERPT_CHARACTERS else "")
