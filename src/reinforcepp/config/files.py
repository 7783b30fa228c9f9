"""Configurations from and to plain values."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from reinforcepp.errors import ConfigError, nearest
from reinforcepp.run_dir import rename_settings


def read_yaml(path: str, config_class: type) -> dict[str, Any]:
    """Return the settings in a YAML file, each a field of ``config_class``.

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
    known = {field.name: field for field in fields(config_class)}
    try:
        values = rename_settings(values, known)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{path}: setting {key!r} not found.{nearest(str(key), known)}")
        if not (isinstance(value, str) and known[key].type == "bool | str"):
            _check_yaml_value(f"{path}: {key}", value, known[key].default)
    return values


def _check_yaml_value(where: str, value: Any, default: Any) -> None:
    if value is None and default is not None:
        raise ConfigError(f"{where} has no value. Give one, or remove the line for the default.")
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{where} must be a list of names, as in [one, two], not {value!r}.")
        return
    if value is not None and not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where} must be a single value, not {value!r}.")
    if isinstance(default, bool) != isinstance(value, bool):
        kind = "true or false" if isinstance(default, bool) else "a number or text"
        raise ConfigError(f"{where} must be {kind}, not {value!r}.")


def as_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as plain values, for JSON and for display."""
    return asdict(config)
