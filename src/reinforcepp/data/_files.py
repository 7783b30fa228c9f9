"""From what a data setting says to the files it means, and from a file's name to its reader."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

from reinforcepp.data._csv import read_csv
from reinforcepp.data._json import read_json, read_json_lines
from reinforcepp.data._parquet import read_arrow, read_parquet
from reinforcepp.data._text import Records
from reinforcepp.errors import DataError, nearest
from reinforcepp.files import listed, sha256

READERS: Mapping[str, Callable[[Path], Iterator[Records]]] = {
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
KINDS = "CSV, TSV, JSON, JSONL and Parquet files"
# Written beside data by `datasets`: what it is, not what it holds.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json")


def files_of(source: str | Path) -> list[Path]:
    """The files behind ``source``: one, several with commas between them, patterns, and folders of such files.

    Raises:
        DataError: One of them isn't there, can't be read, or doesn't say which files of a folder are meant.
    """
    files: list[Path] = []
    for path in listed(source):
        try:
            files += _in_folder(path) if path.is_dir() else [path]
        except OSError as error:
            raise _unreadable(path, error) from error
    repeated = [path for path, number in Counter(files).items() if number > 1]
    if repeated:
        raise DataError(f"{source}: the file {str(repeated[0])!r} is named twice; name it once.")
    if not files:
        raise DataError(f"{str(source)!r} names no data file; give the path of one.")
    return files


def read_file(path: Path) -> tuple[str, Records]:
    """The hash of a file's bytes, and what they mean to the reader that its name asks for.

    Raises:
        DataError: The file can't be read, or isn't well-formed.
    """
    pieces = list(file_pieces(path))
    first = pieces[0]
    names = tuple(dict.fromkeys(chain.from_iterable(piece.names for piece in pieces)))
    rows = list(chain.from_iterable(piece.rows for piece in pieces))
    return sha256(path), Records(names, rows, first.header_row, first.separators)


def file_pieces(path: Path) -> Iterator[Records]:
    """What a file holds, some of its rows at a time and at least one piece; errors are those of :func:`read_file`."""
    try:
        _check_there(path)
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_there(path: Path) -> None:
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {str(path.parent)!r}; check the path.")
    if not path.exists():
        if any(mark in path.name for mark in "*?["):
            raise DataError(f"{path}: no file has such a name; check the pattern.")
        hint = nearest(path.name, (each.name for each in path.parent.iterdir() if each.is_file()))
        raise DataError(f"{path}: there is no such file; check the path.{hint}")
    if path.suffix.lower() not in READERS:
        kind = f"{path.suffix} files can't be read" if path.suffix else "a file without an extension isn't read"
        raise DataError(f"{path}: {kind}, only {KINDS}; convert it to one of these, such as .jsonl.")


def _in_folder(folder: Path) -> list[Path]:
    """The data files of a folder that ``datasets`` saved, or of any other that holds files of one format."""
    if (folder / "state.json").is_file():
        return _saved_by_datasets(folder)
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(each.parent.name for each in folder.glob("*/state.json"))
        raise DataError(f"{folder} holds several data sets, {', '.join(parts)}; give the folder of one of them.")
    found = sorted(
        each
        for each in folder.iterdir()
        if each.suffix.lower() in READERS and each.name not in _ABOUT and each.is_file()
    )
    kinds = sorted({each.suffix.lower() for each in found})
    if not found:
        raise DataError(f"{folder} is a folder without data in it; give a file, or a folder that holds {KINDS}.")
    if len(kinds) > 1:
        raise DataError(
            f"{folder} holds files of several formats ({', '.join(kinds)}), so it doesn't say which are meant; "
            f"name them, such as {str(folder / f'*{kinds[0]}')!r}."
        )
    return found


def _saved_by_datasets(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(each["filename"]) for each in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder / 'state.json'} doesn't list the data set's files as `save_to_disk` does; save it again."
        ) from error
    if not names or any(Path(name).name != name or not name.endswith(".arrow") for name in names):
        raise DataError(f"{folder / 'state.json'} names no Arrow files of this folder; save the data set again.")
    return [folder / name for name in names]


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: {error.strerror or error}; check the path and its permissions.")
