"""Call reward functions with TRL's signature, and add up their weighted scores."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Awaitable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from reinforcepp.data.builtin.judge import GoldJudge
from reinforcepp.errors import ConfigError, ReinforceError, RewardError, UnusableUpdate, nearest
from reinforcepp.models.conversations import as_messages
from reinforcepp.rewards.user_code import raised
from reinforcepp.runtime.process import outcome
from reinforcepp.runtime.terminal import warn_once
from reinforcepp.types import Completion

if TYPE_CHECKING:
    from transformers import TrainerState


RESERVED = (
    *("step", "epoch", "loss", "grad_norm", "learning_rate", "kl", "kl_coef", "entropy"),
    *("reward", "reward_std", "num_tokens", "step_time"),
)
"""Metrics of every training, which a reward function can't log."""


FAILED_KEY = "episodes/failed"
"""The metric that counts failed episodes."""
BATCHES_KEY = "dynamic_sampling/batches"
"""The count of the batches that dynamic sampling generated for a step."""


class RewardFunction(Protocol):
    """``f(prompts, completions, **columns) -> list[float | None]``, one score per completion, higher is better, as in TRL.

    A prompt that is a conversation is a list of messages, and its completion is ``[{"role": "assistant", "content": ...}]``.
    For other prompts, and for a function with the attribute ``plain_text``, both are texts. Completions are whole answers: if
    the chat template wrote the start of an answer, such as ``<think>``, they begin with it. The completion of an episode has
    all messages after the prompt; as a text, it is the last one of the policy.

    ``columns`` holds the data's other columns, one value per completion, and ``completion_ids``, ``trainer_state`` (a
    ``transformers.TrainerState``), ``log_extra(column, values)`` for a column of the tables of completions and
    ``log_metric(name, value)``. Unless the data has columns of these names, it also holds ``finish_reason``,
    ``conversations``, ``chat_template_kwargs`` and, in an environment, ``environment_rewards``. A function without
    ``**columns`` gets only the arguments it names. None means "not scored". The function can be ``async``.
    """

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        """Score each completion."""


class GoldReward:
    """The gold judge of the built-in data as a reward function, from 0 to 1.

    Raises:
        DataError: a prompt isn't in the built-in data.
    """

    name = "judge"
    plain_text = True

    def __init__(self) -> None:
        self._judge = GoldJudge()

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """Score each completion."""
        return [self._judge.score(*pair) for pair in zip(prompts, completions, strict=True)]


class EnvironmentReward:
    """The sum of the rewards that the environment gave in an episode."""

    name = "environment"

    def __call__(
        self, prompts: list[Any], completions: list[Any], environment_rewards: Sequence[float | None] = (), **_: Any
    ) -> list[float | None]:
        """Return the sum of each episode, None if the environment gave no reward."""
        if None in environment_rewards:
            warn_once(
                "environment: episodes without a reward aren't trained on, unless another reward scores them. Return 0 "
                "instead of None for an episode that earned nothing."
            )
        return list(environment_rewards)


class Dropped(NamedTuple):
    """A completion that dynamic sampling dropped: key and dataset of its prompt, its reward and its sampled tokens."""

    key: int
    reward: float
    tokens: int
    source: str = ""


@dataclass(frozen=True)
class RewardScores:
    """Scores of each completion.

    ``total`` is the weighted sum over the functions that scored it, None if none did. ``by_function`` holds the unweighted
    scores by function name. ``skipped`` counts the completions that :func:`drop_unscored` removed. ``metrics`` has the means
    that functions logged with ``log_metric``, ``extra`` the columns that they logged with ``log_extra``, and ``counts`` the
    numbers of requests and the like, which are added up over the ranks. ``dropped`` are completions of groups without signal.
    """

    total: list[float | None]
    by_function: dict[str, list[float | None]]
    skipped: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def known(self) -> list[float]:
        """Totals of the scored completions."""
        return [total for total in self.total if total is not None]

    def rows(self, kept: Sequence[int]) -> RewardScores:
        """Return the scores of some completions, which are given by index; the others count as skipped."""
        by_function = {name: [row[i] for i in kept] for name, row in self.by_function.items()}
        extra = {name: [row[i] for i in kept] for name, row in self.extra.items()}
        skipped = self.skipped + len(self.total) - len(kept)
        total = [self.total[i] for i in kept]
        return RewardScores(total, by_function, skipped, self.metrics, extra, self.counts, self.dropped)


