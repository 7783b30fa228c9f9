"""From data files to checked rows: texts, skipped rows, the held-out split and row weights.

With several files, a row's number carries the file's name: ``b.jsonl:5``.

A problem of the whole file (encoding, quoting, columns, a row of another width) is a ``DataError``, because reading on
would misread data. A problem of one row's contents is a ``Skipped`` record.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

import regex

from reinforcepp.data.columns import ANSWER_FLAGS, ColumnLayout, ColumnNames, parse_label
from reinforcepp.data.criteria import Grade, read_judgments
from reinforcepp.data.dialogues import Message
from reinforcepp.data.limits import parse_json
from reinforcepp.data.messages import (
    CONVERSION_NOTES,
    Content,
    Pair,
    UnusableCell,
    are_conversations,
    pair_from,
    parse_content,
    prompt_from,
)
from reinforcepp.data.readers import Records, count, quoted
from reinforcepp.data.sources import DataPart, is_builtin
from reinforcepp.data.verdicts import Choice
from reinforcepp.errors import ConfigError, DataError, setting, shown
from reinforcepp.types import Judgment, Messages, Preference, RowId

DEFAULT_MAX_BAD_ROWS = 0.01
"""Default share of rows that can be skipped because a cell holds something else than text or messages."""
# A small file can have this many such rows, but no more than a quarter of its rows.
_FEW_BAD_ROWS, _FEW_BAD_SHARE = 3, 4
_MAX_LISTED_ROWS = 5
_MAX_LISTED_REASONS = 20

_SHOWN_CHARACTERS = 40
UNGRADED = Grade()
"""Grade of a pair without a margin or weight that isn't a tie."""
TRUE, FALSE = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no", "none", "nan")
"""Texts of a cell that holds a boolean; pandas writes 1.0 and nan."""

# Thai, Lao, Japanese and Chinese don't separate words with spaces, so each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
_MANY_MARKS = regex.compile(r"\p{M}{30}")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


@dataclass(frozen=True)
class Row:
    """One record of a file.

    Attributes:
        number: The row's number.
        cells: Cells by column, as in the file.
        texts: Training texts as in the file: the prompt and, for a pair, chosen and rejected.
        layout: The columns of the row's file.
        problem: Why the row has no usable texts, if so.
        weight: How often the row counts in training.
        unreadable: For a cell that holds something else than text or messages, the problem with its value.
        messages: The prompt's messages; empty for a prompt that is a text.
        chat_template_kwargs: The row's variables of the chat template.
        grade: Of a pair.
        good: For a single answer that is to be paired, whether it is a good one. Both answers in ``texts`` are this one.
        judgments: Preferences of a pair by criterion.
        answers: For a pair of single answers, the rows of the file.
    """

    number: RowId
    cells: Mapping[str, Any]
    texts: tuple[str, ...]
    layout: ColumnLayout
    problem: str | None = None
    weight: float = 1.0
    unreadable: str | None = None
    messages: Messages = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    grade: Grade = UNGRADED
    good: bool | None = None
    judgments: tuple[Judgment, ...] = ()
    answers: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """A skipped row; ``reason`` is worded to follow a count, ``duplicate_of`` is the row that was kept."""

    row: RowId
    reason: str
    duplicate_of: RowId | None = None

    def __str__(self) -> str:
        """Return, for example, ``row 9: duplicate of row 4``."""
        return f"row {self.row}: {self.reason}" + (
            f" of row {self.duplicate_of}" if self.duplicate_of is not None else ""
        )


def normalize(text: str) -> str:
    """Return the form in which texts are compared: Unicode NFC, each run of whitespace one space. Case counts."""
    # NFC sorts the marks of a character one by one: with a hundred thousand of them, that takes minutes.
    return " ".join(unicodedata.normalize("NFC", _MANY_MARKS.sub("\\g<0>\u034f", text)).split())


def text_digest(*texts: str) -> bytes:
    """Return a hash that stands for the texts in a dictionary, which would otherwise hold a normalized copy of all data."""
    joined = "".join(f"{len(text)}:{text}" for text in texts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=16).digest()


