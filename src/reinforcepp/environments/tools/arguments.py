"""Check the arguments of a call by the tool's schema, in the dialect of transformers: ``nullable`` allows null.

That dialect isn't JSON Schema, whose validators ignore ``nullable``, and the messages here are for the policy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import NoneType
from typing import Any

from reinforcepp.errors import shown

TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": NoneType,
    "array": list,
    "object": dict,
}


def argument_error(parameters: Mapping[str, Any], arguments: Any) -> str:
    """Return why a tool with these ``parameters`` can't be called with ``arguments``, or an empty text."""
    if not isinstance(arguments, Mapping):
        return f"the arguments must be a JSON object, not {shown(arguments)}"
    properties = parameters["properties"]
    for name in arguments:
        if name not in properties:
            return f"unknown argument {shown(name)}; the arguments are {', '.join(properties) or 'none'}"
    for name in parameters.get("required", ()):
        if name not in arguments:
            return f"the argument {name!r} is missing"
    for name, value in arguments.items():
        if not _fits(properties[name], value):
            schema = {key: part for key, part in properties[name].items() if key != "description"}
            return f"the argument {name!r} must be {json.dumps(schema, ensure_ascii=False)}, not {shown(value)}"
    return ""


def _fits(schema: Mapping[str, Any], value: Any) -> bool:
    if value is None and schema.get("nullable"):
        return True
    if "anyOf" in schema:
        return any(_fits(option, value) for option in schema["anyOf"])
    if "enum" in schema and not any(value == option and type(value) is type(option) for option in schema["enum"]):
        return False
    types = schema.get("type", ())
    if types and not any(_has_type(name, value) for name in ([types] if isinstance(types, str) else types)):
        return False
    if isinstance(value, list):
        first = schema.get("prefixItems")
        if first is not None:
            return len(value) == len(first) and all(map(_fits, first, value))
        return all(_fits(schema.get("items", {}), item) for item in value)
    if isinstance(value, dict):
        return all(_fits(schema.get("additionalProperties", {}), item) for item in value.values())
    return True


def _has_type(name: str, value: Any) -> bool:
    return isinstance(value, TYPES[name]) and (name == "boolean") == isinstance(value, bool)
