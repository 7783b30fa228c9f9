"""The responses of a file, and the gold units. Loads no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence

from reinforcepp.config import LabelConfig
from reinforcepp.data.feedback import NewUnit, Store
from reinforcepp.data.feedback.answer_files import Answered, read_answers
from reinforcepp.labeling.units import Score, gold_units, make_units
from reinforcepp.runtime.terminal import echo


def add_from_file(config: LabelConfig, store: Store, scores: Sequence[Score]) -> None:
    """Add the responses in ``config.data``.

    Raises:
        DataError: The file has no responses.
    """
    answered = read_answers(str(config.data))
    if 0 < config.max_prompts < len(answered):
        answered = random.Random(config.seed).sample(answered, config.max_prompts)
    units = units_of(config, answered, scores)
    skipped = len(answered) - len(units)
    added = store.add_units(units)
    echo(
        f"{config.data}: {added} new units; {len(units) - added} are in the database already"
        + (f"; skipped {skipped} prompts with too few different responses" if skipped else "")
        + "."
    )


def add_gold(config: LabelConfig, store: Store) -> None:
    """Add the pairs in ``config.gold``, which test the labelers.

    Raises:
        DataError: The file has no preference pairs.
    """
    if config.gold is not None:
        store.add_units(gold_units(read_answers(config.gold), config.seed))


def units_of(config: LabelConfig, answered: Sequence[Answered], scores: Sequence[Score]) -> list[NewUnit]:
    """Return the units that the settings make of responses."""
    return make_units(
        answered,
        config.task,
        num_answers=config.answers_per_prompt,
        overlap=config.overlap,
        seed=config.seed,
        scores=scores,
    )