def is_unspaced(character: str) -> bool:
    """Return whether a character belongs to a script that doesn't separate words with spaces, or to its punctuation."""
    return re.match(f"[{_UNSPACED}\u3000-\u303f\uff00-\uffef]", character) is not None


def words(text: str) -> list[str]:
    """Return the words of a text, without case and punctuation."""
    return _WORD.findall(normalize(text).casefold())


# --- reading ----------------------------------------------------------------------------------------------------------


def check_bad_rows(source: str, bad: Sequence[Row], total: int, limit: float | None) -> None:
    """Raise a DataError if more rows than ``limit`` hold something else than text or messages.

    Args:
        source: Name of the data for the message.
        bad: Those rows.
        total: Number of all rows.
        limit: A number of rows, or below 1 a share of them, which allows a few rows of a small file, too. None allows
            any number.
    """
    if limit is None:
        return
    allowed = limit if limit >= 1 or not limit else max(limit * total, min(_FEW_BAD_ROWS, total // _FEW_BAD_SHARE))
    if len(bad) > allowed:
        first = bad[0].number
        where = first if isinstance(first, str) else f"{source}:{first}"
        raise DataError(
            f"{where}: {bad[0].unreadable}. {len(bad)} of {count(total, 'row')} have such cells. Correct them, name another "
            f"column, or skip the rows: drop them with `reinforcepp lint --fix`, or raise {setting('max_bad_rows')}."
        )


def text_columns(layout: ColumnLayout, names: ColumnNames, pairs: bool) -> tuple[str, ...]:
    """Return the names of a row's texts."""
    answers = ANSWER_FLAGS if layout.unpaired else layout.answers or ()
    return (layout.prompt or names.prompt, *(answers if pairs else ()))


def notes_on(parts: Sequence[DataPart], layouts: Iterable[ColumnLayout], conversions: Counter[str]) -> Iterator[str]:
    """Yield remarks for the user on how the data was read."""
    layouts = list(layouts)
    yield from dict.fromkeys(part.note for part in parts if part.note)
    yield from dict.fromkeys(note for layout in layouts for note in layout.notes)
    unused = [name for layout in layouts for name in layout.unused]
    if unused and not all(is_builtin(part.path) for part in parts):
        yield f"unused columns {quoted(dict.fromkeys(unused))}"
    yield from (CONVERSION_NOTES[key].format(count(number, "row")) for key, number in conversions.items() if number)
    yield from (f"rows of {part.path.name} count {part.weight:g} times" for part in parts if part.weight != 1)


def make_rows(
    part: DataPart,
    records: Records,
    layout: ColumnLayout,
    pairs: bool,
    *,
    path_in_numbers: bool,
    conversions: Counter[str],
) -> Iterator[Row]:
    """Yield rows with the texts of the columns in ``layout``; ``conversions`` counts rows for ``notes_on``."""
    path = part.path
    for number, cells in records.rows:
        unreadable, variables, grade, good = None, dict[str, Any](), UNGRADED, None
        judgments: tuple[Judgment, ...] = ()
        try:
            check_text_only(cells)
            choice = layout.judged.choose(cells) if layout.judged else None
            pair, variables = (
                _texts(cells, layout, pairs, conversions, choice),
                template_variables(cells, layout.prompt),
            )
            grade = pair_grade(cells, layout.weighted) if pairs and not layout.unpaired else grade
            grade = grade._replace(margin=0.0, tie=True) if choice and choice.tie else grade
            good = parse_label(cells.get(layout.label)) if layout.unpaired and layout.label else None
            judgments = read_judgments(cells, layout.criteria, grade, choice.chosen if choice else None)
        except UnusableCell as error:
            pair, unreadable = Pair("", problem=error.reason), str(error)
        texts = (pair.prompt, pair.chosen, pair.rejected) if pairs else (pair.prompt,)
        row_id: RowId = f"{path.name}:{number}" if path_in_numbers else number
        problem = pair.problem
        if judgments and all(judgment.side is None for judgment in judgments):
            problem = problem or "without a judgment by any criterion"
        more = (problem, part.weight, unreadable, pair.messages, variables, grade, good, judgments)
        yield Row(row_id, cells, texts, layout, *more)


_MEDIA = ("image", "video", "audio")


def check_text_only(cells: Mapping[str, Any]) -> None:
    """Raise an UnusableCell if a row has images, videos or audio in a column of that name."""
    for name in (*_MEDIA, *(f"{each}s" for each in _MEDIA)):
        cell = cells.get(name)
        # A text in a column of this name can be a description.
        if cell and (isinstance(cell, list | dict | bytes) or (isinstance(cell, str) and name.endswith("s"))):
            problem = f"{name!r} holds {name.removesuffix('s')} data, but only text is supported"
            raise UnusableCell(f"with {name.removesuffix('s')} data in {name!r}", problem)


def template_variables(cells: Mapping[str, Any], prompt: str | None = "prompt") -> dict[str, Any]:
    """Return the variables of the chat template: those of the column ``chat_template_kwargs``, and the column ``tools``.

    OpenAI writes the tools next to the messages of the ``prompt``.
    """
    asked = cells.get(prompt) if prompt else None
    if isinstance(asked, Mapping) and "messages" in asked and not cells.get("tools"):
        cells = {**cells, "tools": asked.get("tools")}
    variables, tools = (
        _json_cell(cells, name, kind) for name, kind in (("chat_template_kwargs", dict), ("tools", list))
    )
    return {**(variables or {}), **({"tools": tools} if tools else {})}


def pair_grade(cells: Mapping[str, Any], weighted: bool) -> Grade:
    """Return the grade of a pair from the columns ``margin``, ``tie`` and, if pairs are ``weighted``, ``weight``."""
    margin, tie = _number(cells, "margin", 0.0), str(cells.get("tie") or "").strip().lower()
    weight = _number(cells, "weight", 1.0) if weighted else 1.0
    if weight < 0:
        raise UnusableCell("with a negative weight", f"'weight' holds {weight:g}, expected at least 0")
    if tie not in (*TRUE, *FALSE, ""):
        raise UnusableCell(
            "with a tie that is neither true nor false", f"'tie' holds {shown(tie)}, expected true or false"
        )
    return Grade(0.0, True, weight) if tie in TRUE else Grade(margin, False, weight)


def _number(cells: Mapping[str, Any], name: str, empty: float) -> float:
    """Return the number in the column ``name``; ``empty`` if there is none."""
    cell = cells.get(name)
    try:
        value = empty if cell is None or not str(cell).strip() else float(cell)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise UnusableCell(f"with a {name} that isn't a number", f"{name!r} holds {shown(cell)}, expected a number")
    return value


def _json_cell(cells: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    """Return an object or a list in the column ``name``, which can also be written as JSON text; None if it is empty."""
    cell = cells.get(name)
    if isinstance(cell, str) and cell.strip():
        with contextlib.suppress(ValueError):
            cell = parse_json(cell)
    if not cell or isinstance(cell, kind):
        return cell or None
    expected = "an object" if kind is dict else "a list"
    raise UnusableCell(
        f"without {expected} in {name!r}",
        f"{name!r} holds {shown(cell, _SHOWN_CHARACTERS)}, expected {expected} as JSON",
    )


def _texts(
    cells: Mapping[str, Any], layout: ColumnLayout, pairs: bool, conversions: Counter[str], choice: Choice | None
) -> Pair:
    if layout.label:
        label = cells.get(layout.label)
        if label is None or not str(label).strip():
            return Pair("", problem=f"with an empty {layout.label}")
        if (good := parse_label(label)) is None:
            problem = f"{layout.label!r} holds {str(label)[:_SHOWN_CHARACTERS]!r}, expected true or false"
            raise UnusableCell(f"with a {layout.label} that is neither true nor false", problem)
        if not good and not layout.unpaired:
            return Pair("", problem=f"with {layout.label} false")
    if pairs and choice and choice.problem:
        return Pair("", problem=choice.problem)
    answers = [choice.chosen, choice.rejected] if choice else [cells.get(name) for name in layout.answers or ()]
    prompt = _prompt_cell(cells, layout)
    before = _earlier_messages(cells, layout)
    # A pair's prompt must be the same for the reward model and the policy, even if the answers contain more of the
    # conversation than the prompt column.
    if pairs or prompt is None or (answers and are_conversations(*answers)):
        chosen, rejected = (parse_content(cell, name) for cell, name in zip(answers, layout.answers or (), strict=True))
        return pair_from(prompt, chosen, rejected, conversions, before)
    return prompt_from(prompt, conversions, before)


def _prompt_cell(cells: Mapping[str, Any], layout: ColumnLayout) -> Content | None:
    """Return the prompt, with the texts of the columns that follow it."""
    if layout.prompt is None:
        return None
    prompt = parse_content(cells.get(layout.prompt), layout.prompt)
    for name in layout.inputs:
        more = parse_content(cells.get(name), name)
        if not more:
            continue
        if not (isinstance(prompt, str) and isinstance(more, str)):
            raise _no_plain_text(name if isinstance(prompt, str) else layout.prompt)
        prompt = f"{prompt}\n{more}" if prompt else more
    return prompt


def _earlier_messages(cells: Mapping[str, Any], layout: ColumnLayout) -> list[Message]:
    """Return the system message and the earlier turns of columns of their own."""
    found = []
    if layout.system:
        content = parse_content(cells.get(layout.system), layout.system)
        if not isinstance(content, str):
            raise _no_plain_text(layout.system)
        found += [Message("system", content)] if content else []
    for turn in (cells.get(layout.history) or []) if layout.history else []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            problem = f"{layout.history!r} holds a turn that isn't a question and an answer"
            raise UnusableCell(f"with an odd turn in {layout.history!r}", problem)
        found += [Message("user", turn[0]), Message("assistant", turn[1])]
    return found


def _no_plain_text(column: str) -> UnusableCell:
    return UnusableCell(f"with messages in {column!r}", f"{column!r} holds a list of messages, expected text")


# --- usable and skipped rows ------------------------------------------------------------------------------------------


def filter_rows(
    rows: Iterable[Row],
    columns: Sequence[str],
    find_problem: Callable[[Sequence[str]], str | None] = lambda texts: None,
) -> tuple[list[Row], tuple[Skipped, ...]]:
    """Divide rows into usable and skipped ones: with an empty text, a problem, or a repetition of an earlier row.

    Args:
        rows: Rows of a table.
        columns: Names of the rows' texts.
        find_problem: Returns what is wrong with a row's normalized texts, if anything.
    """
    kept: list[Row] = []
    skipped: list[Skipped] = []
    first_rows: dict[bytes, RowId] = {}
    for row in rows:
        texts = tuple(map(normalize, row.texts))
        key = text_digest(*identity(texts, row.chat_template_kwargs))
        reason = row_problem(row, texts, columns) or find_problem(texts)
        if reason:
            skipped.append(Skipped(row.number, reason))
        elif key in first_rows:
            skipped.append(Skipped(row.number, "duplicate", duplicate_of=first_rows[key]))
        else:
            first_rows[key] = row.number
            kept.append(row)
    return kept, tuple(skipped)


def contradictions_in(pairs: Iterable[Preference]) -> tuple[tuple[RowId, RowId], ...]:
    """Return the row numbers of each two pairs that prefer the same two answers to a prompt in opposite ways."""
    rows: dict[bytes, RowId] = {}
    found = []
    for pair in pairs:
        prompt, chosen, rejected = map(normalize, (pair.prompt, pair.chosen, pair.rejected))
        opposite = text_digest(*identity((prompt, rejected, chosen), pair.chat_template_kwargs))
        if opposite in rows:
            found.append((rows[opposite], pair.row))
        rows[text_digest(*identity((prompt, chosen, rejected), pair.chat_template_kwargs))] = pair.row
    return tuple(found)


def identity(texts: Sequence[str], variables: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the texts by which a row repeats another: with other tools or variables of the chat template, it doesn't."""
    return (*texts, json.dumps(variables, sort_keys=True, default=str)) if variables else tuple(texts)


def row_problem(row: Row, texts: Sequence[str], columns: Sequence[str]) -> str | None:
    """Return why a row with these normalized texts can't be trained on; None if it can."""
    return row.problem or next((f"empty {name}" for name, text in zip(columns, texts, strict=True) if not text), None)


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """Return, for example, ``skipped 3 rows: 1 empty chosen (row 5), 2 duplicates (rows 8, 9)``; "" for no rows."""
    if not skipped:
        return ""
    parts = []
    by_reason: dict[str, list[str]] = {}
    for each in skipped:
        by_reason.setdefault(each.reason, []).append(str(each.row))
    for reason, rows in islice(by_reason.items(), _MAX_LISTED_REASONS):
        number = len(rows)
        listed = ", ".join(rows[:_MAX_LISTED_ROWS]) + (", ..." if number > _MAX_LISTED_ROWS else "")
        label = count(number, reason) if reason == "duplicate" else f"{number:,} {reason}"
        parts.append(f"{label} ({'row' if number == 1 else 'rows'} {listed})")
    if (more := len(by_reason) - len(parts)) > 0:
        parts.append(f"{count(more, 'other reason')}")
    return f"skipped {count(len(skipped), 'row')}: {', '.join(parts)}"


# --- split and weights ------------------------------------------------------------------------------------------------


class HasPrompt(Protocol):
    """Anything that can be split by its prompt."""

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        ...


class HasWeight(HasPrompt, Protocol):
    """A row with a weight."""

    @property
    def weight(self) -> float:
        """How often the row counts."""
        ...

    @property
    def row(self) -> RowId:
        """The row's number."""
        ...


P = TypeVar("P", bound=HasPrompt)
W = TypeVar("W", bound=HasWeight)


def split_by_prompt(rows: Sequence[P], heldout_fraction: float, seed: int) -> tuple[list[P], list[P]]:
    """Divide rows into ``(train, heldout)`` with no prompt on both sides; each side keeps the given order.

    Prompts are ranked by a hash of seed and normalized text, and the first ``heldout_fraction`` of them is held out. The
    order of rows and the number of rows per prompt don't matter. With two or more prompts, each side gets at least one
    unless the fraction is 0. A single prompt is for training.

    Raises:
        ConfigError: ``heldout_fraction`` isn't in [0, 1).
    """
    check_fraction(heldout_fraction)
    prompts = [normalize(row.prompt) for row in rows]
    ranked = sorted(set(prompts), key=lambda prompt: prompt_rank(seed, prompt))
    heldout = set(ranked[: num_heldout(heldout_fraction, len(ranked))])
    return (
        [row for row, prompt in zip(rows, prompts, strict=True) if prompt not in heldout],
        [row for row, prompt in zip(rows, prompts, strict=True) if prompt in heldout],
    )


def check_fraction(heldout_fraction: float) -> None:
    """Raise a ConfigError if ``heldout_fraction`` isn't in [0, 1)."""
    if not 0 <= heldout_fraction < 1:
        raise ConfigError(f"heldout_fraction: {heldout_fraction} is not in [0, 1). Give a share such as 0.1.")


def num_heldout(heldout_fraction: float, prompts: int) -> int:
    """Return the number of held-out prompts among ``prompts``."""
    return max(0, min(max(1, round(heldout_fraction * prompts)), prompts - 1)) if heldout_fraction else 0


def weighted(rows: Sequence[W], seed: int) -> list[W]:
    """Repeat each row according to its weight.

    A weight of 2.5 repeats each row twice and half of the rows a third time; 0.1 keeps a tenth of the rows. A hash of
    seed, row number and prompt decides which.
    """
    return [row for row in rows for _ in range(repetitions(row.weight, f"{row.row}:{row.prompt}", seed))]


def repetitions(weight: float, row: str, seed: int) -> int:
    """Return how often a row counts; ``row`` identifies it."""
    if weight == int(weight):
        return int(weight)
    share = int.from_bytes(prompt_rank(seed, row)[:8], "big") / 2**64
    return math.floor(weight) + (share < weight % 1)


def prompt_rank(seed: int, prompt: str) -> bytes:
    """Return the sort key of a prompt: the prompts with the lowest keys are held out."""
    # Lone surrogates can't come from a file but can from a caller.
    return hashlib.sha256(f"{seed}:{prompt}".encode("utf-8", "surrogatepass")).digest()
