"""The summary of how prompts are formatted: the form, and one example as the model reads it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from reinforcepp.data import PromptRow, SftRow
from reinforcepp.data.rows import is_unspaced
from reinforcepp.errors import option
from reinforcepp.models.prompt_format import prompt_form
from reinforcepp.runtime.terminal import echo
from reinforcepp.types import Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSPECTED_ROWS = 1000
FORMS = {"plain": "plain text", "question_answer": "question_answer", "chat template": "chat template"}
SHOWN_START, SHOWN_END = 300, 150


def print_prompt_format(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Preference | SftRow | PromptRow], ids: Sequence[int]
) -> None:
    """Print the form of the prompts of ``rows`` and the example ``ids``, and warn if plain prompts lack a border.

    Only the first ``INSPECTED_ROWS`` rows are counted.
    """
    form = prompt_form(tokenizer)
    inspected = list(islice(rows, INSPECTED_ROWS))
    example = f"First example: {_shortened(repr(str(tokenizer.decode(list(ids)))))}"
    if inspected and all(isinstance(row, SftRow) and row.question is None for row in inspected):
        echo(f"Texts are trained on as they are. {example}")
        return
    labeled = sum(len(row.messages) > 1 for row in inspected) if form == "plain" else 0
    labels = f" ({labeled} of {len(inspected)} prompts have several messages and get the labels Question and Answer)"
    echo(f"Prompt format: {FORMS[form]}{labels if labeled else ''}. {example}")
    borders = [border for row in inspected if (border := _border(row)) is not None]
    if form == "plain" and 2 * sum(map(_runs_together, borders)) > len(borders):
        first = next(filter(_runs_together, borders))
        echo(
            f"Most prompts and answers run together without a space (as in {''.join(first)!r}). Begin the answers with a space, "
            f"or set {option('prompt_format', 'question_answer')}.",
            "yellow",
        )


def _border(row: Preference | SftRow | PromptRow) -> tuple[str, str] | None:
    """Return the end of a prompt and the start of its answer, if the plain form joins them."""
    if isinstance(row, PromptRow) or len(row.messages) > 1 or (isinstance(row, SftRow) and row.question is None):
        return None
    return row.prompt[-10:], (row.chosen if isinstance(row, Preference) else row.completion)[:10]


def _runs_together(border: tuple[str, str]) -> bool:
    before, after = border[0][-1:], border[1][:1]
    return not (before.isspace() or after.isspace() or is_unspaced(before) or is_unspaced(after))


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_START + SHOWN_END:
        return text
    return f"{text[:SHOWN_START]} … {text[-SHOWN_END:]}"
