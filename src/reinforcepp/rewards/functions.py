"""Calling reward functions, each in the signature that TRL's users know, and adding up what they say."""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from reinforcepp.data.builtin.judge import GoldJudge
from reinforcepp.errors import ConfigError, ReinforceError, RewardError, UnusableUpdate, nearest
from reinforcepp.runtime import outcome
from reinforcepp.types import Completion


class RewardFunction(Protocol):
    """``f(prompts, completions, **columns) -> list[float | None]``, one score per completion, higher is better.

    ``columns`` holds the data's other columns, one value per completion, and ``completion_ids`` and
    ``finish_reason``; a function that doesn't take keyword arguments gets only those it names. None is "not scored".
    An ``async def`` does as well.
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Any:
        """Score each completion."""


class GoldReward:
    """The built-in data's gold judge as a reward function, 0 to 1.

    Raises:
        DataError: for a prompt that isn't one of the built-in data.
    """

    name = "judge"

    def __init__(self) -> None:
        self._judge = GoldJudge()

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """Score each completion."""
        return [self._judge.score(*pair) for pair in zip(prompts, completions, strict=True)]


@dataclass(frozen=True)
class RewardScores:
    """What the reward functions said of each completion.

    ``total`` is the weighted sum over the functions that scored it, None where none did; ``by_function`` is what each
    said by itself. ``skipped`` is the number of completions that :func:`drop_unscored` has taken away.
    """

    total: list[float | None]
    by_function: dict[str, list[float | None]]
    skipped: int = 0

    @property
    def known(self) -> list[float]:
        """The sums that there are."""
        return [total for total in self.total if total is not None]


def function_name(function: RewardFunction) -> str:
    """The name under which a function's scores are logged."""
    return str(getattr(function, "__name__", None) or getattr(function, "name", None) or type(function).__name__)


def is_collective(function: RewardFunction) -> bool:
    """Whether all processes that train together have to call it alike: without completions, too, and before any other,
    which may fail in one of them.
    """
    return bool(getattr(function, "collective", False))


def unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    """The name of each; of those that share one, all but the first get a number."""
    names: list[str] = []
    for function in functions:
        name, number = function_name(function), 1
        while name in names:
            name, number = f"{function_name(function)}_{number}", number + 1
        names.append(name)
    return names


def score_all(reward: RewardFunction, completions: Sequence[Completion]) -> list[float]:
    """Scores by a reward that leaves none out, as trained models and judges do."""
    scores = score_with([reward], completions).total
    assert all(score is not None for score in scores), f"{function_name(reward)} left a completion out"
    return [float(score) for score in scores if score is not None]


def score_with(
    functions: Sequence[RewardFunction],
    completions: Sequence[Completion],
    weights: Sequence[float] | None = None,
    truncation_penalty: float = 0.0,
) -> RewardScores:
    """Score ``completions`` with every function and add the scores up, each times its weight.

    Functions are called one after another, first those that :func:`is_collective` names; what those among them that are
    ``async`` return is then awaited together.
    ``truncation_penalty`` is taken off what was cut off at the length limit.

    Raises:
        ConfigError: if a function wants a column that isn't there, or returns something other than one number or None
            per completion.
        RewardError: if a function raises an exception.
        UnusableUpdate: if a score is not finite.
    """
    texts = [c.text for c in completions]
    given = _arguments(completions)
    names = unique_names(functions)
    order = sorted(range(len(functions)), key=lambda i: not is_collective(functions[i]))
    answers = {i: _called(names[i], functions[i], given) for i in order}
    said = _awaited(names, [answers[i] for i in range(len(functions))])
    scores = [_checked(name, answer, texts) for name, answer in zip(names, said, strict=True)]
    factors = [1.0] * len(functions) if weights is None else weights
    total: list[float | None] = []
    for i, completion in enumerate(completions):
        parts = [factor * score for factor, own in zip(factors, scores, strict=True) if (score := own[i]) is not None]
        penalty = truncation_penalty if completion.finish_reason == "length" else 0.0
        total.append(math.fsum([*parts, -penalty]) if parts else None)
    return RewardScores(total, dict(zip(names, scores, strict=True)))