def join_scores(parts: Sequence[RewardScores]) -> RewardScores:
    """Return the scores of all ranks; metrics are means over the ranks that logged them."""
    logged = {
        name: [part.metrics[name] for part in parts if name in part.metrics] for part in parts for name in part.metrics
    }
    columns = dict.fromkeys(name for part in parts for name in part.extra)
    return RewardScores(
        [total for part in parts for total in part.total],
        {name: [score for part in parts for score in part.by_function[name]] for name in parts[0].by_function},
        sum(part.skipped for part in parts),
        {name: math.fsum(values) / len(values) for name, values in logged.items()},
        {name: [cell for part in parts for cell in part.extra.get(name, [None] * len(part.total))] for name in columns},
        {name: math.fsum(part.counts.get(name, 0.0) for part in parts) for part in parts for name in part.counts},
        [completion for part in parts for completion in part.dropped],
    )


class BatchLog:
    """The metrics and columns that reward functions log about a batch.

    Args:
        count: number of completions.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.values: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Log a number; several values of a batch, and those of all ranks, are averaged.

        Raises:
            ConfigError: the value isn't a number, or the trainer logs a metric of this name.
        """
        if name in RESERVED:
            raise ConfigError(f"log_metric({name!r}): the trainer logs a metric of this name. Use another name.")
        try:
            self.values.setdefault(name, []).append(float(value))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"log_metric({name!r}): {value!r} isn't a number. Log a number.") from error

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log a column of the tables of completions; values that aren't numbers are stored as text.

        Raises:
            ConfigError: there isn't one value per completion, or the column was logged before.
        """
        cells = [_cell(value) for value in values]
        if len(cells) != self.count:
            raise ConfigError(
                f"log_extra({column!r}): {len(cells)} values for {self.count} completions. Log one value per completion."
            )
        if column in self.extra:
            raise ConfigError(f"log_extra({column!r}): the column was logged twice for a batch. Use another name.")
        self.extra[column] = cells

    @property
    def metrics(self) -> dict[str, float]:
        """The mean of each metric."""
        return {name: math.fsum(values) / len(values) for name, values in self.values.items()}


def _cell(value: Any) -> Any:
    if isinstance(value, str | int | float | None):
        return value
    return value.item() if getattr(value, "ndim", None) == 0 else str(value)  # a number of PyTorch or NumPy


def function_name(function: RewardFunction) -> str:
    """Return the name under which a function's scores are logged."""
    while isinstance(function, partial):
        function = function.func
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


def score_with(
    functions: Sequence[RewardFunction],
    completions: Sequence[Completion],
    weights: Sequence[float] | None = None,
    truncation_penalty: float = 0.0,
    trainer_state: TrainerState | None = None,
    length_power: float = 0.0,
) -> RewardScores:
    """Return the scores of all functions and their sum: total_i = sum_f weight_f · score_fi / n_i^power - penalty_i.

    n_i is the number of tokens that the policy sampled, at least 1. With the power 1, a total is the reward per token, the token
    efficiency of GFPO. [arXiv 2508.09726]

    Functions run one after another, collective ones first; the results of ``async`` functions are awaited together.

    Args:
        functions: the reward functions.
        completions: of all prompts, in any order.
        weights: one per function, 1 by default.
        truncation_penalty: subtracted from the total of a completion that was truncated at the length limit.
        trainer_state: passed to the functions; default: the state before training.
        length_power: 0 doesn't normalize by length.

    Raises:
        ConfigError: a function needs a missing column, or doesn't return one number or None per completion.
        RewardError: a function raised an exception.
        UnusableUpdate: a score isn't finite.
    """
    texts = [c.text for c in completions]
    log = BatchLog(len(completions))
    plain, messages = _text_arguments(completions, log), _arguments(completions, log, trainer_state)
    names = unique_names(functions)
    order = sorted(range(len(functions)), key=lambda i: not is_collective(functions[i]))
    called = {
        i: _call(names[i], functions[i], plain if getattr(functions[i], "plain_text", False) else messages)
        for i in order
    }
    returned = _await_all(names, [called[i] for i in range(len(functions))])
    scores = [_check(name, values, texts) for name, values in zip(names, returned, strict=True)]
    weights = [1.0] * len(functions) if weights is None else weights
    total: list[float | None] = []
    for i, completion in enumerate(completions):
        scale = length_scale(completion, length_power)
        terms = [
            weight * score / scale for weight, row in zip(weights, scores, strict=True) if (score := row[i]) is not None
        ]
        penalty = truncation_penalty if completion.finish_reason == "length" else 0.0
        total.append(math.fsum([*terms, -penalty]) if terms else None)
    by_function: dict[str, list[float | None]] = {}
    counts: dict[str, float] = {}
    for name, function, values in zip(names, functions, scores, strict=True):
        counts |= getattr(function, "request_counts", {})
        by_function[name] = values
        outputs: Mapping[str, list[float]] = getattr(function, "by_output", {})
        by_function |= {f"{name}/{label}": list(outputs[label]) for label in outputs}
    return RewardScores(total, by_function, metrics=log.metrics, extra=log.extra, counts=counts)


