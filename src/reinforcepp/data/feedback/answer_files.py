"""Read files that already hold responses to label.

A row has a list of responses (``answers``, ``responses``, ``completions``, ``generations``), or two of them in any format of
preference pairs, or one of them; rows with one are grouped by their prompt. The result of ``compare`` is one of the formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reinforcepp.data.columns import COMPLETIONS, ColumnNames
from reinforcepp.data.feedback.records import TEMPLATE_COLUMNS, Answer
from reinforcepp.data.messages import UnusableCell, parse_content
from reinforcepp.data.rows import Row
from reinforcepp.data.sources import RowSource
from reinforcepp.data.table import read_table
from reinforcepp.errors import DataError
from reinforcepp.types import Conversation

LISTS = ("answers", "responses", "completions", "generations")
SINGLE = ("completion", *COMPLETIONS)
PAIRS = (("answer_a", "answer_b"), ("response_a", "response_b"))
TEXTS = ("text", "content", "response", "answer", "completion")
"""Names of the text of a response that is an object."""
TOPICS = ("topic", "category")


@dataclass(frozen=True)
class Answered:
    """A prompt with its responses.

    Attributes:
        prompt: The prompt.
        answers: Different responses, in the order of the file.
        is_pair: Whether the first of two responses is known to be better.
        topic: The prompt's topic, if the file has one.
        columns: The row's variables of the chat template.
    """

    prompt: Conversation
    answers: tuple[Answer, ...]
    is_pair: bool = False
    topic: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def read_answers(source: RowSource) -> list[Answered]:
    """Return the prompts of a file with their responses, in the order of the file; unusable rows are skipped.

    Raises:
        DataError: The file can't be read, or no row has responses.
    """
    table = read_table(source, ColumnNames(), pairs=None)
    found: dict[str, Answered] = {}
    for row in table.rows:
        answers, is_pair = ([], False) if row.problem and not _listed(row.cells) else _answers_of(row)
        if not answers:
            continue
        prompt = row.messages or row.texts[0]
        key = str(prompt) if len(answers) == 1 else f"row {row.number}"
        before = found[key].answers if key in found else ()
        columns = {name: row.cells[name] for name in TEMPLATE_COLUMNS if row.cells.get(name)}
        topic = next((str(row.cells[name]) for name in TOPICS if row.cells.get(name)), None)
        found[key] = Answered(prompt, _distinct((*before, *answers)), is_pair, topic, columns)
    if not found:
        names = ", ".join((*LISTS, *SINGLE))
        raise DataError(
            f"{table.source}: no responses to label. Give a file with chosen and rejected, or with one of the columns {names}; "
            "or name models that respond: reinforcepp label MODEL --data FILE."
        )
    return list(found.values())


def _listed(cells: Mapping[str, Any]) -> Sequence[Any]:
    return next((cells[name] for name in LISTS if isinstance(cells.get(name), list) and cells[name]), [])


def _answers_of(row: Row) -> tuple[list[Answer], bool]:
    """Return the responses of a row, and whether the first of two is better."""
    cells = row.cells
    if listed := _listed(cells):
        return [each for each in map(_answer, listed) if each is not None], False
    if len(row.texts) == 3:
        return [_with_model(cells, row.texts[1], "chosen"), _with_model(cells, row.texts[2], "rejected")], True
    for pair in PAIRS:
        if all(cells.get(name) for name in pair):
            return [_with_model(cells, _text(cells[name]), name[-1]) for name in pair], False
    single = next((name for name in SINGLE if cells.get(name)), None)
    return ([_with_model(cells, _text(cells[single]), "")], False) if single else ([], False)


def _answer(item: Any) -> Answer | None:
    """Return a response of a list: a text, or an object with a text and its model."""
    if not isinstance(item, Mapping):
        return Answer(item) if isinstance(item, str) else None
    text = next((_text(item[name]) for name in TEXTS if item.get(name)), None)
    return None if text is None else _with_model(item, text, "")


def _with_model(cells: Mapping[str, Any], text: str, side: str) -> Answer:
    """Return a response with the model that the cells name: ``model``, ``chosen_model`` or ``model_a``."""

    def cell(*names: str) -> Any:
        wanted = [name if not side else f"{side}_{name}" for name in names] + [f"{name}_{side}" for name in names]
        return next((cells[name] for name in wanted if cells.get(name) is not None), None)

    model, temperature = cell("model"), cell("temperature")
    sampling = {} if temperature is None else {"temperature": temperature}
    return Answer(text, None if model is None else str(model), sampling, cell("finish", "finish_reason") == "length")


def _text(cell: Any) -> str:
    """Return a response that is a text or messages as text."""
    try:
        content = parse_content(cell, "response")
    except UnusableCell:
        return ""
    return content if isinstance(content, str) else "\n".join(message.content for message in content)


def _distinct(answers: Iterable[Answer]) -> tuple[Answer, ...]:
    """Return the answers with different texts that aren't blank."""
    found: dict[str, Answer] = {}
    for each in answers:
        found.setdefault(each.text.strip(), each)
    return tuple(each for text, each in found.items() if text)
