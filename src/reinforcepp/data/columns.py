"""Which column holds what: by the configured names, the default names, or the names that other tools use.

Two kinds of files: prompts with or without preference pairs (``find_columns``), and SFT data (``find_sft_columns``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reinforcepp.config.criteria import Criterion
from reinforcepp.data.criteria import CriterionColumns, find_criteria, suggested, used_columns
from reinforcepp.data.readers import Records, quoted
from reinforcepp.data.verdicts import Judged, Verdict, find_judged
from reinforcepp.errors import ConfigError, DataError, nearest, setting

GRADES = ("margin", "tie", "weight")
"""Columns of a pair that say how much better the chosen answer is, and how much it counts."""
VARIABLES = ("tools", "chat_template_kwargs")
"""Columns that the chat template reads."""


class ColumnNames(NamedTuple):
    """Configured column names of prompts and preference pairs, and the criteria of pairs.

    With ``criteria_margins``, sizes of judgments and differences of ratings are margins.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    criteria: tuple[Criterion, ...] = ()
    criteria_margins: bool = False

    @property
    def answers(self) -> tuple[str, str]:
        """Names of the answer columns."""
        return self.chosen, self.rejected


class SftColumnNames(NamedTuple):
    """Configured column names of SFT data."""

    prompt: str = "prompt"
    completion: str = "completion"
    chosen: str = "chosen"
    messages: str = "messages"
    text: str = "text"


class ColumnLayout(NamedTuple):
    """The columns of a file.

    Attributes:
        prompt: Column of the prompt; None if chosen and rejected both begin with it.
        answers: Columns of chosen and rejected; None in a file of prompts. SFT data with one answer names it twice.
        notes: Remarks for the user on columns that were recognized by another name.
        inputs: Columns whose text follows the prompt's.
        system: Column of the system message.
        history: Column of earlier turns.
        label: Column that says whether a single answer is good.
        unused: Columns that training drops.
        judged: How the better answer of a row is determined, if not by the names of the columns in ``answers``.
        unpaired: Whether pairs are formed of rows with single answers by their label.
        criteria: Columns of the criteria of pairs.
        weighted: Whether pairs have the weight in their column ``weight``.
    """

    prompt: str | None
    answers: tuple[str, str] | None
    notes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    system: str | None = None
    history: str | None = None
    label: str | None = None
    unused: tuple[str, ...] = ()
    judged: Judged | None = None
    unpaired: bool = False
    criteria: tuple[CriterionColumns, ...] = ()
    weighted: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """Columns that training texts are made of."""
        answers = self.judged.columns if self.judged else self.answers or ()
        names = (self.prompt, *answers, *self.inputs, self.system, self.history)
        return tuple(dict.fromkeys(name for name in names if name))


