"""Checks that several configurations share; each failure is a ``ConfigError`` that names the setting."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from reinforcepp.config.data_spec import listed
from reinforcepp.errors import ConfigError, nearest

JUDGE, JUDGED_DATA = "builtin:judge", "builtin:network"
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
SEEDS = 2**32  # what the random generators of all libraries take


def positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be greater than 0, not {value}.")


def not_negative(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise ConfigError(f"{name} must not be negative, but is {value}.")


def fraction(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(f"{name} must be at least 0 and below 1, not {value}.")


def check_choices(config: Any) -> None:
    """A choice is one of those there are."""
    for name, hint in get_type_hints(type(config)).items():
        choices = [
            choice for part in (hint, *get_args(hint)) if get_origin(part) is Literal for choice in get_args(part)
        ]
        value = getattr(config, name)
        if choices and value is not None and value not in choices:
            raise ConfigError(
                f"{name} must be one of {', '.join(choices)}, not {value!r}.{nearest(str(value), choices)}"
            )


def check_values(config: Any) -> None:
    """What holds for every setting by its type: numbers are finite, a choice is one of those there are."""
    check_choices(config)
    for name, value in asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, not {value}.")
    if hasattr(config, "seed") and not 0 <= config.seed < SEEDS:
        raise ConfigError(f"seed must be from 0 to {SEEDS - 1}, not {config.seed}.")


def filled(config: Any, *names: str) -> None:
    """A name or path is given, and where it begins with the home folder of a user, there is that user."""
    for name in names:
        filled_path(name, getattr(config, name))


def filled_path(name: str, value: str) -> None:
    if not value.strip():
        raise ConfigError(f"{name} is empty: leave it out for its default, or give a name.")
    if value.startswith("~") and os.path.expanduser(value) == value:
        raise ConfigError(
            f"{name} is {value}, but there is no home folder {value.partition('/')[0]}: write the path out, or put "
            "./ before a name that begins so."
        )


def check_apart(config: Any, *names: str) -> None:
    """Nothing that a run starts from may lie in the folder that it writes, and with overwrite clears."""
    for name in names:
        check_apart_from(config, name, getattr(config, name))


def check_apart_from(config: Any, name: str, value: str) -> None:
    output = Path(config.output_dir).expanduser().resolve()
    sources = [path.expanduser().resolve() for path in listed(value) or [Path(value)]]
    if any(output in (source, *source.parents) for source in sources):
        raise ConfigError(
            f"output_dir {config.output_dir} holds the {name} {value} that the run starts from: give another output_dir."
        )


def judge_for(judge: str, data: str) -> str | None:
    """The judge that a setting means for ``data``; None for none."""
    if judge == "auto":
        return JUDGE if data == JUDGED_DATA else None
    return None if judge == "none" else judge


def check_judge(judge: str, data: str, cure: str = "use judge none, or another reward model") -> None:
    if judge == JUDGE and data != JUDGED_DATA:
        raise ConfigError(f"judge {JUDGE} knows {JUDGED_DATA} only: for other data {cure}.")


def check_trackers(config: Any) -> None:
    for name in config.report_to:
        if name not in TRACKERS:
            raise ConfigError(
                f"report_to names {name!r}, which is none of {', '.join(TRACKERS)}.{nearest(name, TRACKERS)}"
            )


def check_sampling(config: Any) -> None:
    positive(config, "max_new_tokens")
    not_negative(config, "top_k", "temperature")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, not {config.top_p}.")


def check_output(config: Any) -> None:
    filled(config, "output_dir")
    if config.overwrite and getattr(config, "resume", False):
        raise ConfigError("overwrite and resume contradict each other: give one of the two.")
