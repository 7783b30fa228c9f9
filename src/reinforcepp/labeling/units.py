"""From responses to units of work, in the order in which labelers should get them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from statistics import fmean, pstdev

from reinforcepp.config.labeling import MAX_ANSWERS, Task
from reinforcepp.data.feedback import Choice, NewUnit
from reinforcepp.data.feedback.answer_files import Answered

Score = Callable[[Sequence[Answered]], list[list[float]]]
"""Function that returns the scores of the responses to each prompt."""
FEWEST: dict[Task, int] = {"pair": 2, "rank": 2, "rate": 1, "edit": 1}


def make_units(
    answered: Sequence[Answered],
    task: Task,
    *,
    num_answers: int,
    overlap: int = 1,
    seed: int = 0,
    scores: Sequence[Score] = (),
) -> list[NewUnit]:
    """Return a unit for each prompt with enough different responses.

    Args:
        answered: Prompts with responses.
        task: What labelers do.
        num_answers: Responses per unit. Of more, random ones are chosen.
        overlap: How many labelers get a unit.
        seed: Seed of the random choices and of the random order.
        scores: Reward models. With them, the units on which these are least certain come first.
    """
    most = min(num_answers, 2 if task in ("pair", "edit") else MAX_ANSWERS)
    chosen = []
    for each in answered:
        shuffled = random.Random(f"{seed}/{each.prompt}")
        answers = each.answers if len(each.answers) <= most else shuffled.sample(each.answers, most)
        if len(answers) >= FEWEST[task]:
            chosen.append(Answered(each.prompt, tuple(answers), False, each.topic, each.columns))
    order = uncertain_first(chosen, scores) if scores else _random(chosen, seed)
    return [
        NewUnit(task, each.prompt, each.answers, each.topic, each.columns, overlap, priority)
        for each, priority in zip(chosen, order, strict=True)
    ]


def gold_units(answered: Iterable[Answered], task: Task = "pair", seed: int = 0) -> list[NewUnit]:
    """Return units whose first answer is known to be better. They have the task of the other units, which hides them."""
    pairs = [each for each in answered if each.is_pair and len(each.answers) == 2]
    return [
        NewUnit(task, each.prompt, each.answers, each.topic, each.columns, priority=priority, gold=Choice(0))
        for each, priority in zip(pairs, _random(pairs, seed), strict=True)
    ]


def _random(answered: Sequence[Answered], seed: int) -> list[float]:
    return [random.Random(f"{seed}/{each.prompt}/{each.answers}").random() for each in answered]


def uncertain_first(answered: Sequence[Answered], scores: Sequence[Score]) -> list[float]:
    """Return priorities, lowest first, by the mean uncertainty over all pairs of responses.

    One reward model is uncertain if its margin is near 0. Several disagree if the probabilities that they give the first
    response differ: their standard deviation, as in query by committee (Seung et al. 1992).
    """
    every = [score(answered) for score in scores]
    priorities = []
    for row in range(len(answered)):
        pairs = list(combinations(range(len(answered[row].answers)), 2))
        chances = [[_sigmoid(each[row][i] - each[row][j]) for each in every] for i, j in pairs]
        uncertain = [pstdev(chance) if len(every) > 1 else 0.5 - abs(chance[0] - 0.5) for chance in chances]
        priorities.append(-fmean(uncertain) if uncertain else 0.0)
    return priorities


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-max(min(x, 700.0), -700.0)))  # Beyond 700, exp overflows.
