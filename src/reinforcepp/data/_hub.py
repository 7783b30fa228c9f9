"""Data sets of the Hugging Face hub, by the ``datasets`` library, which fetches them once and keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.config.data_spec import DataName
from reinforcepp.data._text import PIECE_ROWS, Records, count, quoted
from reinforcepp.errors import DataError
from reinforcepp.runtime import look_for_hub

if TYPE_CHECKING:
    from datasets import Dataset

USUAL_SPLIT = "train"


def hub_pieces(path: Path, dataset: Dataset) -> Iterator[Records]:
    """The rows of a data set; a row's number is its place, from 1.

    Raises:
        DataError: There is none.
    """
    number, names = 1, tuple(dataset.column_names)
    for table in dataset.with_format("arrow").iter(PIECE_ROWS):
        cells = table.to_pylist()
        number += len(cells)
        yield Records(names, list(enumerate(cells, number - len(cells))), share=(number - 1) / len(dataset))
    if number == 1:
        raise DataError(f"{path}: there is no row in it; take another split or data set.")


def dataset_digest(dataset: Dataset) -> str:
    """Hash of all cells."""
    seen = hashlib.sha256(repr(dataset.column_names).encode())
    for table in dataset.with_format("arrow").iter(PIECE_ROWS):
        for batch in table.combine_chunks().to_batches():
            seen.update(batch.serialize())
    return seen.hexdigest()


def fetch(name: DataName) -> Dataset:
    """The data set, from the hub or from where it was kept.

    Raises:
        DataError: It isn't there or can't be fetched, or it isn't clear which part of it is meant.
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
                f"There is no file or folder {name.name!r} here, and the hub can't be reached to fetch a data set of that "
                f"name: check the path, or fetch it where there is a network (hf download --repo-type dataset {name.name}) "
                "and give the files."
            ) from error
        raise DataError(
            f"There is no data set {name.name!r} on the hub that you may read{_at(name)}; check its name, and log in with "
            "`hf auth login` where it is private or asks for consent."
        ) from error
    except (DatasetsError, ValueError, OSError) as error:
        raise DataError(f"The data set {name.name} can't be had{_at(name)}: {_first_line(error)}") from error
    return _one_split(name, found)


def _one_split(name: DataName, found: Any) -> Dataset:
    import datasets

    if isinstance(found, datasets.Dataset):
        return found
    splits = list(found)
    if len(splits) == 1 or USUAL_SPLIT in splits:
        return found[USUAL_SPLIT if USUAL_SPLIT in splits else splits[0]]
    raise DataError(
        f"The data set {name.name} has {count(len(splits), 'split')}, {quoted(splits)}; name one of them, as in "
        f"{name.name}?split={splits[0]}."
    )


def _at(name: DataName) -> str:
    said = [f"{option} {getattr(name, option)}" for option in ("split", "revision", "subset") if getattr(name, option)]
    return f" with {', '.join(said)}" if said else ""


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if text.endswith(".") else f"{text}."
