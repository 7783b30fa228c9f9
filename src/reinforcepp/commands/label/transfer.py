"""The commands ``label export`` and ``label import``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from reinforcepp.config import LabelExportConfig, LabelImportConfig
from reinforcepp.data import count
from reinforcepp.data.feedback import Choice, NewUnit, Store
from reinforcepp.data.feedback.answer_files import read_answers
from reinforcepp.data.feedback.exchange import (
    Imported,
    from_argilla,
    from_compare,
    from_label_studio,
    to_argilla,
    to_label_studio,
)
from reinforcepp.data.feedback.preferences import all_votes, preference_rows
from reinforcepp.data.sources import find_parts
from reinforcepp.errors import ConfigError, DataError
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.runtime.terminal import echo


def run_export(config: LabelExportConfig) -> None:
    """Write the votes to ``config.output``.

    Raises:
        ConfigError: The database can't be read, or the file can't be written.
        DataError: There are no votes.
    """
    output = check_output_file(config.output)
    if output.exists() and not config.overwrite:
        raise ConfigError(f"output: {output} already exists. Give another file, or --overwrite to replace it.")
    with closing(Store(config.database, create=False)) as store:
        if config.format == "trl":
            rows = list(preference_rows(store))
        else:
            convert = to_argilla if config.format == "argilla" else to_label_studio
            rows = [
                convert(unit, [each for each in casts if not each.repeat])
                for unit, casts in all_votes(store)
                if unit.gold is None
            ]
    if not rows:
        raise DataError(f"database: {config.database} has no votes to export. Collect some with reinforcepp label.")
    with whole_file(output, "xb") as file:
        file.write(_WRITERS[output.suffix.lower()](rows))
    echo(f"Wrote {len(rows)} rows to {output}", "green")


def run_import(config: LabelImportConfig) -> None:
    """Add the votes in ``config.data``.

    Raises:
        ConfigError: The database can't be used.
        DataError: The file can't be read, or has no votes.
    """
    votes = list(_votes_in(config.data, config.labeler))
    if not votes:
        raise DataError(
            f"data: {config.data} has no votes. Give a file of Argilla, Label Studio, compare, or of pairs."
        )
    with Store.opened(config.database) as store:
        added = store.add_votes(votes)
    names = len({name for _, name, _, _ in votes})
    echo(f"Added {len(votes)} votes of {names} labelers, on {added} new units, to {config.database}", "green")


def _votes_in(name: str, labeler: str) -> Iterator[Imported]:
    cells = [row for part in find_parts(name) for chunk in part.chunks() for _, row in chunk.rows]
    for needed, convert in _READERS:
        if cells and needed <= cells[0].keys():
            yield from _converted(name, cells, partial(convert, labeler=labeler))
            return
    for each in read_answers(name):
        if each.is_pair and len(each.answers) == 2:
            yield NewUnit("pair", each.prompt, each.answers, each.topic, each.columns), labeler, Choice(0), 0.0


def _converted(
    name: str, rows: Sequence[Mapping[str, Any]], convert: Callable[[Mapping[str, Any]], Iterable[Imported]]
) -> Iterator[Imported]:
    """Yield the votes in records; those that can't be used are skipped and reported."""
    problems = []
    for number, row in enumerate(rows, 1):
        try:
            votes = list(convert(row))
        except DataError as error:
            problems.append(f"record {number}: {error}")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # of another shape
            problems.append(f"record {number}: its parts aren't those of the format that its keys name.")
        else:
            yield from votes
    if problems:
        echo(f"{name}: skipped {count(len(problems), 'record')}. The first one, {problems[0]}", "yellow")


_READERS: Sequence[tuple[set[str], Callable[..., Iterable[Imported]]]] = (
    ({"fields", "responses"}, from_argilla),
    ({"data", "annotations"}, from_label_studio),
    ({"answer_a", "answer_b", "vote"}, from_compare),
)
"""Keys by which a format is known, and its reader."""


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as CSV; messages are JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _names(rows), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {name: json.dumps(cell) if isinstance(cell, (list, dict)) else cell for name, cell in row.items()}
        )
    return text.getvalue().encode()


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _json(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return (json.dumps(rows, ensure_ascii=False, indent=1) + "\n").encode()


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as Parquet. A column has one type, so one conversation makes all prompts and answers messages."""
    import pyarrow
    from pyarrow import parquet

    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    if any(isinstance(row["prompt"], list) for row in rows):
        rows = [{**row, **_as_messages(row, roles)} for row in rows]
    names = _names(rows)
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _as_messages(row: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, Any]:
    return {name: [{"role": role, "content": row[name]}] for name, role in roles.items() if isinstance(row[name], str)}


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


_WRITERS = {".csv": _csv, ".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}
