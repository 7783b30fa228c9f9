"""What a language model is taught by example: answers to prompts, or plain text."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from reinforcepp.data._columns import PROMPTS, Layout, _answers, _missing, _prompt
from reinforcepp.data._files import parts_of
from reinforcepp.data._table import Row, Skipped, called, describe_skipped, digest_of, filter_rows, notes_on, rows_of
from reinforcepp.data._text import Records, count, quoted
from reinforcepp.data.sources import resolve_data
from reinforcepp.data.split import split_by_prompt, weighted
from reinforcepp.errors import DataError
from reinforcepp.types import RowId


class SftColumnNames(NamedTuple):
    """What the columns are set to be called; the defaults are the usual names."""

    prompt: str = "prompt"
    completion: str = "completion"
    chosen: str = "chosen"
    messages: str = "messages"
    text: str = "text"


USUAL = SftColumnNames()
COMPLETIONS = ("response", "answer", "output")
MESSAGES = ("conversations", "conversation")
_NO_QUESTION = {"with answers to different prompts": "without a question"}
"""What is wrong with a conversation, where the reader of pairs would say it of two."""


@dataclass(frozen=True)
class SftRow:
    """A text to learn: ``completion``, as the answer to ``question`` or, where that is None, by itself.

    ``weight`` is how often it counts in training.
    """

    question: str | None
    completion: str
    row: RowId = 0
    weight: float = 1.0

    @property
    def prompt(self) -> str:
        """By what it is held out; a text that answers nothing is its own."""
        return self.completion if self.question is None else self.question


@dataclass(frozen=True)
class TextData:
    """The usable rows of a file, the rows left out, and notes on how it was read; ``sha256`` as in ``Table``."""

    source: str
    sha256: str
    rows: tuple[SftRow, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """``my.csv: 24 rows, answers from the column 'chosen'; left out 1 row: 1 empty prompt (row 5)``."""
        parts = [f"{Path(self.source).name}: {count(len(self.rows), 'row')}", *self.notes]
        return "; ".join([*parts, describe_skipped(self.skipped)] if self.skipped else parts)


def load_texts(
    source: str | Path,
    *,
    heldout_fraction: float,
    seed: int,
    prompt_column: str = USUAL.prompt,
    completion_column: str = USUAL.completion,
    chosen_column: str = USUAL.chosen,
    messages_column: str = USUAL.messages,
    text_column: str = USUAL.text,
) -> tuple[TextData, list[SftRow], list[SftRow]]:
    """All rows of ``source``, then those for training, as often as their weights say, and the held-out ones.

    A file is split as ``load_preferences`` splits it: with the same fraction and seed, a prompt that is on one side
    there is on the same side here. Built-in data comes split.

    Raises:
        ConfigError: ``heldout_fraction`` isn't in [0, 1).
        DataError: A file can't be read, has no column to learn from, or there is no usable row.
    """
    names = SftColumnNames(prompt_column, completion_column, chosen_column, messages_column, text_column)
    files = resolve_data(source)
    train = read_texts(files.train, names)
    if files.heldout is None:
        rows, heldout_rows = split_by_prompt(train.rows, heldout_fraction, seed)
        return train, weighted(rows, seed), heldout_rows
    heldout = read_texts(files.heldout, names)
    digest = hashlib.sha256((train.sha256 + heldout.sha256).encode()).hexdigest()
    both = TextData(str(source), digest, train.rows + heldout.rows, train.skipped + heldout.skipped, train.notes)
    return both, list(train.rows), list(heldout.rows)


def read_texts(source: str | Path, names: SftColumnNames = USUAL) -> TextData:
    """Read answers with their prompts, conversations or plain text from a file or several (see ``read_table``).

    Left out are rows with an empty text, repetitions of an earlier row, and conversations without a question or whose
    last message is a question.

    Raises:
        DataError: A file can't be read, has no column to learn from, or there is no usable row.
    """
    parts = parts_of(source)
    layouts: list[Layout] = []
    seen: Counter[str] = Counter()
    answers: list[Row] = []
    texts: list[Row] = []
    for part in parts:
        records = part.records()
        layouts.append(layout := _layout(part.path, records, names))
        pairs = layout.answers is not None
        rows = rows_of(part, records, layout, pairs, path_in_numbers=len(parts) > 1, seen=seen)
        if pairs:
            answers += [
                replace(row, texts=row.texts[:2], fault=_NO_QUESTION.get(row.fault or "", row.fault)) for row in rows
            ]
        else:
            texts += rows
    learnt, skipped = filter_rows(answers, ("prompt", "answer"))
    plain, left_out = filter_rows(texts, ("text",))
    found = [SftRow(row.texts[0], row.texts[1], row.number, row.weight) for row in learnt]
    found += [SftRow(None, row.texts[0], row.number, row.weight) for row in plain]
    name = called(source, parts)
    if not found:
        raise DataError(
            f"{name}: there is no usable row ({describe_skipped((*skipped, *left_out))}); fill in the columns or name others."
        )
    notes = tuple(notes_on(parts, layouts, seen))
    return TextData(name, digest_of(parts), tuple(found), (*skipped, *left_out), notes)


def _layout(path: Path, records: Records, names: SftColumnNames) -> Layout:
    """Where a file's prompts and answers, its conversations or its texts are.

    Where there are several of them, what the user named comes first, then answers, conversations, texts. Without an answer
    beside it, the column of an answer stands for both of a pair.
    """
    own = [kind for kind, name in names._asdict().items() if name != getattr(USUAL, kind)]
    for kind in own:
        if getattr(names, kind) not in records.names:
            raise _missing(path, records, kind, getattr(names, kind))
    if not {"text", "messages"} & set(own) and (layout := _of_answers(path, records, names, own)):
        return layout
    talks = [name for name in (names.messages, *MESSAGES) if name in records.names]
    if talks and "text" not in own:
        return Layout(None, (talks[0], talks[0]), (f"the last answers of the conversations in {talks[0]!r}",))
    if names.text in records.names:
        _check_plain(path, records, names.text)
        return Layout(names.text, None)
    guessed = _guessed(records)
    if guessed is not None and any(name in records.names for name in (*PROMPTS, names.prompt)):
        return _answered(path, records, names, guessed, note=True)
    where = f"{path}, row {records.header_row}: the header" if records.header_row else f"{path}: the file"
    raise DataError(
        f"{where} has no column {names.text!r}, {names.messages!r}, {names.completion!r} or {names.chosen!r} to learn from, "
        f"only {quoted(records.names)}; name one with --text_column, --messages_column, or --prompt_column and "
        "--completion_column."
    )


def _of_answers(path: Path, records: Records, names: SftColumnNames, own: Sequence[str]) -> Layout | None:
    """Where prompts and answers are, if there are columns for them; ``own`` are the kinds whose columns the user named."""
    if names.completion in records.names and ("chosen" not in own or "completion" in own):
        return _answered(path, records, names, names.completion)
    if couple := _answers(path, records, (names.chosen, "rejected"), told=True):
        prompt, note = _prompt(path, records, names.prompt, couple)
        return Layout(prompt, couple, (*([note] if note else []), f"answers from the column {couple[0]!r}"))
    if names.chosen in records.names:
        return _answered(path, records, names, names.chosen, note=True)
    if "prompt" not in own:
        return None
    if (guessed := _guessed(records)) is None:  # but who names a prompt means that it has answers
        raise _missing(path, records, "completion", names.completion)
    return _answered(path, records, names, guessed, note=True)


def _guessed(records: Records) -> str | None:
    """A column that may be that of the answers, if there is one and no more."""
    found = [name for name in COMPLETIONS if name in records.names]
    return found[0] if len(found) == 1 else None


def _answered(path: Path, records: Records, names: SftColumnNames, answer: str, *, note: bool = False) -> Layout:
    prompt, told = _prompt(path, records, names.prompt, (answer, answer))
    if prompt is None:
        raise _missing(path, records, "prompt", names.prompt)
    notes = [told] if told else []
    return Layout(prompt, (answer, answer), (*notes, *([f"answers from the column {answer!r}"] if note else [])))


def _check_plain(path: Path, records: Records, name: str) -> None:
    for number, cells in records.rows:
        if isinstance(cells.get(name), list | dict):
            raise DataError(
                f"{path}, row {number}: {name!r} holds messages, or another list, where plain text is expected; for "
                f"conversations say --messages_column {name}."
            )
