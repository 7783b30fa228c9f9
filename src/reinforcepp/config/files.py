"""Configurations from and to plain values."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import NoneType
from typing import Any

from reinforcepp.config.aliases import accepted_by_alias, aliases_of, hint, names_of, translated
from reinforcepp.config.base import JsonObject
from reinforcepp.config.values import Accepted, EmptyIfNone, accepted_values, converted
from reinforcepp.errors import ConfigError, shown
from reinforcepp.runtime.redaction import without_secrets

MAX_FILE_BYTES = 1 << 20
MAX_YAML_VALUES = 100_000
MAX_YAML_NUMBER_CHARACTERS = 1000
FALSE_WORDS = frozenset({"no", "off"})
"""Choices that YAML reads as False without quotes."""


def read_yaml(path: str, config_class: type) -> dict[str, Any]:
    """Return the settings in a YAML file, each a field of ``config_class`` or an alias of one.

    Raises:
        ConfigError: If the file is missing, isn't a mapping, or has an unknown key (the nearest is suggested) or a key
            without a single plain value.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)  # A device such as /dev/zero has no end.
        values = parse_yaml(text.decode())
    except FileNotFoundError:
        raise ConfigError(f"Configuration file {path} not found. Check the path after --config.") from None
    except OSError as error:
        raise ConfigError(
            f"Configuration file {path} can't be read ({error.strerror}). Give a YAML file that you can read."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}). Correct the file.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} isn't a mapping of settings. Write one 'name: value' per line.")
    accepted, aliases = accepted_values(config_class), aliases_of(config_class)
    for key, kinds in (accepted | accepted_by_alias(config_class)).items():
        if values.get(key) is False and (words := FALSE_WORDS.intersection(kinds.choices)):
            (values[key],) = words
    try:
        translated(config_class, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for key, value in values.items():
        if key in aliases:
            continue
        if key not in accepted:
            raise ConfigError(f"{path}: setting {shown(key)} not found.{hint(str(key), names_of(config_class))}")
        values[key] = _yaml_value(f"{path}: {key}", value, getattr(config_class, key), accepted[key])
    return values


def parse_yaml(text: str) -> Any:
    """Return the value that a YAML document writes.

    Raises:
        ValueError: If it isn't valid YAML, or so small a text stands for too large a value.
    """
    import yaml

    if len(text) > MAX_FILE_BYTES:
        raise ValueError(f"longer than {MAX_FILE_BYTES >> 20} MiB")
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise ValueError(str(error)) from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("lists or mappings are nested too deeply") from error
    except OverflowError as error:
        raise ValueError(str(error)) from error
    finally:
        loader.dispose()


def _count_values(node: Any, counts: dict[int, int]) -> int:
    """Return the number of values that a node stands for, with every alias written out."""
    from yaml import ScalarNode

    if id(node) in counts:
        if not counts[id(node)]:
            raise ValueError("an alias (*name) stands for a value that contains the alias")
        return counts[id(node)]
    counts[id(node)] = 0
    if isinstance(node, ScalarNode):
        children = []
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_YAML_NUMBER_CHARACTERS:
            raise ValueError(f"a number of {len(node.value):,} characters")
    else:
        children = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    if counts[id(node)] > MAX_YAML_VALUES:
        raise ValueError(f"aliases (*name) make it more than {MAX_YAML_VALUES:,} values")
    return counts[id(node)]


def _yaml_value(where: str, value: Any, default: Any, accepted: Accepted) -> Any:
    """Return a value from YAML as the value of a flag."""
    if value is None and default is not None:
        if EmptyIfNone() in accepted.markers:
            return []
        if NoneType in accepted.kinds:
            return str(None)
        raise ConfigError(f"{where} has no value. Give one, or remove the line for the default.")
    if tuple in accepted.kinds:
        kinds = (str, int, float) if accepted.numbers else str
        items = [value] if isinstance(value, kinds) else value
        if not isinstance(items, list) or not all(isinstance(item, kinds) for item in items):
            example = "[1, 0.5]" if accepted.numbers else "[one, two]"
            raise ConfigError(f"{where} must be {accepted}, as in {example}, not {shown(value)}.")
        return items
    if isinstance(value, dict) and JsonObject() in accepted.markers:
        return json.dumps(value, sort_keys=True)
    if value is not None and not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where} must be a single value, not {shown(value)}.")
    if isinstance(value, bool) != (bool in accepted.kinds) and not (isinstance(value, str) and str in accepted.kinds):
        kind = (
            "true or false"
            if bool in accepted.kinds
            else f"one of {', '.join(accepted.choices)}"
            if accepted.choices
            else str(accepted)
            if str not in accepted.kinds
            else "a number or text"
        )
        raise ConfigError(f"{where} must be {kind}, not {shown(value)}.")
    return value if str in accepted.kinds or accepted.choices else converted(where, value, accepted)


def as_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as plain values, for files and for display: secrets in them are replaced by ``***``."""
    settings: dict[str, Any] = without_secrets(asdict(config))
    return settings
