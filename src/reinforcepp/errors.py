"""The exceptions of this package, as a tree.

    ReinforceError              every error this package raises on purpose
    ├── ConfigError             a setting is unknown, out of range or contradicts another
    ├── DataError               a data file can't be read or has too few usable rows
    ├── ModelError              a model folder or name can't be used for the command
    ├── RolloutError            generation failed or the engine is out of sync with the trainer
    │   └── EngineLost          every generation worker or server is gone; the training up to then is intact
    ├── RewardError             a reward function or a reward server failed
    ├── EnvironmentFailed       an environment or a tool failed in every episode
    └── TrainingDiverged        training was stopped because it diverged
        └── UnusableUpdate      one update can't be applied; training skips it and stops after several in a row

Each message names the setting or file, the problem and the fix. The command line prints it without a traceback and exits
with code 2.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from reinforcepp.runtime.redaction import redacted
from reinforcepp.runtime.terminal import one_message

MAX_MESSAGE_CHARACTERS = 10_000
MAX_SHOWN_CHARACTERS = 200


class ReinforceError(Exception):
    """Base of all errors raised on purpose: its message is for the user, never shows a secret, and has a bounded length."""

    given: Collection[str] = ()
    """Values of the command's settings, which the message can quote."""

    def __init__(self, message: object = "") -> None:
        text = redacted(str(message))
        if len(text) > MAX_MESSAGE_CHARACTERS:
            half = MAX_MESSAGE_CHARACTERS // 2
            text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters) ... {text[-half:]}"
        super().__init__(text)

    def __str__(self) -> str:
        """Return the message without control characters and with indented lines, because it can quote files and servers."""
        return one_message(super().__str__())


class ConfigError(ReinforceError, ValueError):
    """A setting is unknown, out of range or contradicts another setting."""


class DataError(ReinforceError):
    """A data file is missing, unreadable or has too few usable rows."""


class ModelError(ReinforceError):
    """A model name or folder can't be loaded or doesn't fit the command."""


class RolloutError(ReinforceError):
    """Generation failed, or the engine doesn't hold the trainer's weights."""


class EngineLost(RolloutError):
    """Every generation worker or server is gone. Training can continue if others become available."""


class RewardError(ReinforceError):
    """A reward function raised an exception, or a reward server returned no usable response."""


class EnvironmentFailed(ReinforceError):
    """An environment failed so often that there is nothing to train on."""


class TrainingDiverged(ReinforceError):
    """Training was stopped because a value left the range in which it can recover."""


class UnusableUpdate(TrainingDiverged):
    """A reward, log-probability, loss or gradient isn't finite, or a policy ratio is out of bounds."""


_typed_as_flags = False


@contextmanager
def command_line() -> Iterator[None]:
    """In this block, the user gives settings as flags, not as arguments in Python; see :func:`option`."""
    global _typed_as_flags
    before, _typed_as_flags = _typed_as_flags, True
    yield
    _typed_as_flags = before  # not after an exception, which sys.excepthook still reports


def option(name: str, value: str | int | None = None) -> str:
    """Return a setting for a message as the user gives it: ``--resume`` on the command line, ``resume=True`` in Python."""
    if _typed_as_flags:
        return f"--{name}" if value is None else f"--{name} {value}"
    return f"{name}={True if value is None else repr(value)}"


def setting(name: str) -> str:
    """Return the name of a setting for a message: ``--columns`` on the command line, ``columns`` in Python."""
    return f"--{name}" if _typed_as_flags else name


def with_flags(error: ReinforceError, names: Collection[str], arguments: Iterable[str]) -> str:
    """Return the message of ``error`` with the settings in ``names`` as flags, for the command line: ``--max_length 512``.

    Other text stays: ``arguments`` and values of settings (a folder can be called reward_model), messages of libraries, the
    current folder, quoted text, values of flags, parts of paths, and keys of a YAML file. A name of one word is a setting
    only at the start.
    """
    message, every, anywhere = str(error), "|".join(names), "|".join(name for name in names if "_" in name)
    values = {argument.partition("=")[2] if argument.startswith("--") else argument for argument in arguments}
    with suppress(OSError):  # the folder was deleted
        values.add(os.getcwd())
    texts = {text for text in (*values, *error.given, *_library_lines(error)) if text and text in message}
    kept = "|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in sorted(texts, key=len, reverse=True)) or "(?!)"
    found = re.compile(
        rf"{kept}|(?<!\w)'[^'\n]*'|\"[^\"\n]*\"|--\w+(?: (?:{every})\b)*|(?<!\.yaml: )(?<!\.yml: )(?<![\w./`$-])"
        rf"(?P<name>{anywhere}|^(?:{every})(?=: | must | needs ))(?![\w/(=`-]|\.\w)"
    )
    return found.sub(lambda match: f"--{match[0]}" if match["name"] else match[0], message)


def _library_lines(error: BaseException | None) -> Iterator[str]:
    """Yield the texts that ``error`` can quote from the exceptions of libraries that caused it."""
    while (error := error and (error.__cause__ or error.__context__)) is not None:
        if not isinstance(error, ReinforceError):
            yield from (first_line(error), useful_line(error), str(error))


class _Bounded(reprlib.Repr):
    """``repr`` for values of any size and depth, without the work of a whole one."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = (
            self.maxarray
        ) = 12
        self.maxstring = self.maxother = self.maxlong = MAX_SHOWN_CHARACTERS

    def repr_int(self, x: int, level: int) -> str:
        """Return an integer, or the number of its digits, because Python converts only up to 4,300 digits to text."""
        bits = x.bit_length()
        return repr(x) if bits < MAX_SHOWN_CHARACTERS else f"<a number of {math.ceil(bits * math.log10(2)):,} digits>"


_bounded = _Bounded()


def shown(value: Any, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    """Return ``repr(value)`` for a message, up to ``limit`` characters.

    The values of a file can be huge, nested without end, or small in the file and huge when written out (YAML aliases).
    """
    text = _bounded.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of the message, up to 200 characters, or the name of the type if the message is empty."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:200]


def useful_line(error: BaseException) -> str:
    """Return the line of a library's message that holds the reason.

    A first line that ends with a colon only announces a list, and lines without letters separate parts.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if any(map(str.isalpha, line))]
    if not lines:
        return type(error).__name__
    announced = lines[0].endswith(":") and len(lines) > 1
    text = f"{lines[0]} {'; '.join(lines[1:4])}" if announced else lines[0]
    return text[:400]


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known word closest to ``word``, or an empty string."""
    close = difflib.get_close_matches(word[:MAX_SHOWN_CHARACTERS], list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
