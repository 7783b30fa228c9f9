"""Load reward functions, call them with TRL's signature, and add up their weighted scores."""

from __future__ import annotations

import asyncio
import inspect
import math
import sys
import traceback
from collections import Counter
from collections.abc import Awaitable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from reinforcepp.data.builtin.judge import GoldJudge
from reinforcepp.errors import ConfigError, ReinforceError, RewardError, UnusableUpdate, nearest
from reinforcepp.files import sha256
from reinforcepp.runtime import outcome
from reinforcepp.types import Completion


class RewardFunction(Protocol):
    """``f(prompts, completions, **columns) -> list[float | None]``, one score per completion, higher is better.

    ``completions`` are whole answers: if the chat template wrote the start of an answer, such as ``<think>``, they begin with
    it. ``columns`` holds the data's other columns, one value per completion, as well as ``completion_ids``,
    ``finish_reason``, ``conversations`` and ``chat_template_kwargs``. A function without ``**columns`` gets only the arguments
    it names. None means "not scored". The function can be ``async``.
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Any:
        """Score each completion."""


class GoldReward:
    """The gold judge of the built-in data as a reward function, from 0 to 1.

    Raises:
        DataError: a prompt isn't in the built-in data.
    """

    name = "judge"

    def __init__(self) -> None:
        self._judge = GoldJudge()

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """Score each completion."""
        return [self._judge.score(*pair) for pair in zip(prompts, completions, strict=True)]


@dataclass(frozen=True)
class RewardScores:
    """Scores of each completion.

    ``total`` is the weighted sum over the functions that scored it, None if none did. ``by_function`` holds the unweighted
    scores by function name. ``skipped`` counts the completions that :func:`drop_unscored` removed.
    """

    total: list[float | None]
    by_function: dict[str, list[float | None]]
    skipped: int = 0

    @property
    def known(self) -> list[float]:
        """Totals of the scored completions."""
        return [total for total in self.total if total is not None]


def function_name(function: RewardFunction) -> str:
    """Return the name under which a function's scores are logged."""
    return str(getattr(function, "__name__", None) or getattr(function, "name", None) or type(function).__name__)


def is_collective(function: RewardFunction) -> bool:
    """Return whether all ranks must call the function together.

    Ranks without completions call it, too, and it comes before all others, which can fail on one rank alone.
    """
    return bool(getattr(function, "collective", False))


def unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    """Return the name of each function; append a number to every repeated name."""
    names: list[str] = []
    for function in functions:
        name, number = function_name(function), 1
        while name in names:
            name, number = f"{function_name(function)}_{number}", number + 1
        names.append(name)
    return names


def score_all(reward: RewardFunction, completions: Sequence[Completion]) -> list[float]:
    """Return scores from a reward that scores every completion, as trained models and judges do."""
    scores = score_with([reward], completions).total
    assert all(score is not None for score in scores), f"{function_name(reward)} didn't score a completion"
    return [float(score) for score in scores if score is not None]


def score_with(
    functions: Sequence[RewardFunction],
    completions: Sequence[Completion],
    weights: Sequence[float] | None = None,
    truncation_penalty: float = 0.0,
) -> RewardScores:
    """Return the scores of all functions and their sum: total_i = sum_f weight_f · score_fi - penalty_i.

    Functions run one after another, collective ones first; the results of ``async`` functions are awaited together.

    Args:
        functions: the reward functions.
        completions: of all prompts, in any order.
        weights: one per function, 1 by default.
        truncation_penalty: subtracted from the total of a completion that was truncated at the length limit.

    Raises:
        ConfigError: a function needs a missing column, or doesn't return one number or None per completion.
        RewardError: a function raised an exception.
        UnusableUpdate: a score isn't finite.
    """
    texts = [c.text for c in completions]
    arguments = _arguments(completions)
    names = unique_names(functions)
    order = sorted(range(len(functions)), key=lambda i: not is_collective(functions[i]))
    called = {i: _call(names[i], functions[i], arguments) for i in order}
    returned = _await_all(names, [called[i] for i in range(len(functions))])
    scores = [_check(name, values, texts) for name, values in zip(names, returned, strict=True)]
    weights = [1.0] * len(functions) if weights is None else weights
    total: list[float | None] = []
    for i, completion in enumerate(completions):
        terms = [weight * score for weight, row in zip(weights, scores, strict=True) if (score := row[i]) is not None]
        penalty = truncation_penalty if completion.finish_reason == "length" else 0.0
        total.append(math.fsum([*terms, -penalty]) if terms else None)
    by_function: dict[str, list[float | None]] = {}
    for name, function, values in zip(names, functions, scores, strict=True):
        by_function[name] = values
        outputs: Mapping[str, list[float]] = getattr(function, "by_output", {})
        by_function |= {f"{name}/{label}": list(outputs[label]) for label in outputs}
    return RewardScores(total, by_function)


def drop_unscored(
    completions: list[Completion], scores: RewardScores, *, grouped: bool
) -> tuple[list[Completion], RewardScores]:
    """Return the scored completions and their scores.

    If the estimator compares samples of a prompt (``grouped``), a prompt's only scored sample is dropped, too.
    """
    kept = [i for i, total in enumerate(scores.total) if total is not None]
    if grouped:
        samples = Counter(completions[i].prompt.key for i in kept)
        kept = [i for i in kept if samples[completions[i].prompt.key] > 1]
    if len(kept) == len(completions):
        return completions, scores
    by_function = {name: [row[i] for i in kept] for name, row in scores.by_function.items()}
    remaining = RewardScores([scores.total[i] for i in kept], by_function, len(completions) - len(kept))
    return [completions[i] for i in kept], remaining


