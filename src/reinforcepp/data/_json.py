"""JSON: one object a line (a row's number is its line), or a list of objects (a row's number is its place, from 1).

Read more strictly than Python does: NaN and Infinity, which are no JSON, a key that occurs twice in an object, a number
too large to hold and half a surrogate pair would all come out as something else than the file says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from reinforcepp.data._text import Reading, Records, decode, in_pieces, text_pieces
from reinforcepp.errors import DataError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\n\r]*")
_SAVE_AS = "write it again as UTF-8"
_ONE_A_LINE = 'each line must be one whole JSON object, such as {"prompt": "..."}'


class _Fault(ValueError):
    """What is wrong with a value, in words."""


def read_json_lines(path: Path) -> Iterator[Records]:
    """One object a line; blank lines are passed over.

    Raises:
        DataError: A line isn't valid JSON or no object, or there is none.
    """
    reading = Reading()
    return _records(path, _lines(path, reading), reading)


def read_json(path: Path) -> Iterator[Records]:
    """A list of objects; a file that has one object a line instead, as many with this name do, is read as that.

    A list is read whole before its first element is given.

    Raises:
        DataError: The file isn't valid JSON or holds something else.
    """
    _, start = next(text_pieces(path, Reading(), save_as=_SAVE_AS))
    if not start.lstrip().startswith("["):
        return read_json_lines(path)
    text = decode(path, path.read_bytes(), save_as=_SAVE_AS)
    rows = ((number, _object(value, f"{path}, row {number}")) for number, value in _elements(path, text))
    return _records(path, rows, Reading())


def _lines(path: Path, reading: Reading) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for first, text in text_pieces(path, reading, save_as=_SAVE_AS):
        for number, line in enumerate(text.split("\n"), first):
            if line.strip():
                where = f"{path}, row {number}"
                value, end = _value(line, _after_space(line, 0), where, f"; {_ONE_A_LINE}.")
                if (end := _after_space(line, end)) < len(line):
                    raise DataError(f"{where}, character {end + 1}: text follows the end of the value; {_ONE_A_LINE}.")
                yield number, _object(value, where)


def _elements(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Each element of a list by itself, so that what is wrong with it can be told with its number."""
    place = _after_space(text, text.index("[") + 1)
    number = 1
    while text[place : place + 1] != "]":
        where = f"{path}, row {number}"
        value, end = _value(text, place, where, "; the file must be one list of objects.")
        yield number, value
        place = _after_space(text, end)
        mark = text[place : place + 1]
        if mark not in (",", "]"):
            raise _invalid(where, text, place, "a comma or the end of the list is missing", "; put it there.")
        place = _after_space(text, place + (mark == ","))
        number += 1
        if mark == "," and text[place : place + 1] == "]":
            raise _invalid(where, text, place, "a comma before the end of the list", "; remove it.")
    if (place := _after_space(text, place + 1)) < len(text):
        raise _invalid(f"{path}", text, place, "text after the end of the list", "; remove it.")


def _value(text: str, place: int, where: str, cure: str) -> tuple[Any, int]:
    """The value that begins at ``place``, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, place)
        if _SURROGATE.search(text, place, end):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        message = error.msg[0].lower() + error.msg[1:]
        raise _invalid(where, text, error.pos, message, cure) from error
    except _Fault as error:
        raise DataError(f"{where}: {error}.") from error
    except RecursionError as error:
        raise DataError(f"{where}: lists or objects are nested too deeply to be read; flatten them.") from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: there is half of a surrogate pair (\\ud800 to \\udfff), which is no character; remove it."
        ) from error
    return value, end


def _invalid(where: str, text: str, place: int, message: str, cure: str) -> DataError:
    """Line and character, as an editor counts, are told for a list; of a row that is a line, the character is enough."""
    line, start = text.count("\n", 0, place) + 1, text.rfind("\n", 0, place) + 1
    at = f"line {line}, character {place - start + 1}" if "\n" in text else f"character {place + 1}"
    return DataError(f"{where}, {at}: this isn't valid JSON ({message}){cure}")


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        more = " (a file that is one list as a whole ends in .json)" if kind == "a list" else ""
        raise DataError(f'{where}: there is {kind} where an object is expected, such as {{"prompt": "..."}}{more}.')
    return value


def _records(path: Path, rows: Iterator[tuple[int, Mapping[str, Any]]], reading: Reading) -> Iterator[Records]:
    empty = True
    for piece in in_pieces(rows):
        names = dict.fromkeys(name for _, cells in piece for name in cells)
        yield Records(tuple(names), piece, share=reading.share)
        empty = False
    if empty:
        raise DataError(f"{path}: the file is empty; put at least one object with a prompt into it.")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Fault(f"the key {twice[:40]!r} occurs twice in one object; rename or remove one of them")
    return found


def _constant(name: str) -> NoReturn:
    raise _Fault(f"{name} is no JSON value; write null or leave the key out")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Fault(f"the number {text[:20]} is too large; write it as text, in double quotes")
    return number


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python's limit of 4,300 digits
        raise _Fault(f"a number of {len(text):,} digits is too large; write it as text, in double quotes") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float, parse_int=_int)
