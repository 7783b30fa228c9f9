"""Values of settings as the types of their annotations, whether they come from Python, a file or a flag."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from reinforcepp.errors import ConfigError, nearest, shown

NOT_GIVEN = "none"
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a list of names"}
NUMBERS = "a list of numbers"


@dataclass(frozen=True)
class EmptyIfNone:
    """Marks a list of names for which ``None`` and ``none`` mean no name, as for ``report_to`` in transformers."""


@dataclass(frozen=True)
class Accepted:
    """Values that a setting accepts.

    Attributes:
        kinds: Types of a value: bool, int, float, str, tuple (of texts, or of numbers) and NoneType.
        choices: The only values, if not empty.
        markers: Constraints of the annotation, such as a range.
        numbers: Whether a tuple holds numbers.
    """

    kinds: frozenset[type]
    choices: tuple[Any, ...]
    markers: tuple[Any, ...]
    numbers: bool = False

    def __str__(self) -> str:
        """Return the types in words, for an error message."""
        names = [
            NUMBERS if kind is tuple and self.numbers else word
            for kind, word in WORDS.items()
            if kind in self.kinds and not (kind is int and float in self.kinds)
        ]
        return " or ".join([*names, *(["None"] if NoneType in self.kinds else [])])


@cache
def accepted_values(config_class: type[Any]) -> dict[str, Accepted]:
    """Return the accepted values of every setting of ``config_class``."""
    hints = get_type_hints(config_class, include_extras=True)
    return {setting.name: accepted(hints[setting.name]) for setting in fields_of(config_class)}


def fields_of(config_class: type[Any]) -> tuple[Field[Any], ...]:
    """Return the fields of every setting of ``config_class``, also of those that other parsers don't see."""
    return fields(object.__new__(config_class))


def accepted(hint: Any) -> Accepted:
    """Return the accepted values of a type."""
    parts = list(_parts(hint))
    choices = tuple(choice for part in parts if get_origin(part) is Literal for choice in get_args(part))
    markers = tuple(marker for part in parts for marker in getattr(part, "__metadata__", ()))
    plain = {get_origin(part) or part for part in parts}
    kinds = frozenset(plain & {*WORDS, NoneType} | ({str} if choices else set()))
    return Accepted(kinds, choices, markers, numbers=tuple[float, ...] in parts)


def _parts(hint: Any) -> Sequence[Any]:
    """Return ``hint``, the members of a union, and the types inside ``Annotated``."""
    if hasattr(hint, "__metadata__"):
        return [hint, *_parts(hint.__origin__)]
    if get_origin(hint) in (Union, UnionType):
        return [part for member in get_args(hint) for part in _parts(member)]
    return [hint]


def converted(name: str, value: Any, accepted: Accepted) -> Any:
    """Return ``value`` as a plain Python value of a type in ``accepted``.

    Paths become text, lists become tuples, scalars of NumPy and torch become numbers, and so do texts such as ``"1e-5"``,
    which is how YAML reads that number.

    Raises:
        ConfigError: If the value has another type or isn't one of the choices.
    """
    value = _plain(value)
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, str):
            check_utf8(name, text)
    if EmptyIfNone() in accepted.markers and value in (None, NOT_GIVEN, [NOT_GIVEN], (NOT_GIVEN,)):
        return ()
    if value is None and NoneType in accepted.kinds:
        return None
    if accepted.choices and value not in accepted.choices:
        raise ConfigError(
            f"{name} must be one of {', '.join(accepted.choices)}, not {shown(value)}."
            f"{nearest(str(value), accepted.choices)}"
        )
    if tuple in accepted.kinds:
        names = [_plain(item) for item in value] if isinstance(value, (list, tuple)) else [value]
        if accepted.numbers:
            numbers = [_number(item) for item in names]
            if all(item is not None and math.isfinite(item) for item in numbers):
                return tuple(numbers)
            raise ConfigError(f"{name} must be {accepted}, as in [1, 0.5], not {shown(value)}.")
        if all(isinstance(item, str) for item in names):
            return tuple(names)
        raise ConfigError(f"{name} must be {accepted}, as in ['one', 'two'], not {shown(value)}.")
    for kind in (bool, int, float, str):
        if kind in accepted.kinds and type(value) is kind:
            return value
    number = _number(value) if accepted.kinds & {int, float} and str not in accepted.kinds else None
    if number is None or (float not in accepted.kinds and not number.is_integer()):
        raise ConfigError(f"{name} must be {accepted}, not {shown(value)}.")
    return int(number) if float not in accepted.kinds or isinstance(value, int) else number


def check_utf8(name: str, text: str) -> None:
    """Check that ``text`` can be written as UTF-8, which tokenizers and files of a run require.

    Raises:
        ConfigError: If it comes from bytes in another encoding, or holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{name}: {shown(text)} isn't valid UTF-8. Write it in UTF-8, or rename the file or folder."
        ) from None


def _plain(value: Any) -> Any:
    """Return a path as text, a member of an enumeration as its value, and a scalar of NumPy or torch as a number."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return value


def _number(value: Any) -> float | None:
    """Return the number that ``value`` is or, as text, writes; None if it isn't a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


# --- parsers of transformers and TRL ----------------------------------------------------------------------------------


class _Store(argparse.Action):
    """Stores a value; HfArgumentParser passes the metadata of a field to argparse, but sets the type itself."""

    def __init__(self, *, type: Callable[[str], Any], **named: Any) -> None:
        super().__init__(type=self.converter(type), **named)

    @staticmethod
    def converter(proposed: Callable[[str], Any]) -> Callable[[str], Any]:
        """Return the function that converts a word of the command line."""
        return proposed

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)


class _Names(_Store):
    """Stores words, which HfArgumentParser would split into characters, because it knows lists but not tuples."""

    @staticmethod
    def converter(proposed: Callable[[str], Any]) -> Callable[[str], Any]:
        return str


class _SwitchOrText(_Store):
    """Stores a truth value or a text; HfArgumentParser would accept only a truth value."""

    @staticmethod
    def converter(proposed: Callable[[str], Any]) -> Callable[[str], Any]:
        def convert(word: str) -> Any:
            try:
                return proposed(word)
            except argparse.ArgumentTypeError:
                return word

        return convert


NAMES = {"action": _Names, "nargs": "+"}
"""Metadata of a field that holds a tuple of names."""
SWITCH_OR_TEXT = {"action": _SwitchOrText}
"""Metadata of a field that holds a truth value or a text."""


class FieldsOfParser:
    """The fields of a configuration class, of which parsers don't see ``hidden`` but also ``added``; an instance has its own.

    TRL's parser builds flags from the fields of several classes at once and refuses a name that two of them have.
    """

    def __init__(self, every: dict[str, Any], hidden: Collection[str], added: Mapping[str, Any]) -> None:
        self.every = every
        self._parsed = {name: field for name, field in every.items() if name not in hidden} | dict(added)

    def __get__(self, instance: object | None, owner: type) -> dict[str, Any]:
        """Return the fields by name."""
        return self._parsed if instance is None else self.every
