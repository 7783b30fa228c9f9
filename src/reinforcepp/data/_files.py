"""From what a data setting says to the files and data sets it means, and from a file's name to its reader."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from reinforcepp.config.data_spec import DataName, data_names
from reinforcepp.data._csv import read_csv
from reinforcepp.data._hub import dataset_digest, fetch, hub_pieces
from reinforcepp.data._json import read_json, read_json_lines
from reinforcepp.data._parquet import read_arrow, read_parquet
from reinforcepp.data._text import Records
from reinforcepp.errors import DataError, nearest
from reinforcepp.files import sha256

if TYPE_CHECKING:
    from datasets import Dataset

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


@dataclass(frozen=True)
class Part:
    """One file or data set among those that a setting names; ``path`` is what messages call it."""

    path: Path
    weight: float = 1.0
    dataset: Dataset | None = None
    """Of the hub."""

    def pieces(self) -> Iterator[Records]:
        """Some of its rows at a time, and at least one piece.

        Raises:
            DataError: It can't be read, or isn't well-formed.
        """
        if self.dataset is not None:
            yield from hub_pieces(self.path, self.dataset)
            return
        try:
            _check_there(self.path)
            yield from READERS[self.path.suffix.lower()](self.path)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def records(self) -> Records:
        """All of its rows; errors are those of :meth:`pieces`."""
        pieces = list(self.pieces())
        names = tuple(dict.fromkeys(chain.from_iterable(piece.names for piece in pieces)))
        rows = list(chain.from_iterable(piece.rows for piece in pieces))
        return Records(names, rows, pieces[0].header_row, pieces[0].separators)

    def size(self) -> int:
        """About how many bytes it has."""
        return (
            os.path.getsize(self.path) if self.dataset is None else self.dataset.info.dataset_size or len(self.dataset)
        )

    def digest(self) -> str:
        """Hash of its contents."""
        return sha256(self.path) if self.dataset is None else dataset_digest(self.dataset)


def parts_of(source: str | Path) -> list[Part]:
    """The files and data sets behind ``source``: see ``data_names``; of a folder all of its files.

    Raises:
        ConfigError: An option of one of them is wrong.
        DataError: One of them isn't there, can't be read, or doesn't say which files of a folder are meant.
    """
    parts = [part for name in data_names(source) for part in _parts(name)]
    repeated = [path for path, number in Counter(part.path for part in parts).items() if number > 1]
    if repeated:
        raise DataError(f"{source}: the file {str(repeated[0])!r} is named twice; name it once.")
    if not parts:
        raise DataError(f"{str(source)!r} names no data file; give the path of one.")
    return parts


def _parts(name: DataName) -> Iterator[Part]:
    if name.hub:
        split = f"?split={name.split}" if name.split else ""
        yield Part(Path(name.name + split), name.weight, fetch(name))
    for path in name.paths:
        try:
            for file in _in_folder(path, name) if path.is_dir() else [path]:
                yield Part(file, name.weight)
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


def _in_folder(folder: Path, name: DataName) -> list[Path]:
    """The data files of a folder that ``datasets`` saved, or of any other that holds files of one format."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.parent.name for each in folder.glob("*/state.json"))
        if name.split not in splits:
            raise DataError(
                f"{folder} holds several data sets, {', '.join(splits)}; name one of them, as in {folder}?split={splits[0]}."
                if splits
                else f"{folder} is a folder of data sets without any in it; save it again."
            )
        return _saved_by_datasets(folder / str(name.split))
    chosen = next((option for option in ("split", "revision", "subset") if getattr(name, option)), None)
    if chosen:
        raise DataError(f"{folder} is a folder with one data set in it, of which there is no {chosen}; leave it out.")
    if (folder / "state.json").is_file():
        return _saved_by_datasets(folder)
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
