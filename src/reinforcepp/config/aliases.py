"""Names of TRL for our settings, and old names: one mechanism for Python, YAML files, flags and attributes.

``trl_names`` holds the table. A rule of the table converts a group of TRL's settings to ours, so that the order in which they
are given doesn't matter.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field, field, make_dataclass
from functools import cache
from types import NoneType
from typing import Any, get_type_hints

from reinforcepp.config.foreign_names import foreign_hint
from reinforcepp.config.trl_conversions import Context
from reinforcepp.config.trl_names import READ_ONLY, RULES, VALUES, Rule
from reinforcepp.config.values import Accepted, FieldsOfParser, accepted, accepted_values, converted
from reinforcepp.errors import ConfigError, nearest
from reinforcepp.run_dir import REMOVED_SETTINGS


@cache
def rules_of(config_class: type) -> tuple[Rule, ...]:
    """Return the rules for settings of ``config_class``."""
    known = accepted_values(config_class).keys()
    return tuple(
        rule
        for rule in RULES
        if known >= set(rule.settings) and all(hasattr(config_class, need) for need in rule.needs)
    )


@cache
def aliases_of(config_class: type) -> dict[str, Rule]:
    """Return the rule of each name that ``config_class`` accepts in addition to its settings."""
    known = accepted_values(config_class)
    return {name: rule for rule in rules_of(config_class) for name in rule.names if name not in known}


@cache
def _types(config_class: type) -> dict[str, Any]:
    """Return the type of the values of each alias."""
    hints = get_type_hints(config_class, include_extras=True)
    return {
        name: hints[rule.settings[0]] if rule.names[name] is None else rule.names[name]
        for name, rule in aliases_of(config_class).items()
    }


def accepted_by_alias(config_class: type) -> dict[str, Accepted]:
    """Return the values that each alias accepts."""
    return {name: accepted(hint) for name, hint in _types(config_class).items()}


# --- from TRL's names to ours -----------------------------------------------------------------------------------------


def translated(config_class: type, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the given settings under our names, and the TRL name of each one that had another name.

    Raises:
        ConfigError: If a setting is given twice, was removed, or its value has no equivalent here.
    """
    known, aliases = accepted_values(config_class), aliases_of(config_class)
    for name, reason in REMOVED_SETTINGS.items():
        if name in given and name not in known:
            raise ConfigError(f"{name}: {reason}")
    ours = {name: value for name, value in given.items() if name not in aliases}
    for name, convert in VALUES.items():
        if name in ours and name in known:
            ours[name] = convert(ours[name])
    if not any(name in aliases for name in given):
        return ours, {}
    if parsed := aliases.keys() <= given.keys():  # HfArgumentParser gives every setting a value
        ours = {name: value for name, value in ours.items() if value != getattr(config_class, name, None)}
    replaced = known.keys() <= ours.keys()
    kinds = accepted_by_alias(config_class)
    theirs = {
        name: converted(name, plain(value), kinds[name])
        for name, value in given.items()
        if name in aliases and (value is not None or (NoneType in kinds[name].kinds and not parsed))
    }
    explicit = frozenset() if replaced else frozenset({*ours, *theirs})
    renamed: dict[str, str] = {}
    trl_batch = False
    for rule in rules_of(config_class):
        mine = {name: theirs[name] for name in rule.names if name in theirs}
        shared = {name: ours[name] for name in rule.shared if name in ours}
        if not mine and not (trl_batch and shared):
            continue
        context = Context(_view(config_class, theirs | ours), explicit, trl_batch, replaced)
        first = next(iter(mine), "")
        for setting, value in rule.convert(shared | mine, context).items():
            if setting in explicit and setting not in rule.shared:
                raise ConfigError(f"{first} and {setting}: both are given, but {rule.mapping}. Remove one.")
            ours[setting] = value
            renamed[setting] = first or setting
        trl_batch = trl_batch or "batch_size" in rule.settings
    return ours, renamed


def plain(value: Any) -> Any:
    """Return a dictionary as JSON, with the names of types such as torch.bfloat16."""
    return json.dumps(value, sort_keys=True, default=str) if isinstance(value, dict) else value


def _view(config_class: type, settings: Mapping[str, Any]) -> Any:
    """Return an unchecked configuration with these settings and defaults; its numbers have the right type."""
    view: Any = object.__new__(config_class)
    known = accepted_values(config_class)
    for name, value in settings.items():
        number = name in known and known[name].kinds & {int, float}
        object.__setattr__(view, name, converted(name, value, known[name]) if number else value)
    return view