# --- calling --------------------------------------------------------------------------------------------------------


def _arguments(completions: Sequence[Completion]) -> dict[str, list[Any]]:
    names = sorted({name for c in completions for name in c.prompt.columns})
    columns: dict[str, list[Any]] = {name: [c.prompt.columns.get(name) for c in completions] for name in names}
    return columns | {
        "prompts": [c.prompt.text for c in completions],
        "completions": [c.prompt.prefill + c.text for c in completions],
        "conversations": [c.prompt.conversation for c in completions],
        "chat_template_kwargs": [dict(c.prompt.chat_template_kwargs) for c in completions],
        "completion_ids": [list(c.ids) for c in completions],
        "finish_reason": [c.finish_reason for c in completions],
    }


def _call(name: str, function: RewardFunction, arguments: dict[str, list[Any]]) -> Any:
    accepted = _accepted(name, function, arguments)
    try:
        return function(**accepted)
    except ReinforceError:
        raise
    except Exception as error:  # user code can raise anything
        raise reward_error(name, error) from error


def _accepted(name: str, function: RewardFunction, arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        named = parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if named and parameter.default is parameter.empty and parameter.name not in arguments:
            raise ConfigError(
                f"Reward function {name}: parameter {parameter.name!r} matches no column of the data. "
                f"Use one of {', '.join(arguments)}.{nearest(parameter.name, arguments)}"
            )
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {key: value for key, value in arguments.items() if key in parameters}


def _await_all(names: Sequence[str], returned: list[Any]) -> list[Any]:
    """Return ``returned`` with its awaitables replaced by their results, all awaited in one event loop."""

    async def result(name: str, pending: Awaitable[Any]) -> Any:
        try:
            return await pending
        except ReinforceError:
            raise
        except Exception as error:  # user code can raise anything
            raise reward_error(name, error) from error

    async def all_results() -> list[Any]:
        return await asyncio.gather(*(result(names[i], returned[i]) for i in awaitable))

    awaitable = [i for i, value in enumerate(returned) if inspect.isawaitable(value)]
    if not awaitable:
        return returned
    results = dict(zip(awaitable, outcome(all_results()), strict=True))
    return [results.get(i, value) for i, value in enumerate(returned)]


def reward_error(name: str, error: Exception) -> RewardError:
    """Return an error that gives the function's name and the line and message of the exception it raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    message = traceback.format_exception_only(error)[-1].strip()
    return RewardError(f"Reward function {name}: failed{where}: {message.rstrip('.')}.")


def _check(name: str, scores: Any, texts: list[str]) -> list[float | None]:
    if isinstance(scores, (str, bytes, Mapping, Set)) or not isinstance(scores, Iterable):
        raise ConfigError(
            f"Reward function {name}: returned a {type(scores).__name__}, not a list of numbers. Return a list with one "
            "number or None per completion."
        )
    try:
        numbers = [None if score is None else float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"Reward function {name}: returned a {type(scores).__name__} with a value that isn't a number ({error}). Return a "
            "list with one number or None per completion."
        ) from error
    if len(numbers) != len(texts):
        raise ConfigError(
            f"Reward function {name}: returned {len(numbers)} scores for {len(texts)} completions. Return one per completion."
        )
    for number, text in zip(numbers, texts, strict=True):
        if number is not None and not math.isfinite(number):
            raise UnusableUpdate(
                f"Reward function {name}: returned {number} for the completion that begins {text[:60]!r}. "
                "Return finite numbers, or None for no score."
            )
    return numbers


# --- loading user code ------------------------------------------------------------------------------------------------


def load_function(source: str) -> RewardFunction:
    """Return the function that ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION`` names. This imports the module.

    Raises:
        ConfigError: the module or the function doesn't exist.
        RewardError: the module raised an exception.
    """
    module_name, _, name = source.rpartition(":")
    module = _load_module(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        available = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        problem = f"has no function {name!r}" if function is None else f"{name!r} can't be called"
        raise ConfigError(f"{module_name}: {problem}.{nearest(name, available)}")
    return function


def source_digest(source: str) -> str:
    """Return ``source`` with a hash of its file, so that a resumed run notices a change."""
    file = getattr(_load_module(source.rpartition(":")[0]), "__file__", None)
    return f"{source}@{sha256(Path(file))[:16]}" if file is not None else source


def _load_module(name: str) -> ModuleType:
    if name.endswith(".py"):
        return _load_file(Path(name).expanduser())
    _add_to_path(Path.cwd())
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # the module imports a missing one
            raise reward_error(name, error) from error
        raise ConfigError(
            f"{name}: Python module not found, neither in {Path.cwd()} nor installed. Give the function as "
            "path/to/file.py:function, or the folder of a reward model."
        ) from error
    except ReinforceError:
        raise
    except Exception as error:  # user code can raise anything
        raise reward_error(name, error) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{path}: file not found. Give the path of a Python file with a reward function.")
    name = f"reinforcepp_reward_{sha256(path)[:16]}"  # the file's own name can hide another module
    if name in sys.modules:
        return sys.modules[name]
    _add_to_path(path.resolve().parent)  # for the file's own imports
    spec: Any = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code can raise anything
        del sys.modules[name]
        if isinstance(error, ReinforceError):
            raise
        raise reward_error(str(path), error) from error
    return module


def _add_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
