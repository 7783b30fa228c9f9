"""What an environment is, and how the setting ``environment`` becomes one object per episode."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from reinforcepp.errors import ConfigError, first_line, shown
from reinforcepp.rewards.user_code import load_object
from reinforcepp.types import Conversation, Messages

METHODS = ("reset", "step")


class Environment(Protocol):
    """One episode: what the policy sees first, and what follows each of its messages. Its methods can be ``async``.

    A new object is made for each episode and closed at its end. Episodes run at the same time: methods are called in threads,
    or, if they are ``async``, in one event loop. An environment must depend on its row and the policy's messages alone, so that
    a resumed run sees the same episodes. If ``close`` is missing, nothing is closed.
    """

    def reset(self, row: Mapping[str, Any]) -> Conversation | None:
        """Begin the episode of a data row; return the messages of the prompt, or None for the row's own prompt.

        ``row`` has the columns of the data, and ``prompt``, which is a text or a list of messages.
        """

    def step(self, message: Mapping[str, Any]) -> tuple[Any, float | None, bool]:
        """Return ``(observation, reward, done)`` for the policy's message ``{"role": "assistant", "content": text}``.

        The observation is a text, which becomes a user message, or a list of messages, such as one of the role ``tool``. It can
        be None if the episode is done. The reward is a number, or None for no reward.
        """

    def close(self) -> None:
        """End the episode."""


EnvironmentFactory = Callable[[], Environment]


@dataclass(frozen=True)
class StepResult:
    """The checked result of :meth:`Environment.step`."""

    observation: Messages
    reward: float | None
    done: bool


def environment_factory(
    source: str | EnvironmentFactory, arguments: Mapping[str, Any] | None = None
) -> EnvironmentFactory:
    """Return a function that makes the environment of an episode.

    Args:
        source: ``module:Class`` or ``FILE.py:Class``, or a class or another function that returns an environment.
        arguments: passed by name.

    Raises:
        ConfigError: it doesn't exist, can't be called with the arguments, or lacks a method.
    """
    name = source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)
    make = load_object(source, "environment") if isinstance(source, str) else source
    try:
        inspect.signature(make).bind(**(arguments or {}))
    except (TypeError, ValueError) as error:  # the second one: a type without a signature, such as dict
        given = f"environment_kwargs {shown(dict(arguments))}" if arguments else "no arguments"
        raise ConfigError(
            f"environment {name}: can't be called with {given} ({error}). Correct environment_kwargs."
        ) from error
    missing = [method for method in METHODS if inspect.isclass(make) and not callable(getattr(make, method, None))]
    if missing:
        raise ConfigError(f"environment {name}: has no method {missing[0]}. Give a class with reset and step.")
    return lambda: make(**(arguments or {}))


def checked_prompt(value: Any) -> Conversation | None:
    """Return what :meth:`Environment.reset` returned.

    Raises:
        ValueError: it isn't a text, messages or None.
    """
    if value is None:
        return None
    messages = _messages(value)
    if isinstance(value, str):
        return value
    if not messages:
        raise ValueError("reset returned no messages; return a text, messages, or None for the row's own prompt")
    return messages


def checked_step(value: Any) -> StepResult:
    """Return what :meth:`Environment.step` returned.

    Raises:
        ValueError: it isn't an observation, a finite reward and a boolean.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise ValueError(f"step returned {shown(value)}, not (observation, reward, done)")
    observation, reward, done = value
    if reward is not None:
        try:
            reward = float(reward)
        except (TypeError, ValueError):
            raise ValueError(f"step returned the reward {shown(reward)}, which isn't a number") from None
        if not math.isfinite(reward):
            raise ValueError(f"step returned the reward {reward}; return a finite number, or None")
    messages = () if observation is None else _messages(observation)
    if not messages and not done:
        raise ValueError("step returned no observation, but the episode isn't done; return a text or messages")
    return StepResult(messages, reward, bool(done))


def _messages(value: Any) -> Messages:
    """Return a text or messages as a checkpoint holds them, so that a resumed run has the same messages."""
    if isinstance(value, str):
        value = {"role": "user", "content": value}
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    ):
        raise ValueError(f"it returned {shown(value)}, not a text or messages with role and content")
    try:
        written = json.dumps([dict(message) for message in value], ensure_ascii=False, allow_nan=False)
        written.encode()  # raises an exception for half a surrogate pair, which a tokenizer rejects
        return tuple(json.loads(written))
    except (TypeError, ValueError) as error:
        raise ValueError(f"it returned a message that can't be saved as JSON ({first_line(error)})") from None
