"""Preferences by criterion, such as helpful and safe: find their columns, and read a row's judgments.

A criterion is judged by a pair of columns with ratings of the two answers (``chosen_helpful`` and ``rejected_helpful``,
``chosen-rating`` and ``rejected-rating``, ``response_1_safe`` and ``response_2_safe``), by a pair of columns with objects of
ratings (``chosen_annotations``), or by one column that names the better answer or holds a signed number.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reinforcepp.config.criteria import Criterion
from reinforcepp.data.limits import parse_json
from reinforcepp.data.messages import UnusableCell
from reinforcepp.data.readers import Records, quoted
from reinforcepp.errors import DataError, nearest, setting, shown
from reinforcepp.types import Judgment

FILLERS = frozenset(("rating", "ratings", "score", "scores", "response", "answer", "completion", "reward", "is"))
"""Words in a column's name that say only that it rates an answer."""
OBJECTS = frozenset(("annotation", "annotations", "rating", "ratings", "score", "scores", "attributes", "aspects"))
"""Words of columns that hold an object with the ratings of an answer by criterion."""
RATINGS = ("rating", "score", "value")
"""Keys of the number in an object that rates one answer, as in UltraFeedback."""
TIES = ("tie", "equal", "same")
MISSING = ("", "none", "nan", "null", "n/a", "na")
SHOWN_CHARACTERS = 40


class Grade(NamedTuple):
    """How much better the chosen answer of a pair is.

    Attributes:
        margin: Difference of scores that training asks for.
        tie: Whether both answers are equally good.
        weight: Factor of the pair's loss.
    """

    margin: float = 0.0
    tie: bool = False
    weight: float = 1.0


class CriterionColumns(NamedTuple):
    """The columns of a criterion.

    Attributes:
        name: Of the criterion.
        columns: Ratings of chosen and rejected, or one column with judgments; empty if the pair's own label is the judgment.
        answers: Names of the answer columns.
        key: Key of the rating in objects.
        lower_is_better: Whether the answer with the lower number is preferred.
        margins: Whether the size of a number, or the difference of two ratings, is the margin.
    """

    name: str
    columns: tuple[str, ...]
    answers: tuple[str, str]
    key: str | None = None
    lower_is_better: bool = False
    margins: bool = False


def find_criteria(
    path: Path, records: Records, answers: tuple[str, str], criteria: Sequence[Criterion], *, margins: bool
) -> tuple[CriterionColumns, ...]:
    """Return the columns of each criterion.

    Raises:
        DataError: A criterion has no columns, or several pairs of columns could be its ratings.
    """
    return tuple(_find(path, records, answers, criterion, margins) for criterion in criteria)


def _find(
    path: Path, records: Records, answers: tuple[str, str], criterion: Criterion, margins: bool
) -> CriterionColumns:
    made = CriterionColumns(criterion.name, (), answers, None, criterion.lower_is_better, margins)
    column = criterion.column
    if column == answers[0] or (column == "chosen" and column not in records.names):
        if criterion.lower_is_better:
            raise DataError(
                f"{path}: {setting('criteria')} -{column} isn't a criterion, because {column} is an answer. Name a column with "
                "ratings."
            )
        return made
    if column in records.names and column not in answers:
        cells = dict(records.rows[0][1]) if records.rows else {}
        if "generations" in records.names and isinstance(_parsed(cells.get(column)), list):
            raise DataError(
                f"{path}: {column!r} rates the answers in the order of 'generations', not chosen and rejected. Write the "
                f"ratings to {f'{answers[0]}_{column}'!r} and {f'{answers[1]}_{column}'!r}."
            )
        return made._replace(columns=(column,))
    pairs = _rating_pairs(records.names, answers)
    wanted = _words(column)
    found = [pair for words, pair in pairs if words == wanted]
    found = found or [pair for words, pair in pairs if _plain(words) and _plain(words) == _plain(wanted)]
    if len(found) > 1:
        named = " or ".join(quoted(pair) for pair in found)
        raise DataError(
            f"{path}: several columns could rate {column!r}: {named}. Rename those that should not be used, or drop them."
        )
    if found:
        return made._replace(columns=found[0])
    for words, pair in pairs:
        if (
            set(words)
            and set(words) <= OBJECTS
            and any(column in _object(cells.get(pair[0])) for _, cells in records.rows)
        ):
            return made._replace(columns=pair, key=column)
    known = suggested(records, answers)
    hint = f"The file rates {quoted(known)}." if known else "Name its column, as in NAME=COLUMN."
    raise DataError(
        f"{path}: no column {column!r} and no ratings of it, such as {f'{answers[0]}_{column}'!r} and "
        f"{f'{answers[1]}_{column}'!r}, for {setting('criteria')} {criterion.name}. {hint}{nearest(column, known)}"
    )


