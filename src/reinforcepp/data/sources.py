"""Where data comes from: a file of the user's, or data that is part of this package."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from reinforcepp.errors import DataError, nearest

_PREFIX = "builtin:"
_BUILTIN = ("builtin:network",)


class DataFiles(NamedTuple):
    """The files behind a data setting; ``heldout`` is None where the held-out part is yet to be split off."""

    train: Path
    heldout: Path | None


def resolve_data(source: str | Path) -> DataFiles:
    """The files that ``source`` stands for: ``builtin:network`` or what ``read_table`` takes, which isn't opened here.

    Raises:
        DataError: There is no built-in data of that name.
    """
    name = str(source)
    if not name.startswith(_PREFIX):
        return DataFiles(Path(source), None)
    if name not in _BUILTIN:
        raise DataError(
            f"There is no built-in data {name!r}, only {', '.join(map(repr, _BUILTIN))}; "
            f"use that or give the path of a file.{nearest(name, _BUILTIN)}"
        )
    from reinforcepp.data.builtin import data_paths

    train, heldout = data_paths()
    return DataFiles(Path(train), Path(heldout))
