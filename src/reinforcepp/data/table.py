"""All records of a data setting in memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from reinforcepp.data.columns import ColumnNames, check_distinct, find_columns
from reinforcepp.data.rows import DEFAULT_MAX_BAD_ROWS, Row, check_bad_rows, make_rows, notes_on, text_columns
from reinforcepp.data.sources import RowSource, combined_digest, display_name, find_parts
from reinforcepp.data.unpaired import pair_answers


@dataclass(frozen=True)
class Table:
    """All records of a data setting.

    Attributes:
        source: Name for messages.
        sha256: Hash of the file's bytes; for several files, of their joined digests.
        columns: Names of the texts of a row.
        rows: All rows, usable or not.
        notes: Remarks for the user on how the data was read.
        num_records: Number of rows of the files, of which some can be paired.
    """

    source: str
    sha256: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    num_records: int = 0


def read_table(
    source: RowSource, names: ColumnNames, *, pairs: bool | None, max_bad_rows: float | None = DEFAULT_MAX_BAD_ROWS
) -> Table:
    """Read prompts, or pairs with their prompts.

    Args:
        source: Rows in memory, or names: a file, a folder of files, a folder that ``datasets`` saved, a pattern, a Hub
            dataset, or several of these separated by commas.
        names: Column names. If a default name is missing, a column with an equivalent name is used.
        pairs: Whether to read answers; None reads them if the data has answer columns.
        max_bad_rows: As for ``check_bad_rows``.

    Raises:
        ConfigError: Two of the names are the same.
        DataError: A file can't be read, isn't well-formed, lacks a column or has no row.
    """
    if pairs is not False:
        check_distinct(names)
    parts = find_parts(source)
    read = [(part, part.records()) for part in parts]
    layouts = [find_columns(part.path, records, names, pairs) for part, records in read]
    if pairs is None:
        pairs = any(layout.answers for layout in layouts)
        layouts = [find_columns(part.path, records, names, pairs) for part, records in read]
    rows: list[Row] = []
    conversions: Counter[str] = Counter()
    for (part, records), layout in zip(read, layouts, strict=True):
        rows += make_rows(part, records, layout, pairs, path_in_numbers=len(parts) > 1, conversions=conversions)
    name, notes = display_name(source, parts), tuple(notes_on(parts, layouts, conversions))
    check_bad_rows(name, [row for row in rows if row.unreadable], len(rows), max_bad_rows)
    columns = text_columns(layouts[0], names, pairs)
    return Table(name, combined_digest(parts), columns, tuple(pair_answers(rows, [])), notes, len(rows))