def drop_unscored(
    completions: list[Completion], scores: RewardScores, *, grouped: bool
) -> tuple[list[Completion], RewardScores]:
    """The completions that a function scored and their scores, so that the others have no part in anything.

    Where samples of a prompt are compared (``grouped``), one that is left alone has nothing to be compared with and
    goes, too.
    """
    kept = [i for i, total in enumerate(scores.total) if total is not None]
    if grouped:
        samples = Counter(completions[i].prompt.key for i in kept)
        kept = [i for i in kept if samples[completions[i].prompt.key] > 1]
    if len(kept) == len(completions):
        return completions, scores
    by_function = {name: [own[i] for i in kept] for name, own in scores.by_function.items()}
    left = RewardScores([scores.total[i] for i in kept], by_function, len(completions) - len(kept))
    return [completions[i] for i in kept], left


# --- calling --------------------------------------------------------------------------------------------------------


def _arguments(completions: Sequence[Completion]) -> dict[str, list[Any]]:
    names = sorted({name for c in completions for name in c.prompt.columns})
    columns: dict[str, list[Any]] = {name: [c.prompt.columns.get(name) for c in completions] for name in names}
    return columns | {
        "prompts": [c.prompt.text for c in completions],
        "completions": [c.text for c in completions],
        "completion_ids": [list(c.ids) for c in completions],
        "finish_reason": [c.finish_reason for c in completions],
    }


def _called(name: str, function: RewardFunction, given: dict[str, list[Any]]) -> Any:
    accepted = _accepted(name, function, given)
    try:
        return function(**accepted)
    except ReinforceError:
        raise
    except Exception as error:  # the user's own code, in which anything may go wrong
        raise reward_error(name, error) from error


def _accepted(name: str, function: RewardFunction, given: dict[str, list[Any]]) -> dict[str, list[Any]]:
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        named = parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if named and parameter.default is parameter.empty and parameter.name not in given:
            raise ConfigError(
                f"The reward function {name} wants {parameter.name!r}, which the data has no column for; it gets "
                f"{', '.join(given)}.{nearest(parameter.name, given)}"
            )
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return given
    return {key: value for key, value in given.items() if key in parameters}


def _awaited(names: Sequence[str], said: list[Any]) -> list[Any]:
    """``said`` with the results of what is awaitable in it, all awaited together in one loop."""

    async def result(name: str, answer: Awaitable[Any]) -> Any:
        try:
            return await answer
        except ReinforceError:
            raise
        except Exception as error:  # the user's own code
            raise reward_error(name, error) from error

    async def all_results() -> list[Any]:
        return await asyncio.gather(*(result(names[i], said[i]) for i in waiting))

    waiting = [i for i, answer in enumerate(said) if inspect.isawaitable(answer)]
    if not waiting:
        return said
    known = dict(zip(waiting, outcome(all_results()), strict=True))
    return [known.get(i, answer) for i, answer in enumerate(said)]


def reward_error(name: str, error: Exception) -> RewardError:
    """What the user is told of an exception in a reward function: its name, place and words."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    words = traceback.format_exception_only(error)[-1].strip()
    return RewardError(f"The reward function {name} failed{where}: {words.rstrip('.')}.")


def _checked(name: str, scores: Any, texts: list[str]) -> list[float | None]:
    try:
        numbers = [None if score is None else float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The reward function {name} must return a list of numbers, one, or None, for each completion."
        ) from error
    if len(numbers) != len(texts):
        raise ConfigError(f"The reward function {name} returned {len(numbers)} scores for {len(texts)} completions.")
    for number, text in zip(numbers, texts, strict=True):
        if number is not None and not math.isfinite(number):
            raise UnusableUpdate(
                f"The reward function {name} gave {number} to the completion that begins {text[:60]!r}; "
                "every reward must be a finite number."
            )
    return numbers