def suggested(records: Records, answers: tuple[str, str]) -> list[str]:
    """Return names of criteria that the first row rates, or judges with the name of an answer."""
    cells = records.rows[0][1] if records.rows else {}
    found = []
    for words, pair in _rating_pairs(records.names, answers):
        with contextlib.suppress(UnusableCell):
            if words and None not in (_number(cells.get(pair[0]), ""), _number(cells.get(pair[1]), "")):
                found.append("_".join(words))
        if set(words) and set(words) <= OBJECTS:
            found += [str(key) for key in _object(cells.get(pair[0]))]
    found += [
        name
        for name, cell in cells.items()
        if name not in answers and str(cell).strip().lower() in ("chosen", "rejected")
    ]
    return list(dict.fromkeys(found))


def _rating_pairs(names: Sequence[str], answers: tuple[str, str]) -> list[tuple[tuple[str, ...], tuple[str, str]]]:
    """Return pairs of columns whose names differ as those of the answers do, after the other words of their names."""
    first, second = map(_words, answers)
    differing = [word for word in first if word not in second], [word for word in second if word not in first]
    markers = [("chosen", "rejected")]
    if all(len(words) == 1 for words in differing):
        markers.append((differing[0][0], differing[1][0]))
    by_words = {_words(name): name for name in names if name not in answers}
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for one, other in markers:
        for words, name in by_words.items():
            partner = by_words.get(tuple(other if word == one else word for word in words))
            if one in words and partner is not None:
                found[name, partner] = tuple(word for word in words if word != one)
    return [(words, pair) for pair, words in found.items()]


def _words(name: str) -> tuple[str, ...]:
    """Return the words of a column's name: ``chosenRating``, ``chosen-rating`` and ``chosen_rating`` have the same."""
    return tuple(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("-", "_").replace(".", "_").split("_"))


def _plain(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in words if word not in FILLERS)


# --- cells ------------------------------------------------------------------------------------------------------------


def read_judgments(
    cells: Mapping[str, Any], criteria: Sequence[CriterionColumns], grade: Grade, chosen: Any = None
) -> tuple[Judgment, ...]:
    """Return the judgment of a row by each criterion.

    Args:
        cells: The row.
        criteria: The columns of the criteria.
        grade: Of the pair itself.
        chosen: The cell of the chosen answer, if it can be in either answer column.

    Raises:
        UnusableCell: A cell holds neither a judgment nor a rating.
    """
    judgments = [_judgment(cells, criterion, grade) for criterion in criteria]
    if not criteria or chosen is None:
        return tuple(judgments)
    first, second = (cells.get(name) for name in criteria[0].answers)
    swapped = chosen is second and chosen is not first
    return tuple(
        each._replace(side=-each.side) if swapped and criterion.columns and each.side else each
        for criterion, each in zip(criteria, judgments, strict=True)
    )


def used_columns(criteria: Sequence[CriterionColumns]) -> Iterator[str]:
    """Yield the names of the columns that criteria read."""
    for criterion in criteria:
        yield from criterion.columns


