"""From a data setting to its files and Hub datasets, or to the data that ships with this package."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reinforcepp.config.data_spec import COMPRESSED, STRENGTHS, TASKS, DataName, data_names, heldout_tasks
from reinforcepp.data.encodings import data_suffix
from reinforcepp.data.limits import check_columns
from reinforcepp.data.readers import CHUNK_ROWS, Records, count, quoted, read_csv, read_json, read_json_lines
from reinforcepp.data.tables import read_arrow, read_parquet
from reinforcepp.errors import ConfigError, DataError, nearest, option, shown
from reinforcepp.files import sha256
from reinforcepp.runtime.process import look_for_hub

if TYPE_CHECKING:
    from datasets import Dataset

_BUILTIN_PREFIX = "builtin:"
_BUILTIN = ("builtin:network",)
_DEFAULT_SPLIT = "train"
_FORMATS = "CSV, TSV, JSON, JSONL and Parquet files"
READERS: Mapping[str, Callable[[Path], Iterator[Records]]] = {
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
"""Readers by file extension."""
# Files that `datasets` writes next to the data: they describe it and hold no rows.
_METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "state.json")


@dataclass(frozen=True)
class GivenRows:
    """Rows that a Python program passes as an argument; a row's number is its index.

    Attributes:
        name: The argument, for messages.
        rows: The rows by column.
    """

    name: str
    rows: Dataset | Sequence[Mapping[str, Any]]

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    @classmethod
    def of(cls, dataset: Any, name: str) -> GivenRows:
        """Return the rows of a ``datasets.Dataset``, or of any finite iterable of mappings.

        Raises:
            ConfigError: ``dataset`` isn't a collection of rows.
            DataError: It is empty, or a row isn't a mapping.
        """
        check_dataset(dataset, name)
        rows = dataset if hasattr(dataset, "with_format") and hasattr(dataset, "__len__") else list(dataset)
        if not len(rows):
            raise DataError(f"{name}: no rows. Give at least one.")
        if isinstance(rows, list):
            for number, row in enumerate(rows):
                if not isinstance(row, Mapping):
                    raise DataError(
                        f"{name}:{number}: {shown(row, 60)} isn't a row. Give a dictionary, as in {{'prompt': ...}}."
                    )
        return cls(name, rows)

    def chunks(self) -> Iterator[Records]:
        """Yield the rows, at least one chunk."""
        if not isinstance(self.rows, list):
            yield from hub_chunks(Path(self.name), self.rows, first=0)
            return
        yield Records(tuple(dict.fromkeys(chain.from_iterable(self.rows))), list(enumerate(self.rows)))

    def digest(self) -> str:
        """Return a hash of the contents, the same for a list and a ``Dataset``."""
        digest = hashlib.sha256()
        for records in self.chunks():
            for _, cells in records.rows:
                digest.update(json.dumps(cells, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()


class DataFiles(NamedTuple):
    """The files or rows of a data setting; ``heldout`` is None if the held-out part must still be split off."""

    train: Path | GivenRows
    heldout: Path | GivenRows | None


RowSource = str | Path | GivenRows
"""The names of files, folders and Hub datasets, or rows."""
DataSource = RowSource | DataFiles
"""The same, or training and held-out rows apart."""


def check_dataset(dataset: Any, name: str) -> None:
    """Check that an argument is a collection of rows.

    Raises:
        ConfigError: It is the name of a dataset, or holds several.
    """
    if isinstance(dataset, Mapping):
        first = next(iter(dataset), "train")
        raise ConfigError(
            f"{name}: {type(dataset).__name__} with {', '.join(map(str, dataset)) or 'nothing'} isn't a single dataset. Give "
            f"one of its parts, as in {name}=dataset[{shown(first)}]."
        )
    if isinstance(dataset, (str, os.PathLike)) or not isinstance(dataset, Iterable):
        raise ConfigError(
            f"{name}: {shown(dataset)} isn't a dataset. Give rows, for example from datasets.load_dataset, or a list of "
            "{'prompt': ...}."
        )


def resolve_data(source: DataSource) -> DataFiles:
    """Return the parts of ``builtin:network`` or of tasks, or ``source`` itself for anything that ``read_table`` reads.

    Raises:
        DataError: No built-in data has that name.
    """
    if isinstance(source, DataFiles):
        return source
    if isinstance(source, GivenRows):
        return DataFiles(source, None)
    name = str(source)
    if (tasks := heldout_tasks(name)) is not None:
        return DataFiles(Path(name), Path(tasks))
    if not name.startswith(_BUILTIN_PREFIX):
        return DataFiles(Path(source), None)
    if name not in _BUILTIN:
        raise DataError(
            f"Built-in data {name!r} not found. Use {' or '.join(map(repr, _BUILTIN))}, or give the path of a file."
            f"{nearest(name, _BUILTIN)}"
        )
    from reinforcepp.data.builtin import data_paths

    train, heldout = data_paths()
    return DataFiles(Path(train), Path(heldout))


def is_data_file(name: str) -> bool:
    """Return whether a name stands for rows, by its extension or as a task, rather than for a file of plain text."""
    return data_suffix(Path(name)) in READERS or name.startswith(TASKS)


def is_builtin(path: Path) -> bool:
    """Return whether a file ships with this package."""
    return path.parent == Path(__file__).parent / "builtin"


@dataclass(frozen=True)
class DataPart:
    """One file or Hub dataset of a data setting.

    Attributes:
        path: The file, or the name that messages use for a dataset.
        weight: How often each row counts in training.
        dataset: The Hub dataset, or the rows of an argument; None for a file.
        note: Remark for the user on how the part was chosen.
    """

    path: Path
    weight: float = 1.0
    dataset: Dataset | GivenRows | None = None
    note: str | None = None

    def chunks(self) -> Iterator[Records]:
        """Yield the rows, at least one chunk.

        Raises:
            DataError: The part can't be read, or isn't well-formed.
        """
        if isinstance(self.dataset, GivenRows):
            yield from self.dataset.chunks()
            return
        if self.dataset is not None:
            yield from hub_chunks(self.path, self.dataset)
            return
        try:
            _check_exists(self.path)
            for records in READERS[data_suffix(self.path)](self.path):
                check_columns(self.path, records.names)
                yield records
        except MemoryError as error:
            raise DataError(
                f"{self.path}: the memory is too small to read the file. Add {option('streaming')}, which keeps rows on disk, or "
                "split the file."
            ) from error
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def records(self) -> Records:
        """Return all rows in one chunk; raises what :meth:`chunks` raises."""
        chunks = list(self.chunks())
        names = tuple(dict.fromkeys(chain.from_iterable(chunk.names for chunk in chunks)))
        rows = list(chain.from_iterable(chunk.rows for chunk in chunks))
        return Records(names, rows, chunks[0].header_row, chunks[0].other_separators, notes=chunks[0].notes)

    def size(self) -> int:
        """Return the approximate size in bytes."""
        if self.dataset is None:
            return os.path.getsize(self.path)
        if isinstance(self.dataset, GivenRows):
            return len(self.dataset.rows)
        return self.dataset.info.dataset_size or len(self.dataset)

    def digest(self) -> str:
        """Return a hash of the contents."""
        if self.dataset is None:
            return sha256(self.path)
        return self.dataset.digest() if isinstance(self.dataset, GivenRows) else dataset_digest(self.dataset)


def find_parts(source: RowSource) -> list[DataPart]:
    """Return the files and Hub datasets that ``source`` names; see ``data_names``. A folder stands for its files.

    Rows of an argument are one part.

    Raises:
        ConfigError: An option after a name is invalid.
        DataError: A part doesn't exist, can't be read, or is a folder with files of several formats.
    """
    if isinstance(source, GivenRows):
        return [DataPart(Path(source.name), dataset=source)]
    parts = [part for name in data_names(source) for part in _parts(name)]
    repeated = [path for path, number in Counter(part.path for part in parts).items() if number > 1]
    if repeated:
        raise DataError(f"{source}: the file {str(repeated[0])!r} is named twice. Name it once.")
    if not parts:
        raise DataError(f"{str(source)!r} names no data file. Give the path of one.")
    return parts


def display_name(source: RowSource, parts: Sequence[DataPart]) -> str:
    """Return the name of the data for messages."""
    if isinstance(source, GivenRows):
        return source.name
    first = parts[0].path
    if len(parts) == 1 or Path(source).is_dir():
        return str(source) if Path(source).exists() else str(first)
    return f"{first} and {count(len(parts) - 1, 'more file')}"


def combined_digest(parts: Sequence[DataPart]) -> str:
    """Return the hash of a file's bytes; for several files, the hash of their joined digests."""
    digests = [part.digest() for part in parts]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _parts(name: DataName) -> Iterator[DataPart]:
    if name.hub:
        split = f"?split={name.split}" if name.split else ""
        yield DataPart(Path(name.name + split), name.weight, fetch(name))
    if name.task is not None:
        from reinforcepp.data.reasoning_gym import task_rows

        yield DataPart(Path(name.task_text), name.weight, GivenRows(name.task_text, task_rows(name)))
        return
    if name.taskset is not None:
        from reinforcepp.data.verifiers import taskset_rows

        yield DataPart(Path(name.task_text), name.weight, GivenRows(name.task_text, taskset_rows(name)))
        return
    if name.database:
        rows = feedback_rows(name.database, name.strength)
        yield DataPart(Path(rows.name), name.weight, rows)
        return
    for path in name.paths:
        try:
            files, note = _in_folder(path, name) if path.is_dir() else ([path], None)
            for file in files:
                yield DataPart(file, name.weight, note=note)
        except OSError as error:
            raise _unreadable(path, error) from error


