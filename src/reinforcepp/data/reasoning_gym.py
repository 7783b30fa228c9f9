"""Tasks of reasoning-gym as prompts: generated rows, held-out rows, and the verifier of a row's answer.

A row's column ``reasoning_gym`` names its entry, as in ``chain_sum?max_terms=3&seed=42&size=500#17-1f0e9a3b``, from which the
generator makes it again. So a verifier gets the entry itself, whatever a checkpoint or a file did to the types of the other
columns. The digits at the end are a checksum of the question.

Held-out rows have seeds of their own, from ``HELDOUT_SEED`` on, and never a question of the training rows.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import types
import typing
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from reinforcepp.config.data_spec import REASONING_GYM, DataName
from reinforcepp.errors import ConfigError, first_line, nearest

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

ENTRY = REASONING_GYM
"""Column with the name of a row's entry."""
INSTRUCTION = "Give the final answer between <answer> and </answer>."
"""Sentence after each question; the verifiers read the last such answer of a completion."""
SEED, HELDOUT_SEED = 42, 2**30
SPLITS = ("train", "heldout")
ATTEMPTS = 10
"""Entries generated for each held-out row at most, because small tasks repeat their questions."""
OWN = {"heldout": "number of held-out rows", "split": "train or heldout"}
"""Options that aren't the generator's."""
HASHED = frozenset(
    {
        *("codeio", "intermediate_integration", "isomorphic_strings", "list_functions", "polynomial_multiplication"),
        *("ransom_note", "word_ladder"),
    }
)
"""Tasks of version 0.1.25 whose questions depend on the order of sets, so that each process has other ones."""
HASH_SEED = "PYTHONHASHSEED"
SEPARATOR = "|"
"""Between the items of an option that is a list, because commas separate data names."""


def task_rows(name: DataName) -> list[dict[str, Any]]:
    """Return the rows of a task: ``prompt``, the entry's ``answer`` and ``metadata``, and the name of the entry.

    Raises:
        ConfigError: The package isn't installed, or the task or an option isn't found or isn't valid.
    """
    text = name.task_text
    options = dict(name.generator)
    split = options.pop("split", SPLITS[0])
    if split not in SPLITS:
        raise ConfigError(
            f"{text}: split can be {' or '.join(SPLITS)}, not {split}. Choose one.{nearest(split, SPLITS)}"
        )
    heldout = options.pop("heldout", None)
    spec = str(name.task) + "?" + urlencode({"seed": SEED, **options})
    dataset = dataset_of(spec, text)
    wanted = _heldout_rows(heldout, len(dataset), text)
    if not 0 <= dataset.config.seed <= HELDOUT_SEED - len(dataset):
        raise ConfigError(
            f"{text}: seeds of training rows must be from 0 to {HELDOUT_SEED - 1}, and each row has its own: seed + index. "
            "Lower seed or size."
        )
    train = [dataset[index] for index in range(len(dataset))]
    if split == SPLITS[0]:
        return [_row(entry, spec, index) for index, entry in enumerate(train)]
    spec = str(name.task) + "?" + urlencode({**options, "seed": HELDOUT_SEED, "size": wanted * ATTEMPTS})
    dataset = dataset_of(spec, text)
    seen = {_words(entry) for entry in train}
    rows: list[dict[str, Any]] = []
    for index in range(wanted * ATTEMPTS):
        entry = dataset[index]
        if (question := _words(entry)) not in seen:
            seen.add(question)
            rows.append(_row(entry, spec, index))
        if len(rows) == wanted:
            break
    if not rows:
        raise ConfigError(
            f"{text}: each of {wanted * ATTEMPTS} held-out questions is in the training rows, because the task has few. Lower "
            "size, or raise the task's difficulty."
        )
    return rows


