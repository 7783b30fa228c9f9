"""Parse the setting ``criteria`` of a reward training: NAME, or NAME=COLUMN, or NAME=-COLUMN if lower is better."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from reinforcepp.errors import ConfigError

NAME = re.compile(r"(?!\d+$)\w[\w.-]*")
"""Names can be written in ``?outputs=NAME:0.5``, and a number there is the index of an output."""


@dataclass(frozen=True)
class Criterion:
    """A criterion of preferences: its name, the column with its judgments, and whether lower numbers are better."""

    name: str
    column: str
    lower_is_better: bool = False


def parse_criteria(texts: Sequence[str]) -> tuple[Criterion, ...]:
    """Return the criteria in ``texts``, each of which can hold several, separated by commas.

    Raises:
        ConfigError: If a name isn't valid or occurs twice.
    """
    found: dict[str, Criterion] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, equals, column = (each.strip() for each in part.partition("="))
        lower_is_better = column.startswith("-")
        column = column.removeprefix("-") if equals else name
        if not NAME.fullmatch(name) or not column:
            raise ConfigError(
                f"criteria: {part!r} isn't a criterion. Write a name of letters, digits, dots and hyphens, or NAME=COLUMN, or "
                "NAME=-COLUMN if lower numbers are better."
            )
        if name in found:
            raise ConfigError(f"criteria: {name} is given twice. Remove one.")
        found[name] = Criterion(name, column, lower_is_better)
    return tuple(found.values())