def feedback_rows(name: str, strength: str = STRENGTHS[0]) -> GivenRows:
    """Return the preference pairs in a feedback database; ``strength`` is as for ``training_rows``.

    Raises:
        ConfigError: The database can't be read.
        DataError: It has no pair.
    """
    from reinforcepp.data.feedback.preferences import training_rows
    from reinforcepp.data.feedback.store import Store

    store = Store(name, create=False)
    try:
        rows = list(training_rows(store, strength))
    finally:
        store.close()
    if not rows:
        raise DataError(f"{store.name}: the database has no votes. Collect some with `reinforcepp label`.")
    return GivenRows(store.name, rows)


# --- files and folders ------------------------------------------------------------------------------------------------


def _check_exists(path: Path) -> None:
    if not path.parent.is_dir():
        raise DataError(f"{path}: folder {str(path.parent)!r} not found. Check the path.")
    if not path.exists():
        if any(mark in path.name for mark in "*?["):
            raise DataError(f"{path}: no file matches the pattern. Check the pattern.")
        hint = nearest(path.name, (each.name for each in path.parent.iterdir() if each.is_file()))
        raise DataError(f"{path}: no such file. Check the path.{hint}")
    compressed = path.suffix.lower() in COMPRESSED
    if data_suffix(path) not in READERS or (compressed and data_suffix(path) in (".parquet", ".arrow")):
        problem = f"{path.suffix} files aren't supported" if path.suffix else "the file name has no extension"
        raise DataError(f"{path}: {problem}, only {_FORMATS}. Convert it to one of these, for example .jsonl.")