def layered(config_class: type, below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return two layers of settings as one; a name ``above`` overrides other names ``below`` for the same settings."""
    aliases = aliases_of(config_class)

    def gives(name: str) -> set[str]:
        return set(aliases[name].settings) if name in aliases else {name}

    def overridden(name: str) -> bool:
        others = [other for other in above if aliases.get(other) is not aliases.get(name) or name not in aliases]
        shared = {shared for other in above if other in aliases for shared in aliases[other].shared}
        return name not in shared and bool(others) and gives(name) <= set().union(*map(gives, others))

    return {name: value for name, value in below.items() if not overridden(name)} | dict(above)


# --- flags ------------------------------------------------------------------------------------------------------------

WORDS_OF_BOOL = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def take_aliases(config_class: type, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments without flags of aliases, and the values of these flags by the name of the alias.

    Raises:
        ConfigError: If a flag has no value.
    """
    kinds, rest, given = accepted_by_alias(config_class), [], {}
    index = 0
    while index < len(arguments):
        flag, equals, value = arguments[index].partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        negated = name.startswith("no_") and name not in kinds
        name = name.removeprefix("no_") if negated else name
        index += 1
        if not flag.startswith("--") or name not in kinds:
            rest.append(arguments[index - 1])
            continue
        words = [value] if equals else []
        while not equals and index < len(arguments) and not arguments[index].startswith("--"):
            words.append(arguments[index])
            index += 1
        if not words and bool not in kinds[name].kinds:
            raise ConfigError(f"{flag}: the value is missing. Write {flag} VALUE.")
        given[name] = False if negated else from_words(words or ["true"], kinds[name])
    return rest, given


def from_words(words: Sequence[str], kinds: Accepted) -> Any:
    """Return the words after a flag as a value; numbers stay text."""
    if tuple in kinds.kinds or len(words) > 1:
        return list(words)
    word = words[0]
    if bool in kinds.kinds and word.lower() in WORDS_OF_BOOL and (str not in kinds.kinds or word.isalpha()):
        return WORDS_OF_BOOL[word.lower()]
    return None if word.lower() in ("none", "null") and not kinds.choices else word


# --- attributes and parsers -------------------------------------------------------------------------------------------


def read_alias(config: Any, name: str) -> Any:
    """Return a setting of ``config`` under TRL's name, as callbacks read it.

    Raises:
        AttributeError: If there is no such setting.
    """
    config_class: type = type(config)
    rule = aliases_of(config_class).get(name)
    if rule is not None and name in rule.reads:
        return rule.reads[name](config)
    if name in READ_ONLY and hasattr(config_class, "TRAINING"):
        return READ_ONLY[name](config)
    raise AttributeError(f"{config_class.__name__!r} object has no attribute {name!r}", name=name, obj=config)


PARSER_FIELDS: set[Field[Any]] = set()
"""Fields that exist only for argument parsers."""
SWITCH = {"nargs": "?", "const": True}
"""Metadata of a field that holds a truth value: the flag alone turns it on."""


def share_flags(config_class: Any, *, hidden: Collection[str]) -> None:
    """Make HfArgumentParser and TrlParser accept every alias of ``config_class``, but not the ``hidden`` settings."""
    added = _parser_fields(config_class)
    PARSER_FIELDS.update(added.values())
    config_class.__dataclass_fields__ = FieldsOfParser(config_class.__dataclass_fields__, hidden, added)


def _parser_fields(config_class: type) -> dict[str, Field[Any]]:
    """Return a field for each alias, and add its type to the class."""
    fields = {setting.name: setting for setting in dataclasses.fields(config_class)}
    metadata = {
        name: fields[rule.settings[0]].metadata
        if rule.names[name] is None
        else SWITCH
        if rule.names[name] is bool
        else None
        for name, rule in aliases_of(config_class).items()
    }
    # HfArgumentParser accepts None in every type but the union of a truth value and a text.
    hints = {name: hint if hint == bool | str else hint | None for name, hint in _types(config_class).items()}
    config_class.__annotations__.update(hints)
    made = make_dataclass(
        "Aliases", [(name, hint, field(default=None, metadata=metadata[name])) for name, hint in hints.items()]
    )
    return {made_field.name: made_field for made_field in dataclasses.fields(made)}


def names_of(config_class: type) -> list[str]:
    """Return the settings of ``config_class`` and the aliases that give one."""
    aliases = (name for name, rule in aliases_of(config_class).items() if rule.settings)
    return [*accepted_values(config_class), *aliases]


def hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a sentence about an unknown setting: its counterpart, if it is TRL's, OpenRLHF's or verl's, or the nearest."""
    if text := foreign_hint(name):
        return text
    rule = next((rule for rule in RULES if name in rule.names), None)
    if rule is not None and not set(rule.settings) <= set(known):
        return " Other commands have this setting."
    if rule is not None:
        return f" It is a setting of other trainings: {rule.mapping.removesuffix('.')}."
    return nearest(prefix + name, [prefix + other for other in known])
