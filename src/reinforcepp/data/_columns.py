"""Which column is which: the names that were set, the usual ones, or those that other tools give to the same thing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from reinforcepp.data._text import Records, quoted
from reinforcepp.errors import ConfigError, DataError, nearest


class ColumnNames(NamedTuple):
    """What the columns are set to be called; the defaults are the usual names."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


class Layout(NamedTuple):
    """The columns of a file. Without a prompt, chosen and rejected both begin with it; ``notes`` tell what was guessed."""

    prompt: str | None
    answers: tuple[str, str] | None
    notes: tuple[str, ...] = ()


USUAL = ColumnNames()
PROMPTS = ("question", "instruction", "query", "input", "context_messages", "messages", "conversations", "problem")
ANSWERS = (
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
    ("response_j", "response_k"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
    ("better", "worse"),
)


def check_distinct(names: ColumnNames) -> None:
    """Raises a ConfigError if two settings name one column."""
    flags: dict[str, str] = {}
    for flag, name in names._asdict().items():
        if name in flags:
            raise ConfigError(
                f"--{flags[name]}_column and --{flag}_column both name the column {name!r}; give each its own."
            )
        flags[name] = flag


def find_columns(path: Path, records: Records, names: ColumnNames, pairs: bool | None) -> Layout:
    """Where prompts and answers are.

    Args:
        path: The file, for messages.
        records: Its contents.
        names: What the columns are set to be called.
        pairs: Whether answers have to be there; None if that is for the file to show. Without pairs they matter only
            where the prompt is inside of them.

    Raises:
        DataError: A column isn't there, and there is no or more than one other that it may be.
    """
    wanted = (names.chosen, names.rejected)
    answers = _answers(path, records, wanted, told=pairs is not False)
    prompt, note = _prompt(path, records, names.prompt, answers)
    there = [name in records.names for name in wanted]
    # A name that the user chose is meant to be there, and one answer without the other is a mistake.
    if not answers and (pairs or (pairs is None and (any(there) or wanted != USUAL[1:]))):
        flag = "rejected" if there[0] else "chosen"
        raise _missing(path, records, flag, getattr(names, flag))
    notes = [note] if note else []
    if answers and answers != wanted and pairs is not False:
        notes.append(f"chosen and rejected from the columns {' and '.join(map(repr, answers))}")
    return Layout(prompt, answers, tuple(notes))


def _prompt(path: Path, records: Records, name: str, answers: tuple[str, str] | None) -> tuple[str | None, str | None]:
    """The column of the prompts, None if they are inside of the answers; and what to tell of it."""
    if name in records.names:
        return name, None
    others = [other for other in PROMPTS if other in records.names and other not in (answers or ())]
    if name != USUAL.prompt or not (others or answers):
        raise _missing(path, records, "prompt", name)
    if len(others) > 1:
        raise DataError(
            f"{path}: there is no column {name!r}, and the prompt may be in {quoted(others)}; "
            "name the one meant with --prompt_column."
        )
    if others:
        return others[0], f"prompts from the column {others[0]!r}"
    return None, f"prompts are what {' and '.join(map(repr, answers or ()))} begin with"


def _answers(path: Path, records: Records, wanted: tuple[str, str], *, told: bool) -> tuple[str, str] | None:
    """The columns of the answers, if they are there; more than one couple is an error where it would be ``told``."""
    if all(name in records.names for name in wanted):
        return wanted
    couples = [couple for couple in ANSWERS if all(name in records.names for name in couple)]
    if not couples or wanted != USUAL[1:]:
        return None
    if len(couples) > 1 and told:
        named = " or ".join(quoted(couple) for couple in couples)
        raise DataError(
            f"{path}: the answers may be in the columns {named}; name those meant with --chosen_column and "
            "--rejected_column."
        )
    return couples[0] if len(couples) == 1 else None


def _missing(path: Path, records: Records, flag: str, name: str) -> DataError:
    where = f"{path}, row {records.header_row}: the header" if records.header_row else f"{path}: the file"
    for spoken, separator in (records.separators or {}).items():
        if name in [each.strip().strip('"') for each in records.names[0].split(separator)]:
            start = where.partition(": ")[0]
            kind = {".tsv": "tabs"}.get(path.suffix.lower(), "commas")
            return DataError(f"{start}: cells are separated by {spoken}; save the file with {kind} instead.")
    return DataError(
        f"{where} has no column {name!r}, only {quoted(records.names)}; "
        f"rename the column meant or name it with --{flag}_column.{nearest(name, records.names)}"
    )