def _judgment(cells: Mapping[str, Any], criterion: CriterionColumns, grade: Grade) -> Judgment:
    columns = criterion.columns
    if not columns:
        return Judgment(0 if grade.tie else 1, grade.margin)
    if len(columns) == 1:
        return _decision(cells.get(columns[0]), criterion)
    ratings = [_number(_entry(cells.get(name), criterion.key), name) for name in columns]
    return _compared(ratings[0], ratings[1], criterion)


def _compared(chosen: float | None, rejected: float | None, criterion: CriterionColumns) -> Judgment:
    if chosen is None or rejected is None:
        return Judgment(None)
    difference = rejected - chosen if criterion.lower_is_better else chosen - rejected
    return Judgment((difference > 0) - (difference < 0), abs(difference) if criterion.margins else 0.0)


def _decision(cell: Any, criterion: CriterionColumns) -> Judgment:
    """Return the judgment in one cell: a word, a number whose sign counts, or the ratings of both answers."""
    column, answers = criterion.columns[0], criterion.answers
    parsed = _parsed(cell)
    if isinstance(parsed, list) and len(parsed) == 2:
        return _compared(_number(parsed[0], column), _number(parsed[1], column), criterion)
    if isinstance(parsed, dict):
        for one, other in (answers, ("chosen", "rejected")):
            if one in parsed and other in parsed:
                return _compared(_number(parsed[one], column), _number(parsed[other], column), criterion)
    word = str(cell).strip().lower() if isinstance(cell, str) else None
    words = {**dict.fromkeys(TIES, 0), "chosen": 1, "rejected": -1, answers[0].lower(): 1, answers[1].lower(): -1}
    if _words(column)[-1] in ("id", "index") and word in (None, "0", "1") and cell in (0, 1, "0", "1"):
        side = 1 - 2 * int(cell)  # the number of the better answer, as in PKU-SafeRLHF
        return Judgment(-side if criterion.lower_is_better else side)
    if word in words:
        side = words[word]
        return Judgment(-side if criterion.lower_is_better else side)
    # True doesn't say which answer is better: it can mean "the chosen one", "the first one is good" or "both are".
    if isinstance(cell, bool) or word in ("true", "false"):
        raise _unusable(cell, column, judgment=True)
    number = _number(cell, column, judgment=True)
    return _compared(number, None if number is None else 0.0, criterion)


def _number(cell: Any, column: str, *, judgment: bool = False) -> float | None:
    """Return a number in a cell, None if it is empty; an object can hold it under a key such as ``Rating``."""
    if isinstance(cell, Mapping):
        lower = {str(key).lower(): value for key, value in cell.items()}
        cell = next((lower[key] for key in RATINGS if key in lower), cell)
    if cell is None or (isinstance(cell, str) and cell.strip().lower() in MISSING):
        return None
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError):
        lowered = str(cell).strip().lower()
        if lowered not in ("true", "false"):
            raise _unusable(cell, column, judgment=judgment) from None
        number = float(lowered == "true")
    if math.isinf(number):
        raise _unusable(cell, column, judgment=judgment)
    return None if math.isnan(number) else number


def _unusable(cell: Any, column: str, *, judgment: bool) -> UnusableCell:
    wanted = "chosen, rejected, tie or a number" if judgment else "a number"
    return UnusableCell(
        f"without {wanted} in {column!r}", f"{column!r} holds {shown(cell, SHOWN_CHARACTERS)}, expected {wanted}"
    )


def _entry(cell: Any, key: str | None) -> Any:
    return cell if key is None else _object(cell).get(key)


def _object(cell: Any) -> Mapping[str, Any]:
    parsed = _parsed(cell)
    return parsed if isinstance(parsed, Mapping) else {}


def _parsed(cell: Any) -> Any:
    """Return the list or the object in a cell, which can also be written as JSON text."""
    if isinstance(cell, str) and cell.strip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):
            return parse_json(cell)
    return cell