def score_answer(entry: str, answer: str | None) -> float:
    """Return the verifier's score from 0 to 1 of a final answer to the entry that the column ``reasoning_gym`` names.

    An answer that the verifier can't read, which some report by an exception, has the score 0.

    Raises:
        ConfigError: The package isn't installed, or ``entry`` isn't the name of an entry.
    """
    spec, _, rest = str(entry).rpartition("#")
    index, _, checksum = rest.partition("-")
    if not spec or not index.isdecimal():
        raise ConfigError(
            f"{ENTRY}: {entry!r} isn't the name of an entry. Use rows of {REASONING_GYM}:TASK, which have the column."
        )
    if answer is None:
        return 0.0
    dataset, found = dataset_of(spec, f"{REASONING_GYM}:{spec}"), _entry(spec, int(index))
    if _checksum(found) != checksum:
        raise ConfigError(
            f"{ENTRY}: {entry} has another question in this process. Use the same version of reasoning-gym, and set "
            f"{HASH_SEED}=0 for all processes."
        )
    try:
        return float(dataset.score_answer(answer, found))
    except Exception:  # the package's verifiers can raise anything for a text that they don't expect
        return 0.0


@lru_cache(maxsize=8192)
def _entry(spec: str, index: int) -> Mapping[str, Any]:
    return dataset_of(spec, spec)[index]


def _row(entry: Mapping[str, Any], spec: str, index: int) -> dict[str, Any]:
    prompt = f"{entry['question'].rstrip()}\n\n{INSTRUCTION}"
    name = f"{spec}#{index}-{_checksum(entry)}"
    return {"prompt": prompt, "answer": entry["answer"], "metadata": entry["metadata"], ENTRY: name}


def _checksum(entry: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(entry['question'].encode()):08x}"


def _words(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(entry["question"].split())


def _heldout_rows(value: str | None, size: int, text: str) -> int:
    if value is None:
        return max(1, size // 10)
    if not value.isdecimal() or not int(value):
        raise ConfigError(f"{text}: heldout must be a number of rows of at least 1, not {value}.")
    return int(value)


# --- the generators ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def dataset_of(spec: str, text: str) -> ProceduralDataset:
    """Return the generator that ``TASK?OPTION=VALUE&...`` describes; ``text`` names it in messages.

    Raises:
        ConfigError: The package isn't installed, or the task or an option isn't found or isn't valid.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            f"{text}: needs the package reasoning-gym. Install it: pip install 'reinforcepp[reasoning-gym]'"
        ) from error
    task, _, query = spec.partition("?")
    if task not in DATASETS:
        raise ConfigError(
            f"{text}: reasoning-gym has no task {task!r}.{nearest(task, DATASETS) or ' Correct the name.'}"
        )
    if task in HASHED and os.environ.get(HASH_SEED, "random") == "random":
        raise ConfigError(
            f"{text}: the questions of {task} are different in each process, unless Python's hashes are fixed. Set {HASH_SEED}=0 "
            "before the command."
        )
    create, config_class = DATASETS[task]
    hints, known = typing.get_type_hints(config_class), [field.name for field in dataclasses.fields(config_class)]
    values = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            listed = ", ".join(["weight", *OWN, *known])
            raise ConfigError(
                f"{text}: option {key!r} of {task} not found, only {listed}.{nearest(key, [*OWN, *known])}"
            )
        values[key] = _value(value, hints[key], f"{text}: {key}")
    try:
        config = config_class(**values)
        return create(config=config)
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"{text}: {first_line(error).rstrip('.')}. Correct the options of {task}.") from error


def _value(text: str, hint: Any, option: str) -> Any:
    """Return an option's text as the type that the generator's field has."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    origin = typing.get_origin(hint) or hint
    if origin in (list, tuple, Sequence):
        item = next(iter(typing.get_args(hint)), None)
        items = [_item(each) if item is None else _value(each, item, option) for each in text.split(SEPARATOR)]
        return tuple(items) if origin is tuple else items
    if origin is typing.Literal:
        return text
    if isinstance(origin, type) and issubclass(origin, enum.Enum) and text in [each.value for each in origin]:
        return origin(text)
    if origin is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if origin in (int, float, str):
        try:
            return origin(text)
        except ValueError:
            pass
    kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(origin)
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        kind = " or ".join(str(each.value) for each in origin)
    if kind is None:
        raise ConfigError(f"{option}: has no form as text. Omit it, or pass rows of your own dataset from Python.")
    raise ConfigError(f"{option} must be {kind}, not {text}.")


def _item(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return text
