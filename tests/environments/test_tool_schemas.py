"""Tools: which functions can be one, their schemas, and the check of arguments."""

from __future__ import annotations

from typing import Literal

import pytest
from transformers.utils import get_json_schema

from reinforcepp.environments import examples
from reinforcepp.environments.tools.arguments import argument_error
from reinforcepp.environments.tools.schemas import load_tools, make_tool
from reinforcepp.errors import ConfigError

EXAMPLES = "reinforcepp.environments.examples"


def book(
    name: str,
    seats: int,
    price: float = 1.5,
    kind: Literal["window", "aisle"] = "aisle",
    tags: list[str] | None = None,
    extra: dict[str, int | bool] | None = None,
    position: tuple[int, str] | None = None,
):
    """Book seats.

    Args:
        name: Who travels.
        seats: Number of seats.
        price: Highest price.
        kind: Where.
        tags: Notes.
        extra: Numbers.
        position: Row and letter.
    """


# --- loading ----------------------------------------------------------------------------------------------------------


def test_schemas_are_those_of_transformers():
    calculator, search = load_tools([examples.calculator, f"{EXAMPLES}:search_notes"])
    assert calculator.schema == get_json_schema(examples.calculator)
    assert search.schema == get_json_schema(examples.search_notes)
    assert (calculator.name, calculator.source) == ("calculator", f"{EXAMPLES}:calculator")


def test_a_function_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('def double(x: int) -> int:\n    """Double it.\n\n    Args:\n        x: A number.\n    """\n')
    (tool,) = load_tools([f"{file}:double"])
    assert (tool.name, tool.parameters["required"]) == ("double", ["x"])


def no_docstring(x: int): ...


def no_hint(x):
    """Double.

    Args:
        x: A number.
    """


def no_description(x: int):
    """Double."""


def any_number(*numbers: int):
    """Add.

    Args:
        numbers: Numbers.
    """


def by_position(x: int, /):
    """Double.

    Args:
        x: A number.
    """


def custom_type(x: Exception):
    """Double.

    Args:
        x: A number.
    """


def nested_custom_type(x: list[bytes] | None):
    """Double.

    Args:
        x: A number.
    """


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (no_docstring, "no docstring"),
        (no_hint, "missing a type hint"),
        (no_description, "no description for the argument 'x'"),
        (any_number, "'*numbers' has no argument by name"),
        (by_position, "'x' has no argument by name"),
        (custom_type, "type hint of 'x' isn't a JSON type"),
        (nested_custom_type, "type hint of 'x' isn't a JSON type"),
        (examples.Corpus, "not a function"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused(function, problem):
    with pytest.raises(ConfigError, match=r"^Tool my:function: ") as error:
        make_tool(function, "my:function")
    assert problem in str(error.value)


def test_two_tools_of_one_name_are_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('def calculator(x: int) -> int:\n    """Double it.\n\n    Args:\n        x: A number.\n    """\n')
    with pytest.raises(ConfigError, match=r"examples:calculator has the same name.*Rename one\.$"):
        load_tools([examples.calculator, f"{file}:calculator"])


def test_a_function_that_another_process_cannot_import_is_refused():
    def local(x: int):
        """Double."""

    main = type(local)(local.__code__, {})
    main.__module__ = "__main__"
    for function in (local, lambda x: x, main, examples.Corpus(["a"]).search):
        with pytest.raises(ConfigError, match=r"a worker process can't import it\. Move the function to the top level"):
            load_tools([function])


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (f"{EXAMPLES}:calculater", "has no tool 'calculater'. Did you mean 'calculator'"),
        ("no_such_module:f", "Python module not found"),
        ("calculator", "give it as module:name"),
    ],
)
def test_a_missing_function_is_refused(source, problem):
    with pytest.raises(ConfigError, match=problem):
        load_tools([source])


# --- arguments --------------------------------------------------------------------------------------------------------

PARAMETERS = make_tool(book, "my:book").parameters


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "Ada", "seats": 2},
        {"name": "", "seats": 0, "price": 3, "kind": "window", "tags": ["a"], "extra": {"a": 1, "b": True}},
        {"name": "Ada", "seats": 2, "tags": None, "extra": None, "position": [3, "A"]},
    ],
)
def test_arguments_that_fit(arguments):
    assert argument_error(PARAMETERS, arguments) == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (None, "the arguments must be a JSON object, not None"),
        (["Ada", 2], "the arguments must be a JSON object"),
        ({"name": "Ada"}, "the argument 'seats' is missing"),
        ({"name": "Ada", "seats": 2, "seat": 1}, "unknown argument 'seat'; the arguments are name, seats"),
        ({"name": 1, "seats": 2}, """the argument 'name' must be {"type": "string"}, not 1"""),
        ({"name": None, "seats": 2}, "the argument 'name'"),
        ({"name": "Ada", "seats": "2"}, "the argument 'seats'"),
        ({"name": "Ada", "seats": 2.5}, "the argument 'seats'"),
        ({"name": "Ada", "seats": True}, "the argument 'seats'"),
        ({"name": "Ada", "seats": 2, "price": "1"}, "the argument 'price'"),
        ({"name": "Ada", "seats": 2, "kind": "door"}, "the argument 'kind'"),
        ({"name": "Ada", "seats": 2, "tags": "a"}, "the argument 'tags'"),
        ({"name": "Ada", "seats": 2, "tags": [1]}, "the argument 'tags'"),
        ({"name": "Ada", "seats": 2, "extra": {"a": "1"}}, "the argument 'extra'"),
        ({"name": "Ada", "seats": 2, "position": [3]}, "the argument 'position'"),
        ({"name": "Ada", "seats": 2, "position": ["A", 3]}, "the argument 'position'"),
    ],
)
def test_arguments_that_do_not_fit(arguments, problem):
    assert problem in argument_error(PARAMETERS, arguments)
