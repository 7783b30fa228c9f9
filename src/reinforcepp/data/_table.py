"""From data files to checked rows, and from those to the usable ones.

A row's number is the one that its reader gives it: the line on which it starts, as a text editor counts, in CSV, TSV
and JSONL files, its place from 1 in lists, Parquet and Arrow files. With several files, their names stand before it.

What concerns a file as a whole (encoding, quoting, columns, a row that isn't built like the others) is a ``DataError``,
because reading on would misread data. What concerns the contents of one row is a ``Skipped`` record.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcepp.data._columns import ColumnNames, Layout, check_distinct, find_columns
from reinforcepp.data._files import Part, parts_of
from reinforcepp.data._messages import TOLD, Pair, content_of, holds_conversation, pair_of, prompt_of
from reinforcepp.data._text import Records, count
from reinforcepp.types import RowId

_ROWS_NAMED = 5

_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"  # Thai, Lao, Japanese and Chinese put no spaces between words
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


@dataclass(frozen=True)
class Row:
    """One record: its number, its cells as the file has them by column, and the texts that are trained on, stripped.

    ``texts`` are the prompt and, of a pair, chosen and rejected; ``fault`` is why there are none. ``weight`` is how often
    it counts in training.
    """

    number: RowId
    cells: Mapping[str, Any]
    texts: tuple[str, ...]
    layout: Layout
    fault: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Table:
    """All records of ``source``; ``columns`` are what its texts are called, ``notes`` what the user should know of it.

    ``sha256`` is of the file's bytes; for several files, of their digests, joined.
    """

    source: str
    sha256: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was left out. ``reason`` reads well after a count; ``duplicate_of`` is the row that was kept."""

    row: RowId
    reason: str
    duplicate_of: RowId | None = None

    def __str__(self) -> str:
        """``row 9: duplicate of row 4``."""
        return f"row {self.row}: {self.reason}" + (f" of row {self.duplicate_of}" if self.duplicate_of else "")


def normalize(text: str) -> str:
    """The form in which texts are compared: Unicode NFC, each run of whitespace one space. Case counts."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def words(text: str) -> list[str]:
    """Return the words of a text, without case and punctuation."""
    return _WORD.findall(normalize(text).casefold())


def read_table(source: str | Path, names: ColumnNames, *, pairs: bool | None) -> Table:
    """Read prompts, or pairs with their prompts.

    Args:
        source: A file, a folder of such files or of a data set that ``datasets`` saved, a pattern, a data set of the hub,
            or several of these with commas between them.
        names: What the columns are called. Where the usual ones aren't there, others that mean the same are taken.
        pairs: Whether to read answers too; None does if there are columns with answers.

    Raises:
        ConfigError: Two of the names are the same.
        DataError: A file can't be read, isn't well-formed, lacks a column or has no row.
    """
    if pairs is not False:
        check_distinct(names)
    parts = parts_of(source)
    read = [(part, part.records()) for part in parts]
    layouts = [find_columns(part.path, records, names, pairs) for part, records in read]
    if pairs is None:
        pairs = any(layout.answers for layout in layouts)
        layouts = [find_columns(part.path, records, names, pairs) for part, records in read]
    rows: list[Row] = []
    seen: Counter[str] = Counter()
    for (part, records), layout in zip(read, layouts, strict=True):
        rows += rows_of(part, records, layout, pairs, path_in_numbers=len(parts) > 1, seen=seen)
    columns = (layouts[0].prompt or names.prompt, *((layouts[0].answers or ()) if pairs else ()))
    notes = tuple(notes_on(parts, layouts, seen))
    return Table(called(source, parts), digest_of(parts), columns, tuple(rows), notes)


def digest_of(parts: Sequence[Part]) -> str:
    """Hash of a file's bytes; of several, of their digests, joined."""
    digests = [part.digest() for part in parts]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def notes_on(parts: Iterable[Part], layouts: Iterable[Layout], seen: Counter[str]) -> Iterable[str]:
    """What the user should know of how the data was read."""
    yield from dict.fromkeys(note for layout in layouts for note in layout.notes)
    yield from (TOLD[key].format(count(number, "row")) for key, number in seen.items() if number)
    yield from (f"rows of {part.path.name} count {part.weight:g} times" for part in parts if part.weight != 1)


