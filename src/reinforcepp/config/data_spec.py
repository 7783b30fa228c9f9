"""What a setting for data names, as the user writes it. Imports no torch and opens no file.

my.csv, data/*.jsonl, a folder           files, patterns and folders
org/name, hub:name                       a data set of the Hugging Face hub; a file or folder of that name wins
a,b                                      several of them
NAME?weight=2&split=train                with options: weight, and of a data set split, revision and subset
"""

from __future__ import annotations

import glob
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from reinforcepp.errors import ConfigError, nearest

OPTIONS = ("weight", "split", "revision", "subset")
MOST_TIMES = 1000
_OPTIONS = re.compile(r"(.+?)\?(\w+=.*)", re.DOTALL)
_HUB = "hub:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
"""Endings of the files that are read."""


@dataclass(frozen=True)
class DataName:
    """One part of a setting for data: ``name`` with its options.

    ``weight`` is how often its rows count in training, ``subset`` what the hub also calls a configuration.
    """

    name: str
    weight: float = 1.0
    split: str | None = None
    revision: str | None = None
    subset: str | None = None
    hub: bool = False

    @property
    def paths(self) -> list[Path]:
        """The files and folders that are meant: those that fit a pattern, which where there are none stays as it is."""
        if self.hub:
            return []
        try:
            matches = sorted(glob.glob(self.name)) if not os.path.exists(self.name) else []
        except ValueError:  # a NUL character in it
            matches = []
        return [Path(match) for match in matches or [self.name]]


def data_names(setting: str | Path) -> list[DataName]:
    """The parts of a setting, in order. What exists under the whole name is that file, commas and all.

    Raises:
        ConfigError: an option isn't one, or has no sensible value.
    """
    if os.path.exists(setting):
        return [DataName(str(setting))]
    return [_data_name(text) for text in filter(None, map(str.strip, str(setting).split(",")))]


def listed(setting: str | Path) -> list[Path]:
    """The paths that a setting for data stands for."""
    return [path for part in data_names(setting) for path in part.paths]


def _data_name(text: str) -> DataName:
    found = None if os.path.exists(text) else _OPTIONS.fullmatch(text)
    if found is None:
        return DataName(text.removeprefix(_HUB), hub=_is_hub(text))
    name, options = found[1], dict(parse_qsl(found[2].replace("+", "%2B"), keep_blank_values=True))
    for key, value in options.items():
        if key not in OPTIONS:
            raise ConfigError(f"{text}: there is no option {key!r}, only {', '.join(OPTIONS)}.{nearest(key, OPTIONS)}")
        if not value.strip():
            raise ConfigError(f"{text}: the option {key} has no value; give one, or omit it.")
    weight = _weight(text, options.pop("weight", "1"))
    hub = _is_hub(name)
    if not hub and not os.path.isdir(name) and options:
        raise ConfigError(
            f"{text}: {next(iter(options))} is an option of data sets of the hub and of folders that datasets saved, and "
            f"{name} is a file; omit it."
        )
    return DataName(name.removeprefix(_HUB), weight, hub=hub, **options)


def _is_hub(name: str) -> bool:
    if name.startswith(_HUB):
        return True
    there = os.path.exists(name) or os.path.isdir(name.partition("/")[0])
    return not there and _HUB_NAME.fullmatch(name) is not None and Path(name).suffix.lower() not in FILES


def _weight(text: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= MOST_TIMES:
        raise ConfigError(
            f"{text}: a weight is how often each row counts, above 0 and at most {MOST_TIMES}, not {value}."
        )
    return weight
