"""What is looked at and what is found: plain records that rules, reports and fixes share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from reinforcepp.data import Skipped, count, normalize
from reinforcepp.types import RowId

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

_NAMED = 5
_EXAMPLES = 3
_EXCERPT = 100


@dataclass(frozen=True)
class Entry:
    """A row that training would use: its number in the file, and its prompt, chosen and rejected, or its prompt alone."""

    row: RowId
    texts: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The first of the texts."""
        return self.texts[0]


@dataclass(frozen=True)
class Sheet:
    """A file as the rules see it. ``columns`` names the texts of an entry; ``skipped`` is what training leaves out."""

    name: str
    columns: tuple[str, ...]
    rows: int
    entries: tuple[Entry, ...]
    skipped: tuple[Skipped, ...]

    @property
    def noun(self) -> str:
        """What an entry is called."""
        return "prompt" if len(self.columns) == 1 else "pair"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a file, however many rows it is about.

    ``pairs`` holds, where a row is at fault because of another one, (that row, the other), ``examples`` short pieces of
    the data. ``fixable`` tells whether a cleaned copy is without it.
    """

    rule: str
    severity: Severity
    file: str
    message: str
    cure: str
    rows: tuple[RowId, ...] = ()
    pairs: tuple[tuple[RowId, RowId], ...] = ()
    examples: tuple[str, ...] = ()
    fixable: bool = False

    def __str__(self) -> str:
        """The finding as one sentence."""
        return f"{self.message}; {self.cure}."


@dataclass(frozen=True)
class Checked:
    """How much of a file is usable."""

    file: str
    noun: str
    rows: int
    usable: int


@dataclass(frozen=True)
class Report:
    """Everything that was found in ``data``, the most severe first."""

    data: str
    files: tuple[Checked, ...]
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings of each severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}

    def fails(self, threshold: str) -> bool:
        """Whether something is as severe as ``threshold`` or more; nothing is for ``never``."""
        counted = {"error": ("error",), "warning": ("error", "warning")}.get(threshold, ())
        return any(self.counts[severity] for severity in counted)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "data": self.data,
            "files": [asdict(file) for file in self.files],
            "counts": self.counts,
            "findings": [asdict(finding) for finding in self.findings],
        }


def first_few(parts: Iterable[str], limit: int = _NAMED) -> str:
    """``a, b, c``, and ``, ...`` where there are more than a message can hold."""
    listed = list(parts)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")


def several(number: int, noun: str, one: str, many: str) -> str:
    """``1 row has``, ``3 rows have``."""
    return f"{count(number, noun)} {one if number == 1 else many}"


def named(rows: Sequence[RowId]) -> str:
    """``row 4`` or ``rows 4, 9``."""
    return f"{'row' if len(rows) == 1 else 'rows'} {first_few(map(str, rows))}"


def examples(parts: Iterable[tuple[RowId, str]]) -> tuple[str, ...]:
    """The first few rows with a piece of their text, each on one line."""
    return tuple(f"row {row}: {excerpt(text)}" for row, text in list(parts)[:_EXAMPLES])


def excerpt(text: str, place: int = 0) -> str:
    """A piece of a text on one line: its beginning, or what is around ``place``."""
    start = max(0, place - _EXCERPT // 3)
    piece = normalize(text[start : start + _EXCERPT])
    return ("..." if start else "") + piece + ("..." if len(text) > start + _EXCERPT else "")