def called(source: str | Path, parts: Sequence[Part]) -> str:
    """How messages call the source."""
    first = parts[0].path
    if len(parts) == 1 or Path(source).is_dir():
        return str(source) if Path(source).exists() else str(first)
    return f"{first} and {count(len(parts) - 1, 'more file')}"


def rows_of(
    part: Part, records: Records, layout: Layout, pairs: bool, *, path_in_numbers: bool, seen: Counter[str]
) -> Iterable[Row]:
    """Rows with the texts that ``layout`` finds in them; ``seen`` counts what is to be told of them."""
    path = part.path
    for number, cells in records.rows:
        pair = _texts(cells, layout, f"{path}, row {number}", pairs, seen)
        texts = (pair.prompt, pair.chosen, pair.rejected) if pairs else (pair.prompt,)
        named: RowId = f"{path.name}:{number}" if path_in_numbers else number
        yield Row(named, cells, texts, layout, pair.fault, part.weight)


def _texts(cells: Mapping[str, Any], layout: Layout, where: str, pairs: bool, seen: Counter[str]) -> Pair:
    answers = [cells.get(name) for name in layout.answers or ()]
    prompt = content_of(cells.get(layout.prompt), layout.prompt, where) if layout.prompt else None
    # The prompt of a pair has to be the same for the reward model and for the policy, also where the answers say more
    # of it than the prompt column does.
    if pairs or prompt is None or (answers and holds_conversation(*answers)):
        chosen, rejected = (
            content_of(cell, name, where) for cell, name in zip(answers, layout.answers or (), strict=True)
        )
        return pair_of(prompt, chosen, rejected, seen)
    return prompt_of(prompt, seen)


def filter_rows(
    rows: Iterable[Row], columns: Sequence[str], fault: Callable[[Sequence[str]], str | None] = lambda texts: None
) -> tuple[list[Row], tuple[Skipped, ...]]:
    """Divide rows into the usable ones and those left out: an empty text, a fault, or a repetition of an earlier row.

    Args:
        rows: What ``read_table`` gave.
        columns: What the rows' texts are called.
        fault: Given a row's normalised texts, what is wrong with them, if anything.
    """
    kept: list[Row] = []
    skipped: list[Skipped] = []
    first_rows: dict[tuple[str, ...], RowId] = {}
    for row in rows:
        texts = tuple(map(normalize, row.texts))
        reason = unusable(row, texts, columns) or fault(texts)
        if reason:
            skipped.append(Skipped(row.number, reason))
        elif texts in first_rows:
            skipped.append(Skipped(row.number, "duplicate", duplicate_of=first_rows[texts]))
        else:
            first_rows[texts] = row.number
            kept.append(row)
    return kept, tuple(skipped)


def unusable(row: Row, texts: Sequence[str], columns: Sequence[str]) -> str | None:
    """Why nothing can be learned from a row with these ``texts``, normalised; None if something can."""
    return row.fault or next((f"empty {name}" for name, text in zip(columns, texts, strict=True) if not text), None)


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """``left out 3 rows: 1 empty chosen (row 5), 2 duplicates (rows 8, 9)``; an empty string for none."""
    if not skipped:
        return ""
    parts = []
    for reason, number in Counter(each.reason for each in skipped).items():
        rows = [str(each.row) for each in skipped if each.reason == reason]
        named = ", ".join(rows[:_ROWS_NAMED]) + (", ..." if number > _ROWS_NAMED else "")
        label = count(number, reason) if reason == "duplicate" else f"{number:,} {reason}"
        parts.append(f"{label} ({'row' if number == 1 else 'rows'} {named})")
    return f"left out {count(len(skipped), 'row')}: {', '.join(parts)}"
