"""Read the options of a reward's name, as in ``rule:length?min=4&max=8``. Values aren't URL-decoded."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any

from reinforcepp.errors import ConfigError, nearest

NONE = "none"


def read_options(record: type, text: str) -> dict[str, Any]:
    """Return the options in ``OPTION=VALUE&OPTION=VALUE`` as arguments of ``record``, a dataclass of texts and numbers.

    A value can contain an ``&``, unless ``WORD=`` follows it. A number whose type includes None can be ``none``.

    Raises:
        ConfigError: If an option isn't found, is given twice or has an invalid value.
    """
    kinds = {field.name: str(field.type) for field in fields(record)}
    given: dict[str, Any] = {}
    for part in re.split(r"&(?=\w+=)", text) if text else ():
        option, equals, value = part.partition("=")
        if not equals or not value:
            raise ConfigError(f"{part!r} isn't an option. Write OPTION=VALUE, and & between options.")
        if option not in kinds:
            raise ConfigError(f"option {option!r} not found, only {', '.join(kinds)}.{nearest(option, kinds)}")
        if option in given:
            raise ConfigError(f"option {option} is given twice. Remove one.")
        given[option] = _value(option, value, kinds[option])
    return given


def _value(option: str, value: str, kind: str) -> Any:
    if "bool" in kind:
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"{option} must be true or false, not {value!r}.")
        return value.lower() == "true"
    if "int" in kind or "float" in kind:
        if "None" in kind and value == NONE:
            return None
        try:
            number = int(value) if "int" in kind else float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{option} must be a {'whole ' if 'int' in kind else ''}number, not {value!r}.")
        return number
    return value
