"""Parse the setting ``data``. Imports no torch and opens no file.

my.csv, data/*.jsonl, a folder           files, patterns and folders
org/name, hub:name                       a dataset on the Hugging Face Hub; a file or folder with this name has priority
feedback.db, postgresql://host/name      a database of reinforcepp label
reasoning_gym:TASK                       a task of reasoning-gym; its options are those of the generator, with size and seed
verifiers:TASKSET                        the tasks of a taskset of verifiers; its options are those of its configuration
a,b                                      several of them
NAME?weight=2&split=train                with options: weight, for a dataset split, revision and subset, for a database strength
"""

from __future__ import annotations

import glob
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl

from reinforcepp.errors import ConfigError, nearest

OPTIONS = ("weight", "split", "revision", "subset", "strength")
STRENGTHS = ("margin", "weight")
REASONING_GYM = "reasoning_gym"
"""Prefix of the tasks of reasoning-gym, and name of the reward that scores their answers."""
MOST_TIMES = 1000
VERIFIERS = "verifiers"
"""Prefix of the tasksets of verifiers."""
TASKS = (f"{REASONING_GYM}:", f"{VERIFIERS}:")
_OPTIONS = re.compile(r"(.+?)\?(\w+=.*)", re.DOTALL)
_HUB = "hub:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
"""File extensions that can be read."""
DATABASE = ".db"
"""File extension of a feedback database."""
_SERVER = re.compile(r"postgresql(?:\+\w+)?:/+")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Extensions of compressed files, after that of the format."""


@dataclass(frozen=True)
class DataName:
    """One entry of the setting ``data``: ``name`` with its options.

    ``weight`` is how often its rows count in training; ``subset`` is also called a configuration on the Hub. ``strength`` is the
    column that holds the strength of preferences in a feedback database. ``generator`` has the options of a task.
    """

    name: str
    weight: float = 1.0
    split: str | None = None
    revision: str | None = None
    subset: str | None = None
    strength: str = STRENGTHS[0]
    hub: bool = False
    generator: tuple[tuple[str, str], ...] = ()

    @property
    def task(self) -> str | None:
        """The task of reasoning-gym that the entry names, if it does."""
        return self._after(REASONING_GYM)

    @property
    def taskset(self) -> str | None:
        """The taskset of verifiers that the entry names, if it does."""
        return self._after(VERIFIERS)

    def _after(self, prefix: str) -> str | None:
        return self.name.removeprefix(f"{prefix}:") if self.name.startswith(f"{prefix}:") and not self.hub else None

    @property
    def task_text(self) -> str:
        """The task or taskset with its options, as the user writes them."""
        options = "&".join(f"{key}={value}" for key, value in self.generator)
        return self.name + (f"?{options}" if options else "")

    @property
    def database(self) -> str | None:
        """The file or URL of the feedback database that the entry names, if it does."""
        if server := _SERVER.match(self.name):
            return f"postgresql://{self.name[server.end() :]}"
        return self.name if self.name.lower().endswith(DATABASE) and not self.hub else None

    @property
    def paths(self) -> list[Path]:
        """The files and folders that match the name, or the name itself if none match; empty for a Hub dataset."""
        if self.hub or self.task is not None or self.taskset is not None or _SERVER.match(self.name):
            return []
        try:
            matches = sorted(glob.glob(self.name)) if not os.path.exists(self.name) else []
        except ValueError:  # The name contains a NUL character.
            matches = []
        return [Path(match) for match in matches or [self.name]]


def data_names(setting: str | Path) -> list[DataName]:
    """Return the entries of a setting, in order. If a file with the whole name exists, commas don't separate entries.

    Raises:
        ConfigError: If an option doesn't exist or has an invalid value.
    """
    if os.path.exists(path := os.path.expanduser(setting)):
        return [DataName(str(path))]
    return [_data_name(os.path.expanduser(text)) for text in filter(None, map(str.strip, str(setting).split(",")))]


def data_entries(setting: str) -> dict[str, str]:
    """Return the text of each entry of a setting by a short name for metrics: ``math`` for ``data/math.jsonl?weight=2``."""
    texts = (
        [setting] if os.path.exists(os.path.expanduser(setting)) else filter(None, map(str.strip, setting.split(",")))
    )
    entries: dict[str, str] = {}
    for text in texts:
        path = text.partition("?")[0].rstrip("/").rpartition(":")[2].rpartition("/")[2]
        stem = re.sub(r"\W+", "_", path.partition(".")[0]).strip("_") or "data"
        name, number = stem, 1
        while name in entries:
            name, number = f"{stem}_{number}", number + 1
        entries[name] = text
    return entries


def listed(setting: str | Path) -> list[Path]:
    """Return the paths in a setting for data."""
    return [path for part in data_names(setting) for path in part.paths]


def is_reasoning_gym(setting: str | Path) -> bool:
    """Return whether all entries of a setting are tasks of reasoning-gym."""
    names = data_names(setting) if f"{REASONING_GYM}:" in str(setting) else []
    return bool(names) and all(name.task is not None for name in names)


def heldout_tasks(setting: str | Path) -> str | None:
    """Return the setting for the held-out rows of tasks of reasoning-gym; None if other data or a split is named."""
    if not is_reasoning_gym(setting) or any("split" in dict(name.generator) for name in data_names(setting)):
        return None
    texts = filter(None, map(str.strip, str(setting).split(",")))
    return ",".join(f"{text}{'&' if '?' in text else '?'}split=heldout" for text in texts)


def _data_name(text: str) -> DataName:
    found = None if os.path.exists(text) else _OPTIONS.fullmatch(text)
    if text.startswith(TASKS):
        return _task(text, found)
    if found is None:
        return DataName(text.removeprefix(_HUB), hub=_is_hub(text))
    name, options = found[1], dict(parse_qsl(found[2].replace("+", "%2B"), keep_blank_values=True))
    for key, value in options.items():
        if key not in OPTIONS:
            raise ConfigError(f"{text}: option {key!r} not found, only {', '.join(OPTIONS)}.{nearest(key, OPTIONS)}")
        if not value.strip():
            raise ConfigError(f"{text}: option {key} has no value. Give one, or omit the option.")
    weight = _weight(text, options.pop("weight", "1"))
    hub, strength = _is_hub(name), options.pop("strength", None)
    part = DataName(name.removeprefix(_HUB), weight, strength=strength or STRENGTHS[0], hub=hub)
    if strength and not part.database:
        raise ConfigError(f"{text}: strength is an option for a database of reinforcepp label. Omit the option.")
    if part.strength not in STRENGTHS:
        raise ConfigError(f"{text}: strength can be {' or '.join(STRENGTHS)}, not {strength}. Choose one.")
    if not hub and not os.path.isdir(name) and options:
        raise ConfigError(
            f"{text}: {next(iter(options))} is an option for Hub datasets and folders saved by `datasets`, but {name} is "
            "a file. Omit the option."
        )
    return replace(part, **options)


def _task(text: str, found: re.Match[str] | None) -> DataName:
    """Return a task or taskset; the package checks its options, because only it knows them."""
    name, options = (text, "") if found is None else found.groups()
    pairs = parse_qsl(options.replace("+", "%2B"), keep_blank_values=True)
    given = dict(pairs)
    for key, value in pairs:
        if not value.strip() or len(given) < len(pairs):
            problem = f"{key} has no value" if not value.strip() else "an option is given twice"
            raise ConfigError(f"{text}: {problem}. Give one value per option.")
    weight = _weight(text, given.pop("weight", "1"))
    return DataName(name, weight, generator=tuple(given.items()))


def _is_hub(name: str) -> bool:
    if name.startswith(_HUB):
        return True
    is_local = os.path.exists(name) or os.path.isdir(name.partition("/")[0])
    return (
        not is_local
        and _HUB_NAME.fullmatch(name) is not None
        and Path(name).suffix.lower() not in (*FILES, *COMPRESSED, DATABASE)
    )


def _weight(text: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= MOST_TIMES:
        raise ConfigError(
            f"{text}: the weight must be greater than 0 and at most {MOST_TIMES}, not {value}. It is how often each row counts."
        )
    return weight
