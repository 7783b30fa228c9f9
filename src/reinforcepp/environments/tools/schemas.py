"""Python functions as tools: where a worker process imports them from, and their schemas for the chat template."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from reinforcepp.errors import ConfigError, first_line
from reinforcepp.rewards.user_code import load_object

TOOL = "tool"
JSON_TYPES = (str, int, float, bool, NoneType, list, tuple, dict, Any)
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

ToolFunction = Callable[..., Any]


@dataclass(frozen=True)
class Tool:
    """A function that the policy can call.

    Attributes:
        name: the function's name, by which the policy calls it.
        source: ``module:function`` or ``FILE.py:function``, from which a worker process imports it.
        schema: how the chat template gets it, by ``transformers.utils.get_json_schema``.
    """

    name: str
    source: str
    schema: Mapping[str, Any]

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The JSON schema of the arguments."""
        parameters: Mapping[str, Any] = self.schema["function"]["parameters"]
        return parameters


def load_tools(tools: Iterable[str | ToolFunction]) -> tuple[Tool, ...]:
    """Return the tools that the functions, or the sources of functions, are.

    Raises:
        ConfigError: a function doesn't exist, can't be imported by another process, has a signature or a docstring without
            what the schema needs, or has the name of another tool.
    """
    loaded: dict[str, Tool] = {}
    for given in tools:
        source = given if isinstance(given, str) else _source(given)
        tool = make_tool(load_object(source, TOOL), source)
        if tool.name in loaded:
            raise ConfigError(
                f"Tool {source}: {loaded[tool.name].source} has the same name, by which the model calls it. Rename one."
            )
        loaded[tool.name] = tool
    return tuple(loaded.values())


def make_tool(function: ToolFunction, source: str) -> Tool:
    """Return ``function`` as a tool.

    Raises:
        ConfigError: its signature or its docstring doesn't have what the schema needs.
    """
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    if not inspect.isfunction(function):
        raise ConfigError(f"Tool {source}: not a function. Give a function.")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in BY_NAME:
            raise ConfigError(
                f"Tool {source}: the parameter {str(parameter).partition(':')[0]!r} has no argument by name. "
                "Name each parameter, because the model gives arguments by name."
            )
    try:
        schema = get_json_schema(function)
        hints = get_type_hints(function)
    except (DocstringParsingException, TypeHintParsingException, NameError, ValueError) as error:
        raise ConfigError(
            f"Tool {source}: {first_line(error).rstrip('.!')}. Give the function a docstring, and each parameter a type hint "
            "and a line in the docstring's section `Args:`."
        ) from error
    for name in schema["function"]["parameters"]["properties"]:
        if not _is_json(hints[name]):
            raise ConfigError(
                f"Tool {source}: the type hint of {name!r} isn't a JSON type. Use str, int, float, bool, None, list, dict, "
                "Literal, or a union of them."
            )
    return Tool(function.__name__, source, schema)


def schemas(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the schemas of ``tools`` for the variable ``tools`` of the chat template."""
    return [dict(tool.schema) for tool in tools]


def _source(function: ToolFunction) -> str:
    """Return ``module:function``.

    Raises:
        ConfigError: another process can't import the function.
    """
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    if module == "__main__" or getattr(sys.modules.get(module), name, None) is not function:
        raise ConfigError(
            f"Tool {name or function!r}: a worker process can't import it. Move the function to the top level of a module, "
            "such as my_tools.py next to the script, and import it from there."
        )
    return f"{module}:{name}"


def _is_json(hint: Any) -> bool:
    if get_origin(hint) is None:
        return hint in JSON_TYPES
    return get_origin(hint) is Literal or all(map(_is_json, get_args(hint)))