def _in_folder(folder: Path, name: DataName) -> tuple[list[Path], str | None]:
    """Return the data files of a folder, and a remark for the user.

    The folder is one that ``datasets`` saved, or holds files of a single format, directly or in its folders. If the names
    tell splits apart, only one split is used.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.parent.name for each in folder.glob("*/state.json"))
        if name.split not in splits:
            raise DataError(
                f"{folder}: the folder holds several splits: {', '.join(splits)}. Name one, as in {folder}?split={splits[0]}."
                if splits
                else f"{folder}: the folder holds a DatasetDict without splits. Save it again."
            )
        return _saved_by_datasets(folder / str(name.split)), None
    saved = (folder / "state.json").is_file()
    found = [] if saved else _data_files(folder)
    splits = sorted({split for split in map(partial(_split_of, folder), found) if split})
    option = next((option for option in ("revision", "subset") if getattr(name, option)), None)
    option = "split" if name.split and not splits else option
    if option:
        raise DataError(f"{folder}: the folder holds a single dataset, so {option} doesn't apply. Omit {option}.")
    if saved:
        return _saved_by_datasets(folder), None
    chosen, note = _one_of(folder, found, splits, name.split)
    suffixes = sorted({data_suffix(each) for each in chosen})
    if not found:
        raise DataError(f"{folder}: no data file in the folder. Give a file, or a folder that holds {_FORMATS}.")
    if len(suffixes) > 1:
        raise DataError(
            f"{folder}: the folder holds several formats ({', '.join(suffixes)}). "
            f"Name the files, for example {str(folder / f'*{suffixes[0]}')!r}."
        )
    return chosen, note


def _data_files(folder: Path) -> list[Path]:
    """Return the data files in a folder or, if it has none, in its folders."""
    for pattern in ("*", "*/*"):
        files = (each for each in folder.glob(pattern) if data_suffix(each) in READERS and each.is_file())
        if found := sorted(each for each in files if each.name not in _METADATA_FILES):
            return found
    return []


# Names as the Hub reads them: train-00000-of-00001.parquet, data_test.jsonl, validation/a.csv.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_WORDS = {word: split for split, words in _SPLITS.items() for word in words}


def _split_of(folder: Path, path: Path) -> str | None:
    """Return the split that the name of a file, or of its folder below ``folder``, names."""
    words = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _one_of(
    folder: Path, files: Sequence[Path], splits: Sequence[str], wanted: str | None
) -> tuple[list[Path], str | None]:
    """Return the files of one split: the wanted one, or those for training."""
    by_split = {split: [each for each in files if _split_of(folder, each) == split] for split in (*splits, None)}
    if wanted is not None and wanted not in splits:
        raise DataError(f"{folder}: split {wanted!r} not found, only {', '.join(splits)}. Correct the split.")
    split = wanted or (_DEFAULT_SPLIT if _DEFAULT_SPLIT in splits else None)
    chosen = by_split[split] if split or by_split[None] else list(files)
    if split is None and not by_split[None] and len(splits) > 1:
        raise DataError(
            f"{folder}: the folder holds several splits: {', '.join(splits)}. Name one, as in {folder}?split={splits[0]}."
        )
    unused = len(files) - len(chosen)
    return (
        chosen,
        f"split {split or _DEFAULT_SPLIT!r}; {count(unused, 'file')} of other splits unused" if unused else None,
    )


def _saved_by_datasets(folder: Path) -> list[Path]:
    state_file = folder / "state.json"
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        names = [str(each["filename"]) for each in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{state_file}: not the file list that `save_to_disk` writes. Save the dataset again."
        ) from error
    if not names or any(Path(name).name != name or not name.endswith(".arrow") for name in names):
        raise DataError(f"{state_file}: lists no Arrow files of this folder. Save the dataset again.")
    return [folder / name for name in names]


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: {error.strerror or error}. Check the path and its permissions.")


# --- the Hugging Face Hub ---------------------------------------------------------------------------------------------


def hub_chunks(path: Path, dataset: Dataset, first: int = 1) -> Iterator[Records]:
    """Yield the rows of a Hub dataset; a row's number is its position, counted from ``first``.

    Raises:
        DataError: The dataset has no row.
    """
    number, names = first, tuple(dataset.column_names)
    for table in dataset.with_format("arrow").iter(CHUNK_ROWS):
        cells = table.to_pylist()
        number += len(cells)
        yield Records(names, list(enumerate(cells, number - len(cells))), share=(number - first) / len(dataset))
    if number == first:
        raise DataError(f"{path}: the dataset has no row. Choose another split or dataset.")


def dataset_digest(dataset: Dataset) -> str:
    """Return a hash of all cells."""
    digest = hashlib.sha256(repr(dataset.column_names).encode())
    for table in dataset.with_format("arrow").iter(CHUNK_ROWS):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def fetch(name: DataName) -> Dataset:
    """Return a dataset from the Hugging Face Hub or its local cache.

    Raises:
        DataError: The dataset doesn't exist, can't be downloaded, or has several splits and none is named.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    look_for_hub()
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
    try:
        found = datasets.load_dataset(name.name, name.subset, split=name.split, revision=name.revision)
    except (DatasetNotFoundError, HfHubHTTPError, ConnectionError) as error:
        if constants.HF_HUB_OFFLINE:
            raise DataError(
                f"{name.name}: no such file or folder, and the Hugging Face Hub can't be reached. Check the path, or "
                f"download the dataset on a computer with a network (hf download --repo-type dataset {name.name}) and "
                "give its files."
            ) from error
        raise DataError(
            f"{name.name}: dataset not found on the Hugging Face Hub{_options(name)}, or access denied. Check the name. "
            "For a private or gated dataset, log in with `hf auth login`."
        ) from error
    except (DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{name.name}: the dataset can't be loaded{_options(name)}: {_sentence(error)}") from error
    return _one_split(name, found)


def _one_split(name: DataName, found: Any) -> Dataset:
    import datasets

    if isinstance(found, datasets.Dataset):
        return found
    splits = list(found)
    if len(splits) == 1 or _DEFAULT_SPLIT in splits:
        return found[_DEFAULT_SPLIT if _DEFAULT_SPLIT in splits else splits[0]]
    raise DataError(
        f"{name.name}: the dataset has {count(len(splits), 'split')}: {quoted(splits)}. "
        f"Name one, as in {name.name}?split={splits[0]}."
    )


def _options(name: DataName) -> str:
    given = [f"{option} {getattr(name, option)}" for option in ("split", "revision", "subset") if getattr(name, option)]
    return f" with {', '.join(given)}" if given else ""


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if text.endswith(".") else f"{text}."