def length_scale(completion: Completion, power: float) -> float:
    """Return what a completion's reward is divided by: the number of its sampled tokens, at least 1, to the ``power``."""
    return float(max(1, len(completion.sampled_ids)) ** power)


def drop_failed(completions: Sequence[Completion]) -> tuple[list[Completion], list[Completion]]:
    """Return the completions without those of failed episodes, and these."""
    return [c for c in completions if not c.error], [c for c in completions if c.error]


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
    return [completions[i] for i in kept], scores.rows(kept)


# --- calling --------------------------------------------------------------------------------------------------------


def _columns(completions: Sequence[Completion]) -> dict[str, Any]:
    names = sorted({name for c in completions for name in c.prompt.columns})
    return {name: [c.prompt.columns.get(name) for c in completions] for name in names}


def _own_arguments(completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the arguments that TRL doesn't have."""
    episodes = (
        {"environment_rewards": [c.environment_reward for c in completions]}
        if any(c.turns for c in completions)
        else {}
    )
    return {
        **episodes,
        "conversations": [c.context for c in completions],
        "chat_template_kwargs": [dict(c.prompt.chat_template_kwargs) for c in completions],
        "finish_reason": [c.finish_reason for c in completions],
    }


def _text_arguments(completions: Sequence[Completion], log: BatchLog) -> dict[str, Any]:
    """Return the arguments of functions that read plain text; columns of the data don't replace any."""
    return {
        **_columns(completions),
        **_own_arguments(completions),
        "prompts": [c.prompt.text for c in completions],
        "completions": [c.prompt.prefill + c.text for c in completions],
        "finish_reason": [c.text_finish_reason for c in completions],
        "completion_ids": [list(c.sampled_ids) for c in completions],
        "log_extra": log.log_extra,
    }


def _arguments(completions: Sequence[Completion], log: BatchLog, trainer_state: TrainerState | None) -> dict[str, Any]:
    """Return the arguments of other functions, as TRL's trainers pass them."""
    pairs = [messages_or_text(completion) for completion in completions]
    return {
        **_own_arguments(completions),
        **_columns(completions),
        "prompts": [prompt for prompt, _ in pairs],
        "completions": [completion for _, completion in pairs],
        "completion_ids": [list(c.sampled_ids) for c in completions],
        "trainer_state": trainer_state or new_state(),
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }


def new_state() -> TrainerState:
    """Return the state before training."""
    from transformers import TrainerState  # loads PEFT

    return TrainerState()


def messages_or_text(completion: Completion) -> tuple[Any, Any]:
    """Return prompt and completion as TRL does: as lists of messages if the prompt is a conversation, otherwise as texts."""
    prompt = completion.prompt
    if not prompt.messages and not completion.turns:
        return prompt.text, prompt.prefill + completion.text
    return [dict(message) for message in as_messages(prompt.conversation)], completion.messages


def _call(name: str, function: RewardFunction, arguments: dict[str, Any]) -> Any:
    accepted = _accepted(name, function, arguments)
    try:
        return function(**accepted)
    except ReinforceError:
        raise
    except Exception as error:  # user code can raise anything
        raise reward_error(name, error) from error


def _accepted(name: str, function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
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
    return RewardError(f"Reward function {name}: failed{raised(error)}.")


def _check(name: str, scores: Any, texts: list[str]) -> list[float | None]:
    if isinstance(scores, (str, bytes, Mapping, Set)) or not isinstance(scores, Iterable):
        raise ConfigError(
            f"Reward function {name}: returned a {type(scores).__name__}, not a list of numbers. Return a list with one "
            "number or None per completion."
        )
    try:
        numbers = [None if score is None else float(score) for score in scores]
    except (TypeError, ValueError, OverflowError) as error:
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
