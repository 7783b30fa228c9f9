"""Configurations from and to plain values."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

from reinforcepp.config.aliases import aliases_of, hint, names_of, translated
from reinforcepp.config.base import JsonObject
from reinforcepp.config.values import Accepted, EmptyIfNone, accepted_values, converted
from reinforcepp.errors import ConfigError
from reinforcepp.redaction import without_secrets


def read_yaml(path: str, config_class: type) -> dict[str, Any]:
    """Return the settings in a YAML file, each a field of ``config_class`` or an alias of one.

    Raises:
        ConfigError: If the file is missing, isn't a mapping, or has an unknown key (the nearest is suggested) or a key
            without a single plain value.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"Configuration file {path} not found. Check the path after --config.") from None
    except OSError as error:
        raise ConfigError(
            f"Configuration file {path} can't be read ({error.strerror}). Give a YAML file that you can read."
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}). Correct the file.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} isn't a mapping of settings. Write one 'name: value' per line.")
    try:
        translated(config_class, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    accepted, aliases = accepted_values(config_class), aliases_of(config_class)
    for key, value in values.items():
        if key in aliases:
            continue
        if key not in accepted:
            raise ConfigError(f"{path}: setting {key!r} not found.{hint(str(key), names_of(config_class))}")
        values[key] = _yaml_value(f"{path}: {key}", value, getattr(config_class, key), accepted[key])
    return values


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
            raise ConfigError(f"{where} must be {accepted}, as in {example}, not {value!r}.")
        return items
    if isinstance(value, dict) and JsonObject() in accepted.markers:
        return json.dumps(value, sort_keys=True)
    if value is not None and not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where} must be a single value, not {value!r}.")
    if isinstance(value, bool) != (bool in accepted.kinds) and not (isinstance(value, str) and str in accepted.kinds):
        kind = (
            "true or false"
            if bool in accepted.kinds
            else str(accepted)
            if str not in accepted.kinds
            else "a number or text"
        )
        raise ConfigError(f"{where} must be {kind}, not {value!r}.")
    return value if str in accepted.kinds or accepted.choices else converted(where, value, accepted)


def as_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as plain values, for files and for display: secrets in them are replaced by ``***``."""
    settings: dict[str, Any] = without_secrets(asdict(config))
    return settings
