"""Load preference pairs, prompts and SFT texts: read, check, split, and keep in memory or on disk.

Each kind of rows has a reader; ``_load`` splits the rows of all three kinds.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from reinforcepp.config.criteria import Criterion
from reinforcepp.data.columns import DEFAULT_SFT_NAMES, ColumnLayout, ColumnNames, SftColumnNames, find_sft_columns
from reinforcepp.data.loaded import LoadedData, PreferenceData, PromptData, PromptRow, R, SftRow, TextData
from reinforcepp.data.messages import UnusableCell, parse_content, prompt_from
from reinforcepp.data.readers import count, quoted
from reinforcepp.data.rows import (
    DEFAULT_MAX_BAD_ROWS,
    UNGRADED,
    Row,
    check_bad_rows,
    check_text_only,
    contradictions_in,
    describe_skipped,
    filter_rows,
    make_rows,
    notes_on,
    split_by_prompt,
    template_variables,
    weighted,
)
from reinforcepp.data.sources import (
    DataFiles,
    DataSource,
    GivenRows,
    RowSource,
    combined_digest,
    display_name,
    find_parts,
    resolve_data,
)
from reinforcepp.data.streaming import DiskRows, OnProgress, stream_table
from reinforcepp.data.table import read_table
from reinforcepp.data.unpaired import UNPAIRED
from reinforcepp.errors import DataError, nearest, setting
from reinforcepp.types import Judgment, Messages, Preference, RowId

# A single pair can't be both trained on and held out.
_MIN_PAIRS = 2
_NO_QUESTION = {"with answers to different prompts": "without a question"}
"""Problems of a single conversation, which the reader of pairs words for two."""
_NO_MESSAGES: Messages = ()
GROUND_TRUTH_NOTE = "ground_truth for reward functions comes from the column 'reward_model'"


# --- one path for all kinds -------------------------------------------------------------------------------------------

D = TypeVar("D", bound=LoadedData[Any])
Loaded = tuple[D, Sequence[R], Sequence[R]]
"""All usable rows, those for training, repeated by weight, and those held out."""


def _no_progress(share: float) -> None:
    """Ignore the share that has been read."""


def _load(
    source: DataSource,
    read: Callable[[Path | GivenRows], D],
    heldout_fraction: float,
    seed: int,
    stream: Callable[[Path | GivenRows], Loaded[D, Any]] | None = None,
) -> Loaded[D, Any]:
    """Read a data setting and split it by prompt; built-in data and ``DataFiles`` come split.

    ``stream`` reads and splits files onto disk instead. Built-in data is small and always read into memory.
    """
    files = resolve_data(source)
    if stream is not None and files.heldout is None:
        return stream(files.train)
    train = read(files.train)
    if files.heldout is None:
        rows, heldout_rows = split_by_prompt(train.rows, heldout_fraction, seed)
        return train, weighted(rows, seed), heldout_rows
    heldout = read(files.heldout)
    both = replace(
        train,
        source=train.source if isinstance(source, DataFiles) else str(source),
        sha256=hashlib.sha256((train.sha256 + heldout.sha256).encode()).hexdigest(),
        rows=(*train.rows, *heldout.rows),
        skipped=train.skipped + heldout.skipped,
    )
    return both, weighted(train.rows, seed), list(heldout.rows)


# --- preference pairs -------------------------------------------------------------------------------------------------


def load_preferences(
    source: DataSource,
    *,
    heldout_fraction: float,
    seed: int,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    criteria: Sequence[Criterion] = (),
    criteria_margins: bool = False,
    max_bad_rows: float = DEFAULT_MAX_BAD_ROWS,
    streaming: bool = False,
    on_progress: OnProgress = _no_progress,
) -> tuple[PreferenceData, Sequence[Preference], Sequence[Preference]]:
    """Return all preference data of ``source``, its training pairs, repeated by weight, and its held-out pairs.

    Files are split by prompt (``split_by_prompt``). Built-in data comes split: ``heldout_fraction`` and ``seed`` don't
    apply, and row numbers are those of the file that holds the pair. With ``streaming``, files are read onto disk, and
    ``on_progress`` is called with the share that has been read. ``max_bad_rows`` is as for ``check_bad_rows``. ``criteria``
    are read into the pairs' judgments, with ``criteria_margins`` also their margins.

    Raises:
        ConfigError: ``heldout_fraction`` isn't in [0, 1), or two of the column settings are the same.
        DataError: As ``read_preferences``, or ``source`` names unknown built-in data.
    """
    names = ColumnNames(prompt_column, chosen_column, rejected_column, tuple(criteria), criteria_margins)

    def stream(path: Path | GivenRows) -> Loaded[PreferenceData, Preference]:
        table = stream_table(
            path,
            names,
            pairs=True,
            seed=seed,
            find_problem=_pair_problem,
            values=_stored_parts,
            on_progress=on_progress,
            max_bad_rows=max_bad_rows,
        )
        rows, train, heldout = table.split_rows(_stored_pair, heldout_fraction, seed)
        contradictions = table.contradictions()
        data = PreferenceData(table.source, table.sha256, rows, table.skipped, table.notes, contradictions)
        return _enough_pairs(data), train, heldout

    read = partial(_read_preferences, names=names, max_bad_rows=max_bad_rows)
    return _load(source, read, heldout_fraction, seed, stream if streaming else None)


def read_preferences(
    path: RowSource,
    *,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
) -> PreferenceData:
    """Read preference pairs from a file or several (see ``read_table``).

    Rows are skipped if a cell is empty, if ``chosen`` equals ``rejected``, if they repeat an earlier row (all by
    normalized text), or if their conversations don't reduce to one prompt and two answers. Pairs that contradict each
    other are kept, because annotators do disagree.

    Raises:
        ConfigError: Two of the column settings are the same.
        DataError: A file can't be read, lacks a column, or has fewer than 2 usable pairs.
    """
    return _read_preferences(path, ColumnNames(prompt_column, chosen_column, rejected_column))


def _read_preferences(
    path: RowSource, names: ColumnNames, max_bad_rows: float = DEFAULT_MAX_BAD_ROWS
) -> PreferenceData:
    table = read_table(path, names, pairs=True, max_bad_rows=max_bad_rows)
    kept, skipped = filter_rows(table.rows, table.columns, partial(_pair_problem, table.columns))
    pairs = tuple(
        _pair(row.texts, row.number, row.weight, row.messages, row.chat_template_kwargs, row.grade, row.judgments)
        for row in kept
    )
    return _enough_pairs(
        PreferenceData(table.source, table.sha256, pairs, skipped, table.notes, contradictions_in(pairs))
    )


def _pair_problem(columns: Sequence[str], texts: Sequence[str]) -> str | None:
    _, chosen, rejected = texts
    return f"with {' equal to '.join(columns[1:])}" if chosen == rejected else None


def _pair(texts: Sequence[str], row: RowId, weight: float, *more: Any) -> Preference:
    prompt, chosen, rejected = texts
    messages, variables, (margin, tie, loss_weight), judgments = more
    return Preference(prompt, chosen, rejected, row, weight, messages, variables, margin, tie, judgments, loss_weight)


def _stored_pair(values: Sequence[Any]) -> Preference:
    row, texts, *more = values
    judgments = tuple(Judgment(*each) for each in more[3]) if more[3:] else ()
    return _pair(texts, row, 1.0, *_messages(more), more[2] if more[2:] else UNGRADED, judgments)


def _stored_parts(row: Row) -> list[Any]:
    if row.grade == UNGRADED and not row.judgments:
        return _stored_messages(row)
    return [row.messages, row.chat_template_kwargs, list(row.grade), list(row.judgments)]


def _stored_messages(row: Row) -> list[Any]:
    return [row.messages, row.chat_template_kwargs] if row.messages or row.chat_template_kwargs else []


def _messages(stored: Sequence[Any]) -> tuple[Messages, dict[str, Any]]:
    """Return what :func:`_stored_messages` stored."""
    return (tuple(stored[0]), stored[1]) if stored else ((), {})


def _enough_pairs(data: PreferenceData) -> PreferenceData:
    if len(data.rows) < _MIN_PAIRS:
        skipped = f" ({describe_skipped(data.skipped)})" if data.skipped else ""
        fix = "Correct those rows or add more" if data.skipped else "Add more rows"
        if any(each.reason in UNPAIRED for each in data.skipped):
            fix = "Add a good and a bad answer to the same prompts, or train on the good answers with `reinforcepp sft`"
        raise DataError(
            f"{data.source}: {count(len(data.rows), 'usable pair')}, but at least {_MIN_PAIRS} are needed{skipped}. {fix}."
        )
    return data


# --- prompts ----------------------------------------------------------------------------------------------------------


def load_prompts(
    source: DataSource,
    *,
    heldout_fraction: float,
    seed: int,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    renamed: Mapping[str, str] | None = None,
    max_bad_rows: float = DEFAULT_MAX_BAD_ROWS,
    streaming: bool = False,
    on_progress: OnProgress = _no_progress,
) -> tuple[PromptData, Sequence[PromptRow], Sequence[PromptRow]]:
    """Return all prompts of ``source``, those for training, repeated by weight, and the held-out ones.

    With the same fraction and seed, ``load_preferences`` puts each prompt on the same side. Built-in data comes split.
    ``max_bad_rows``, ``streaming`` and ``on_progress`` are as for ``load_preferences``, ``renamed`` as for
    ``read_prompts``.

    Raises:
        ConfigError: ``heldout_fraction`` isn't in [0, 1).
        DataError: As ``read_prompts``, or ``source`` names unknown built-in data.
    """
    names, renamed = ColumnNames(prompt_column, chosen_column, rejected_column), renamed or {}

    def stream(path: Path | GivenRows) -> Loaded[PromptData, PromptRow]:
        table = stream_table(
            path,
            names,
            pairs=False,
            seed=seed,
            find_problem=lambda columns, texts: None,
            values=lambda row: [_prompt_row(row, renamed).columns, *_stored_messages(row)],
            on_progress=on_progress,
            max_bad_rows=max_bad_rows,
        )
        rows, train, heldout = table.split_rows(_stored_prompt, heldout_fraction, seed)
        data = PromptData(table.source, table.sha256, rows, table.skipped, table.notes)
        return _enough_prompts(data, table.columns[0]), train, heldout

    read = partial(_read_prompts, names=names, renamed=renamed, max_bad_rows=max_bad_rows)
    return _load(source, read, heldout_fraction, seed, stream if streaming else None)


def read_prompts(
    path: RowSource,
    *,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    renamed: Mapping[str, str] | None = None,
) -> PromptData:
    """Read the distinct prompts of a file or several (see ``read_table``).

    A prompt's other columns are those of the row where it appears first, with the types of the file. Rows are skipped if
    their prompt is empty or repeats an earlier row's prompt (by normalized text). Answer columns matter only if they
    contain the prompt.

    Args:
        path: A file or several.
        prompt_column: Column of the prompt.
        chosen_column: Column of the preferred answer.
        rejected_column: Column of the other answer.
        renamed: New names of other columns for reward functions, mapped to the names in the file.

    Raises:
        DataError: A file can't be read, lacks a column, or has no usable prompt.
    """
    return _read_prompts(path, ColumnNames(prompt_column, chosen_column, rejected_column), renamed or {})


def _read_prompts(
    path: RowSource,
    names: ColumnNames,
    renamed: Mapping[str, str],
    max_bad_rows: float = DEFAULT_MAX_BAD_ROWS,
) -> PromptData:
    table = read_table(path, names, pairs=False, max_bad_rows=max_bad_rows)
    kept, skipped = filter_rows(table.rows, table.columns)
    prompts = tuple(_prompt_row(row, renamed) for row in kept)
    notes = table.notes
    has_truth = any("ground_truth" in row.columns and "reward_model" in row.columns for row in prompts)
    if has_truth and not any("ground_truth" in row.cells for row in kept):
        notes = (*notes, GROUND_TRUTH_NOTE)
    return _enough_prompts(PromptData(table.source, table.sha256, prompts, skipped, notes), table.columns[0])


def _prompt_row(row: Row, renamed: Mapping[str, str]) -> PromptRow:
    columns = {name: cell for name, cell in row.cells.items() if name != row.layout.prompt}
    for name, column in renamed.items():
        if column not in columns:
            raise DataError(
                f"{setting('columns')}: row {row.number} has no column {column!r} to rename to {name!r}, only {quoted(columns)}. "
                f"Correct the name.{nearest(column, columns)}"
            )
        columns[name] = columns.pop(column)
    graded = columns.get("reward_model")
    if isinstance(graded, Mapping) and "ground_truth" in graded:
        columns.setdefault("ground_truth", graded["ground_truth"])
    return PromptRow(row.texts[0], columns, row.number, row.weight, row.messages, row.chat_template_kwargs)


def _stored_prompt(values: Sequence[Any]) -> PromptRow:
    row, (prompt,), columns, *more = values
    return PromptRow(prompt, columns, row, 1.0, *_messages(more))


def _enough_prompts(data: PromptData, column: str) -> PromptData:
    if not data.rows:
        raise DataError(
            f"{data.source}: no usable prompt ({describe_skipped(data.skipped)}). Fill in the column {column!r}, or "
            f"name another with {setting('prompt_column')}."
        )
    return data


def prompt_rows(dataset: Iterable[Any] | None, name: str) -> Sequence[PromptRow]:
    """Return the rows of a dataset in memory; rows on disk are returned unchanged.

    Rows are ``PromptRow`` objects or mappings with a ``prompt``, as ``datasets`` yields them. A prompt is text or a list of
    messages.

    Raises:
        DataError: A row has no prompt; ``name`` is the dataset's name for the message.
    """
    if isinstance(dataset, DiskRows):
        return dataset
    return [given_prompt(row, name, number) for number, row in enumerate(dataset if dataset is not None else [])]


def given_prompt(row: Any, name: str, number: int) -> PromptRow:
    """Return row ``number`` of the dataset ``name``; see :func:`prompt_rows`.

    Raises:
        DataError: It has no prompt.
    """
    if isinstance(row, PromptRow):
        return row
    cell = row.get("prompt") if isinstance(row, Mapping) else None
    prompt, messages, variables = cell, _NO_MESSAGES, dict[str, Any]()
    try:
        if isinstance(cell, list):
            prompt, *_, messages = prompt_from(parse_content(cell, "prompt"), Counter())
        if isinstance(row, Mapping):
            check_text_only(row)
            variables = template_variables(row)
    except UnusableCell as error:
        raise DataError(f"{name}:{number}: {error}. Correct the row or remove it.") from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{name}:{number}: no text in the column 'prompt'. Fill it in or remove the row.")
    columns = {key: value for key, value in row.items() if key != "prompt"}
    return PromptRow(prompt, columns, number, messages=messages, chat_template_kwargs=variables)


# --- SFT texts --------------------------------------------------------------------------------------------------------


def load_texts(
    source: DataSource,
    *,
    heldout_fraction: float,
    seed: int,
    prompt_column: str = DEFAULT_SFT_NAMES.prompt,
    completion_column: str = DEFAULT_SFT_NAMES.completion,
    chosen_column: str = DEFAULT_SFT_NAMES.chosen,
    messages_column: str = DEFAULT_SFT_NAMES.messages,
    text_column: str = DEFAULT_SFT_NAMES.text,
    max_bad_rows: float = DEFAULT_MAX_BAD_ROWS,
) -> tuple[TextData, Sequence[SftRow], Sequence[SftRow]]:
    """Return all SFT rows of ``source``, those for training, repeated by weight, and the held-out ones.

    With the same fraction and seed, ``load_preferences`` puts each prompt on the same side. Built-in data comes split.

    Raises:
        ConfigError: ``heldout_fraction`` isn't in [0, 1).
        DataError: As ``read_texts``, or ``source`` names unknown built-in data.
    """
    names = SftColumnNames(prompt_column, completion_column, chosen_column, messages_column, text_column)
    return _load(source, partial(read_texts, names=names, max_bad_rows=max_bad_rows), heldout_fraction, seed)


def _sft_problem(row: Row) -> str | None:
    """Return the problem of a row with answers; of two answers that were judged equal, neither is known to be good."""
    if row.problem is None and row.layout.judged and row.grade[1]:
        return "with two equally good answers"
    return _NO_QUESTION.get(row.problem or "", row.problem)


def read_texts(
    source: RowSource, names: SftColumnNames = DEFAULT_SFT_NAMES, max_bad_rows: float = DEFAULT_MAX_BAD_ROWS
) -> TextData:
    """Read prompts with answers, conversations or plain text from a file or several (see ``read_table``).

    Rows are skipped if a text is empty, if they repeat an earlier row, or if their conversation has no question or
    doesn't end with an answer. Answers come before plain texts.

    Raises:
        DataError: A file can't be read, has no column to train on, or there is no usable row.
    """
    parts = find_parts(source)
    layouts: list[ColumnLayout] = []
    conversions: Counter[str] = Counter()
    answers: list[Row] = []
    texts: list[Row] = []
    for part in parts:
        records = part.records()
        layouts.append(layout := find_sft_columns(part.path, records, names))
        pairs = layout.answers is not None
        rows = make_rows(part, records, layout, pairs, path_in_numbers=len(parts) > 1, conversions=conversions)
        if pairs:
            answers += [replace(row, texts=row.texts[:2], problem=_sft_problem(row)) for row in rows]
        else:
            texts += rows
    name = display_name(source, parts)
    bad = [row for row in (*answers, *texts) if row.unreadable]
    check_bad_rows(name, bad, len(answers) + len(texts), max_bad_rows)
    kept_answers, skipped_answers = filter_rows(answers, ("prompt", "answer"))
    kept_texts, skipped_texts = filter_rows(texts, ("text",))
    found = [
        SftRow(row.texts[0], row.texts[1], row.number, row.weight, row.messages, row.chat_template_kwargs)
        for row in kept_answers
    ]
    found += [SftRow(None, row.texts[0], row.number, row.weight) for row in kept_texts]
    skipped = (*skipped_answers, *skipped_texts)
    if not found:
        raise DataError(
            f"{name}: no usable row ({describe_skipped(skipped)}). Fill in the columns, or name others with "
            f"{setting('prompt_column')} and {setting('completion_column')}, {setting('messages_column')} or "
            f"{setting('text_column')}."
        )
    notes = tuple(notes_on(parts, layouts, conversions))
    return TextData(name, combined_digest(parts), tuple(found), skipped, notes)