DEFAULT_NAMES = ColumnNames()
ANSWER_FLAGS = ("chosen", "rejected")
DEFAULT_SFT_NAMES = SftColumnNames()
PROMPTS = ("question", "instruction", "query", "input", "context_messages", "messages", "conversations", "problem")
ANSWERS = (
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
    ("response_j", "response_k"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
    ("better", "worse"),
    ("preferred_output", "non_preferred_output"),
    ("chosen_messages", "rejected_messages"),
)
JOINED = (("instruction", "input"), ("instruction", "context"))
"""Columns that together are the prompt, as in the data of Alpaca and Dolly."""
SYSTEMS = ("system", "system_prompt")
HISTORY = "history"
LABELS = ("label", "kto_tag")
"""Columns that mark good and bad answers, as in KTO's data."""
GOOD = ("true", "1", "1.0", "good", "desirable", "chosen", "accepted", "thumbs_up")
BAD = ("false", "0", "0.0", "-1", "-1.0", "bad", "undesirable", "rejected", "thumbs_down")
"""Labels of good and bad answers, in lowercase."""
_MIN_BOOLEANS = 0.9
"""Share of boolean cells from which a column marks good and bad answers; the other rows are unusable."""
COMPLETIONS = ("response", "answer", "output")
MESSAGES = ("conversations", "conversation")


def check_distinct(names: ColumnNames) -> None:
    """Raise a ConfigError if two settings name the same column."""
    flags: dict[str, str] = {}
    for flag, name in zip(("prompt", *ANSWER_FLAGS), names[:3], strict=True):
        if name in flags:
            raise ConfigError(
                f"{setting(f'{flags[name]}_column')} and {setting(f'{flag}_column')} both name the column {name!r}. Give each "
                "its own column."
            )
        flags[name] = flag


# --- prompts and preference pairs -------------------------------------------------------------------------------------


def find_columns(path: Path, records: Records, names: ColumnNames, pairs: bool | None) -> ColumnLayout:
    """Find the columns of prompts and answers.

    Args:
        path: The file, for messages.
        records: Its contents.
        names: Configured column names.
        pairs: Whether answers are required; None reads them if the file has such columns. If False, answers matter only
            if they contain the prompt.

    Raises:
        DataError: A column is missing, and no or more than one other column could take its place.
    """
    wanted = names.answers
    answers = _find_answers(path, records, wanted, must_be_unique=pairs is not False)
    judged = None if answers or wanted != DEFAULT_NAMES.answers else _find_judged(records)
    if pairs is not False and not (answers or judged) and (layout := _find_unpaired(path, records, names)):
        return layout
    layout = _find_prompt(path, records, names.prompt, answers or (wanted if judged else None), judged)
    present = [name in records.names for name in wanted]
    # A name that the user set must be there, and one answer column without the other is a mistake.
    missing = not (answers or judged)
    if missing and (pairs or (pairs is None and (any(present) or wanted != DEFAULT_NAMES.answers))):
        flag = "rejected" if present[0] else "chosen"
        raise _missing(path, records, flag, getattr(names, flag))
    if judged and pairs is not False:
        layout = _with_note(layout, judged.note)
    elif answers and answers != wanted and pairs is not False:
        layout = _with_note(layout, f"chosen and rejected from the columns {' and '.join(map(repr, answers))}")
    layout = layout._replace(notes=(*records.notes, *layout.notes))
    if pairs is False or missing:
        return layout  # Reward functions get the other columns of prompts.
    layout = _with_unused(_with_criteria(path, layout, records, answers, names), records, GRADES)
    return layout._replace(weighted="weight" not in used_columns(layout.criteria))


def _with_criteria(
    path: Path, layout: ColumnLayout, records: Records, answers: tuple[str, str] | None, names: ColumnNames
) -> ColumnLayout:
    """Return ``layout`` with the columns of the criteria, or with a note on columns that could be criteria."""
    if answers is None and isinstance(layout.judged, Verdict):
        answers = layout.judged.answers
    if answers is None:
        if names.criteria:
            raise DataError(
                f"{path}: each row has a list of answers, so {setting('criteria')} can't be read. Write pairs with the columns "
                "chosen and rejected, and their ratings."
            )
        return layout
    if not names.criteria:
        known = suggested(records, answers)
        note = f"judgments by criterion found: train them with {setting('criteria')} {' '.join(known)}"
        return _with_note(layout, note) if known else layout
    criteria = find_criteria(path, records, answers, names.criteria, margins=names.criteria_margins)
    for criterion in criteria:
        if criterion.columns and criterion.columns != (criterion.name,):
            key = f", key {criterion.key!r}" if criterion.key else ""
            layout = _with_note(
                layout, f"criterion {criterion.name} from {' and '.join(map(repr, criterion.columns))}{key}"
            )
    return layout._replace(criteria=criteria)


def _find_judged(records: Records) -> Judged | None:
    return find_judged(records.names, records.rows[0][1]) if records.rows else None


def _find_unpaired(path: Path, records: Records, names: ColumnNames) -> ColumnLayout | None:
    """Return the columns of single answers that a label marks as good or bad, if the file has such answers."""
    if names.answers != DEFAULT_NAMES.answers or names.criteria or _find_label(records) is None:
        return None
    sft_names = DEFAULT_SFT_NAMES._replace(prompt=names.prompt)
    has_answers = {sft_names.completion, *COMPLETIONS, sft_names.messages, *MESSAGES} & {*records.names}
    layout = find_sft_columns(path, records, sft_names) if has_answers else None
    if layout is None or layout.answers is None or layout.label is None:
        return None
    note = f"good and bad answers by the column {layout.label!r}, paired per prompt"
    return _with_note(layout._replace(unpaired=True), note)


def _find_prompt(
    path: Path, records: Records, name: str, answers: tuple[str, str] | None, judged: Judged | None = None
) -> ColumnLayout:
    """Return the columns of the prompts and of what belongs before them; without a column, the answers contain them."""
    if judged and judged.prompt in records.names and name == DEFAULT_NAMES.prompt and name not in records.names:
        name = str(judged.prompt)
        layout = ColumnLayout(name, answers, (f"prompts from the column {name!r}",), judged=judged)
    else:
        layout = _prompt_columns(path, records, name, answers)._replace(judged=judged)
    system = next((each for each in SYSTEMS if each in records.names and each not in layout.texts), None)
    history = HISTORY if HISTORY in records.names and HISTORY not in layout.texts and _holds_turns(records) else None
    layout = layout._replace(system=system, history=history)
    if system:
        layout = _with_note(layout, f"system messages from the column {system!r}")
    return _with_note(layout, f"earlier turns from the column {history!r}") if history else layout


def _prompt_columns(path: Path, records: Records, name: str, answers: tuple[str, str] | None) -> ColumnLayout:
    if name in records.names:
        return ColumnLayout(name, answers)
    first, *rest = (each.strip() for each in name.split("+"))
    if rest and first in records.names:
        for each in rest:
            if each not in records.names:
                raise _missing(path, records, "prompt", each)
        return _joined(answers, first, *rest)
    others = [other for other in PROMPTS if other in records.names and other not in (answers or ())]
    if name != DEFAULT_NAMES.prompt or not (others or answers):
        raise _missing(path, records, "prompt", name)
    for first, second in JOINED:
        if first in others and second in records.names and set(others) <= {first, second}:
            return _joined(answers, first, second)
    if len(others) > 1:
        raise DataError(
            f"{path}: no column {name!r}, and several could be the prompt: {quoted(others)}. Choose one with "
            f"{setting('prompt_column')}, or join them as in {setting('prompt_column')} {'+'.join(others[:2])}."
        )
    if others:
        return ColumnLayout(others[0], answers, (f"prompts from the column {others[0]!r}",))
    return ColumnLayout(
        None, answers, (f"prompts are the shared beginning of {' and '.join(map(repr, answers or ()))}",)
    )


def _joined(answers: tuple[str, str] | None, first: str, *rest: str) -> ColumnLayout:
    note = f"prompts from the columns {' and '.join(map(repr, (first, *rest)))}, joined"
    return ColumnLayout(first, answers, (note,), inputs=rest)


def _with_note(layout: ColumnLayout, note: str) -> ColumnLayout:
    return layout._replace(notes=(*layout.notes, note))


def _with_unused(layout: ColumnLayout, records: Records, other: Sequence[str] = ()) -> ColumnLayout:
    used = (*layout.texts, layout.label, *VARIABLES, *other, *used_columns(layout.criteria))
    unused = tuple(name for name in records.names if name and name not in used)
    return layout._replace(unused=unused)


def _holds_turns(records: Records) -> bool:
    """Return whether the column of earlier turns holds lists, or nothing, in every row."""
    return all(isinstance(cells.get(HISTORY), list | None) for _, cells in records.rows)


def _find_answers(
    path: Path, records: Records, wanted: tuple[str, str], *, must_be_unique: bool
) -> tuple[str, str] | None:
    """Return the columns of the answers, None if missing; several candidates are an error if ``must_be_unique``."""
    if all(name in records.names for name in wanted):
        return wanted
    candidates = [pair for pair in ANSWERS if all(name in records.names for name in pair)]
    if not candidates or wanted != DEFAULT_NAMES.answers:
        return None
    if len(candidates) > 1 and must_be_unique:
        named = " or ".join(quoted(pair) for pair in candidates)
        raise DataError(
            f"{path}: several columns could be the answers: {named}. Choose two with {setting('chosen_column')} and "
            f"{setting('rejected_column')}."
        )
    return candidates[0] if len(candidates) == 1 else None


def _missing(path: Path, records: Records, flag: str, name: str) -> DataError:
    for separator_name, separator in (records.other_separators or {}).items():
        if name in [each.strip().strip('"') for each in records.names[0].split(separator)]:
            wanted = {".tsv": "tabs"}.get(path.suffix.lower(), "commas")
            return DataError(
                f"{path}:{records.header_row}: cells are separated by {separator_name}. Save the file with {wanted}."
            )
    return DataError(
        f"{_header(path, records)} has no column {name!r}, only {quoted(records.names)}. "
        f"Rename the column, or name it with {setting(f'{flag}_column')}.{nearest(name, records.names)}"
    )


def _header(path: Path, records: Records) -> str:
    return f"{path}:{records.header_row}: the header" if records.header_row else f"{path}: the file"


# --- SFT data ---------------------------------------------------------------------------------------------------------


def find_sft_columns(path: Path, records: Records, names: SftColumnNames) -> ColumnLayout:
    """Find prompts with answers, conversations, or plain texts.

    If a file has several of them, a column that the user named comes first, then answers, conversations and texts. If
    only one answer column exists, it stands for both answers of a pair.

    Raises:
        DataError: No column to train on was found, or a named one is missing.
    """
    by_user = [kind for kind, name in names._asdict().items() if name != getattr(DEFAULT_SFT_NAMES, kind)]
    for kind in by_user:
        if getattr(names, kind) not in records.names:
            raise _missing(path, records, kind, getattr(names, kind))
    layout = _with_unused(_sft_layout(path, records, names, by_user), records)
    return layout._replace(notes=(*records.notes, *layout.notes))


def _sft_layout(path: Path, records: Records, names: SftColumnNames, by_user: Sequence[str]) -> ColumnLayout:
    """Return the columns to train on; ``by_user`` are the kinds whose columns the user named."""
    if not {"text", "messages"} & set(by_user) and (layout := _sft_answers(path, records, names, by_user)):
        return layout
    conversations = [name for name in (names.messages, *MESSAGES) if name in records.names]
    if conversations and "text" not in by_user:
        column = conversations[0]
        note = f"the last answers of the conversations in {column!r}"
        system = next((each for each in SYSTEMS if each in records.names), None)
        layout = ColumnLayout(None, (column, column), (note,), system=system, label=_find_label(records))
        return _with_note(layout, f"system messages from the column {system!r}") if system else layout
    if names.text in records.names:
        _check_plain_text(path, records, names.text)
        return ColumnLayout(names.text, None)
    completion = _other_completion(records)
    if completion is not None and any(name in records.names for name in (*PROMPTS, names.prompt)):
        return _one_answer(path, records, names, completion, note=True)
    raise DataError(
        f"{_header(path, records)} has no column {names.text!r}, {names.messages!r}, {names.completion!r} or "
        f"{names.chosen!r} to train on, only {quoted(records.names)}. Name one with {setting('text_column')}, "
        f"{setting('messages_column')}, or {setting('prompt_column')} and {setting('completion_column')}."
    )


def _sft_answers(path: Path, records: Records, names: SftColumnNames, by_user: Sequence[str]) -> ColumnLayout | None:
    """Return the columns of prompts and answers, if any; ``by_user`` are the kinds whose columns the user named."""
    if names.completion in records.names and ("chosen" not in by_user or "completion" in by_user):
        return _one_answer(path, records, names, names.completion)
    if pair := _find_answers(path, records, (names.chosen, "rejected"), must_be_unique=True):
        return _with_note(_find_prompt(path, records, names.prompt, pair), f"answers from the column {pair[0]!r}")
    by_default = names.chosen == DEFAULT_SFT_NAMES.chosen and names.chosen not in records.names
    if by_default and (judged := _find_judged(records)):
        found = _find_prompt(path, records, names.prompt, (names.chosen, "rejected"), judged)
        return _with_note(found, f"the better answers: {judged.note}")
    if names.chosen in records.names:
        return _one_answer(path, records, names, names.chosen, note=True)
    if "prompt" not in by_user:
        return None
    # A user who names the prompt column expects an answer column, too.
    if (completion := _other_completion(records)) is None:
        raise _missing(path, records, "completion", names.completion)
    return _one_answer(path, records, names, completion, note=True)


def _other_completion(records: Records) -> str | None:
    """Return the column that could hold the answers, if there is exactly one."""
    found = [name for name in COMPLETIONS if name in records.names]
    return found[0] if len(found) == 1 else None


def _one_answer(
    path: Path, records: Records, names: SftColumnNames, answer: str, *, note: bool = False
) -> ColumnLayout:
    layout = _find_prompt(path, records, names.prompt, (answer, answer))
    if layout.prompt is None:
        raise _missing(path, records, "prompt", names.prompt)
    layout = layout._replace(label=_find_label(records))
    return _with_note(layout, f"answers from the column {answer!r}") if note else layout


def _find_label(records: Records) -> str | None:
    """Return the column that marks good and bad answers, if any: one most of whose cells are booleans."""
    for name in LABELS:
        cells = [cell for _, cells in records.rows if (cell := cells.get(name)) not in (None, "")]
        if cells and sum(parse_label(cell) is not None for cell in cells) >= _MIN_BOOLEANS * len(cells):
            return name
    return None


def parse_label(cell: Any) -> bool | None:
    """Return whether a cell marks a good answer; None if it is neither a boolean nor a known word."""
    text = str(cell).strip().lower()
    return True if text in GOOD else False if text in BAD else None


def _check_plain_text(path: Path, records: Records, name: str) -> None:
    for number, cells in records.rows:
        if isinstance(cells.get(name), list | dict):
            raise DataError(
                f"{path}:{number}: {name!r} holds messages or another list, expected plain text. For conversations, "
                f"use {setting('messages_column')} {name}."
            )
