"""The responses of a file, and the gold units. Loads no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence

from reinforcepp.config import LabelConfig
from reinforcepp.data.feedback import NewUnit, Store
from reinforcepp.data.feedback.answer_files import Answered, read_answers
from reinforcepp.errors import DataError
from reinforcepp.labeling.units import Score, gold_units, make_units, uncertain_first
from reinforcepp.runtime.terminal import echo


def add_from_file(config: LabelConfig, store: Store) -> None:
    """Add the responses in ``config.data``.

    Raises:
        DataError: The file has no responses.
    """
    answered = read_answers(str(config.data))
    if 0 < config.max_prompts < len(answered):
        answered = random.Random(config.seed).sample(answered, config.max_prompts)
    units = units_of(config, answered)
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
    if config.gold is None:
        return
    units = gold_units(read_answers(config.gold), config.task, config.seed)
    if not units:
        raise DataError(
            f"gold: {config.gold} has no pairs with a known better response. Give a file with chosen and rejected."
        )
    added = store.add_units(units)
    echo(f"{config.gold}: {added} new gold units; {len(units) - added} are in the database already.")


def put_uncertain_first(config: LabelConfig, store: Store, scores: Sequence[Score]) -> None:
    """Order the units that need votes, also those of earlier runs, by the uncertainty of reward models."""
    units = store.open_units(config.task)
    answered = [Answered(each.prompt, each.answers, False, each.topic, each.columns) for each in units]
    priorities = uncertain_first(answered, scores)
    store.set_priorities({unit.id: priority for unit, priority in zip(units, priorities, strict=True)})
    echo(f"Ordered {len(units)} units by the uncertainty of {', '.join(config.reward_model)}.")


def units_of(config: LabelConfig, answered: Sequence[Answered], scores: Sequence[Score] = ()) -> list[NewUnit]:
    """Return the units that the settings make of responses."""
    return make_units(
        answered,
        config.task,
        num_answers=config.answers_per_prompt,
        overlap=config.overlap,
        seed=config.seed,
        scores=scores,
    )
