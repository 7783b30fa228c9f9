"""The base of all configurations: annotated types, the one checker that reads them, and old names of settings."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from reinforcepp.config.aliases import PARSER_FIELDS, hint, names_of, read_alias, translated
from reinforcepp.config.data_spec import listed
from reinforcepp.config.values import accepted_values, converted
from reinforcepp.errors import ConfigError, shown
from reinforcepp.runtime.redaction import without_secrets

MAX_SEED = 2**32 - 1  # the most that the random generators of all libraries accept
LAST_PORT = 65535

# --- annotated types --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Bounds of a number. ``above`` and ``below`` exclude the bound; ``at_least`` and ``at_most`` include it."""

    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.above < value < self.below and self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        """Return the bounds in words, for an error message."""
        bounds = {
            "greater than": self.above,
            "at least": self.at_least,
            "at most": self.at_most,
            "less than": self.below,
        }
        return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound))


@dataclass(frozen=True)
class Text:
    """A text that must not be empty."""


@dataclass(frozen=True)
class JsonObject(Text):
    """A JSON object as text; a dictionary, also from a YAML file, is converted."""


@dataclass(frozen=True)
class Name(Text):
    """A name or path that must not be empty; a path below a user's home folder needs that user."""


@dataclass(frozen=True)
class Count:
    """A number of which a fraction is possible; a whole number is stored as int, so that 3 epochs aren't shown as 3.0."""


