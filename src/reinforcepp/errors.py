"""What can go wrong, as a tree of named exceptions.

    ReinforceError              every error this package raises on purpose
    ├── ConfigError             a setting is unknown, out of range or contradicts another
    ├── DataError               a data file can't be read or holds too little that is usable
    ├── ModelError              a model folder or name can't be used for what was asked
    ├── RolloutError            generation failed or the engine is out of step with the trainer
    │   └── EngineLost          whoever generated is gone; what was trained until then is as it should be
    ├── RewardError             a reward function or a reward server failed
    └── TrainingDiverged        training was stopped because going on would be pointless
        └── UnusableUpdate      one update can't be made; training leaves it out, and stops after several in a row

Each message is one sentence that says what was wrong, where, and what to do about it.
The command line prints it without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReinforceError(Exception):
    """Base of all errors raised on purpose; its text is meant for the user."""


class ConfigError(ReinforceError, ValueError):
    """A setting is unknown, out of range or contradicts another one."""


class DataError(ReinforceError):
    """A data file is missing, unreadable or holds too little that is usable."""


class ModelError(ReinforceError):
    """A model name or folder can't be loaded or doesn't fit what was asked of it."""


class RolloutError(ReinforceError):
    """Generation failed, or the engine doesn't hold the trainer's weights."""


class EngineLost(RolloutError):
    """Nobody is left to generate: training can go on where others are."""


class RewardError(ReinforceError):
    """A reward function raised an exception, or a reward server gave no answer that can be used."""


class TrainingDiverged(ReinforceError):
    """Training was stopped because a value left the range in which it can recover."""


class UnusableUpdate(TrainingDiverged):
    """A reward, log-probability, loss or gradient isn't finite, or a policy ratio is out of all bounds."""


def first_line(error: BaseException) -> str:
    """Of what it says, at most 200 characters; its type's name where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:200]


def nearest(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the known word closest to ``word``, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