PositiveInt = Annotated[int, Range(above=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
StepInterval = Annotated[int, Range(at_least=-1)]  # -1: once per epoch
NonNegativeFloat = Annotated[float, Range(at_least=0)]
PositiveCount = Annotated[float, Range(above=0), Count()]
NonNegativeCount = Annotated[float, Range(at_least=0), Count()]
Probability = Annotated[float, Range(above=0, at_most=1)]
MinP = Annotated[float, Range(at_least=0, at_most=1)]
Share = Annotated[float, Range(at_least=0, below=1)]
Seed = Annotated[int, Range(at_least=0, at_most=MAX_SEED)]
FilledStr = Annotated[str, Name()]
FilledText = Annotated[str, Text()]
JsonText = Annotated[str, JsonObject()]

# --- the checker ------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Check every setting of ``config`` against its annotation, and store it as a value of that type.

    Raises:
        ConfigError: If a value has another type, a choice doesn't exist, a number isn't finite or out of range, or a name is
            empty.
    """
    for name, accepted in accepted_values(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, dict) and JsonObject() in accepted.markers:
            value = json_text(name, value)
        value = converted(name, value, accepted)
        if Count() in accepted.markers and isinstance(value, float) and value.is_integer():
            value = int(value)
        object.__setattr__(config, name, value)
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, not {value}.")
        for constraint in accepted.markers:
            if isinstance(constraint, Range) and value not in constraint:
                raise ConfigError(f"{name} must be {constraint}, not {value}.")
            if isinstance(constraint, Text):
                check_filled(name, value)
            if isinstance(constraint, Name):
                check_name(name, value)


def check_filled(setting: str, value: str) -> None:
    """Check that ``value`` isn't empty."""
    if not value.strip():
        raise ConfigError(f"{setting} is empty. Omit it for its default, or give a value.")


def json_text(setting: str, values: dict[str, Any]) -> str:
    """Return ``values`` as JSON.

    Raises:
        ConfigError: JSON can't hold one of them.
    """
    try:
        return json.dumps(values, sort_keys=True)
    except TypeError as error:
        raise ConfigError(f"{setting}: {error}. Give numbers, texts, lists and dictionaries.") from None


def json_object(setting: str, text: str | None, example: str) -> dict[str, Any]:
    """Return the JSON object in ``text``, whose keys are names; empty for None.

    Raises:
        ConfigError: ``text`` isn't such an object.
    """
    try:
        values = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not all(map(str.isidentifier, values)):
        raise ConfigError(f"{setting}: {shown(text)} isn't a JSON object of variables. Write it like {example}.")
    return values


def check_name(setting: str, value: str) -> None:
    """Check that ``value`` isn't empty and that the user exists whose home folder it begins with."""
    check_filled(setting, value)
    if value.startswith("~") and os.path.expanduser(value) == value:
        raise ConfigError(
            f"{setting}: {value} begins with the home folder {value.partition('/')[0]}, which doesn't exist. Write the "
            "whole path, or ./ before a name that begins with ~."
        )


def check_not_below_output(output_dir: str, setting: str, value: str) -> None:
    """Check that ``value``, an input of a run, isn't in the folder that the run writes and ``overwrite`` clears."""
    output = Path(output_dir).expanduser().resolve()
    sources = [path.expanduser().resolve() for path in listed(value) or [Path(value)]]
    if any(output in (source, *source.parents) for source in sources):
        raise ConfigError(
            f"output_dir: {output_dir} holds the {setting} {value}, an input of the run. Give another output_dir."
        )


def check_output_dir(output_dir: str, overwrite: bool, resume: bool | str = False) -> None:
    """Check the settings for the folder that a command writes."""
    check_name("output_dir", output_dir)
    if overwrite and resume:
        raise ConfigError("overwrite and resume contradict each other. Give one of the two.")


# --- the base class ---------------------------------------------------------------------------------------------------


class _AcceptsAliases(type):
    """Classes whose keyword arguments can have the names of TRL, and old names.

    ``dataclass`` writes ``__init__`` after the class exists, so the call of the class is where every subclass can be
    reached without a decorator of its own.
    """

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        ours, renamed = translated(cls, settings)
        for name in ours.keys() - accepted_values(cls).keys():
            raise ConfigError(f"{cls.__name__}: setting {name!r} not found.{hint(name, names_of(cls))}")
        try:
            return super().__call__(*args, **ours)
        except ConfigError as error:
            raise ConfigError(f"{error}{_given_as(renamed, str(error))}") from None

    def __setattr__(cls, name: str, value: Any) -> None:
        """Take the place of three attributes that ``dataclass`` sets.

        A subclass doesn't inherit the fields that exist only for parsers, the error after an assignment names the fix, and
        printed settings show no secret.
        """
        if name == "__dataclass_fields__" and isinstance(value, dict):
            for setting in [setting for setting in value.values() if setting in PARSER_FIELDS]:
                del value[setting.name]
        instead = {"__setattr__": _refuse_assignment, "__repr__": _repr_without_secrets}
        super().__setattr__(name, instead.get(name, value))


def _given_as(renamed: Mapping[str, str], message: str) -> str:
    """Return a sentence with the names that the user gave for the settings in an error message."""
    words = set(re.findall(r"\w+", message))
    named = [f"{name} is {setting} here" for setting, name in renamed.items() if setting in words and name not in words]
    return f" ({'; '.join(named)}.)" if named else ""


def _refuse_assignment(config: Any, name: str, value: Any) -> None:
    raise dataclasses.FrozenInstanceError(
        f"{name}: settings can't be changed after they are checked. Write args = dataclasses.replace(args, {name}={value!r})."
    )


def _repr_without_secrets(config: Any) -> str:
    values = without_secrets(dataclasses.asdict(config))
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


class Config(metaclass=_AcceptsAliases):
    """Base of all configurations: checks itself, and accepts settings under their names in TRL and their old names."""

    def __post_init__(self) -> None:
        """Check every setting, then the rules of every class about settings that belong together, base classes first."""
        check(self)
        for part in reversed(type(self).__mro__):
            if (rules := vars(part).get("_check_rules")) is not None:
                rules(self)

    if not TYPE_CHECKING:  # A type checker would take every unknown name for an attribute.

        def __getattr__(self, name: str) -> Any:
            """Return a setting under its name in TRL or its old name."""
            return read_alias(self, name)
