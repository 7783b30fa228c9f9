"""A training's folder as it is read again, by the report and by the doctor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reinforcepp.errors import ConfigError
from reinforcepp.monitoring import EVENTS, read_metrics
from reinforcepp.run_dir import MARKS, REWARD_CARD, RUN_FILE, rename_settings

METRICS, EVALUATION = "metrics.jsonl", "evaluation.json"


@dataclass(frozen=True)
class RunRecord:
    """What a training, finished or not, has told so far.

    ``facts`` is what run.json holds beside the settings: ``kind`` of the settings, ``num_steps``, ``prompts``,
    ``heldout_prompts``, ``inputs`` (fingerprints), ``rewards`` (name, and the card of a trained reward model),
    ``environment`` (versions, machine, device), ``command`` and ``started``. ``metrics`` has one mapping per step,
    ``evaluations`` the figures by name: before, step N, after.
    """

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, float]] = ()
    evaluations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    events: Sequence[Mapping[str, str]] = ()

    def series(self, name: str) -> list[float]:
        """A metric's values, at the steps that have it."""
        return [m[name] for m in self.metrics if name in m]

    @property
    def reward_cards(self) -> list[Mapping[str, Any]]:
        """The cards of the trained reward models among the rewards."""
        return [reward["card"] for reward in self.facts.get("rewards", ()) if reward.get("card")]

    @property
    def is_warm_up(self) -> bool:
        """Whether it was no RL but a supervised warm-up."""
        return self.facts.get("kind") == "SftConfig"

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return bool(self.metrics) and self.metrics[-1]["step"] >= self.facts.get("num_steps", float("inf"))


def find_run(name: str) -> Path:
    """The folder of a training that the user means by ``name``: itself, or the ``policy`` in what a demo wrote.

    Raises:
        ConfigError: if there is no training in it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {name}: give the output_dir of a training.")
    if (folder / REWARD_CARD).is_file():
        raise ConfigError(
            f"{name} is a reward model, not the training of a policy: reinforcepp report {name} shows it."
        )
    for candidate in (folder, folder / "policy"):
        if (candidate / RUN_FILE).is_file() and (candidate / METRICS).is_file():
            if read_run(candidate).is_warm_up:
                raise ConfigError(
                    f"{name} is a supervised warm-up, not the training of a policy: how it went is in {candidate / METRICS} "
                    f"and {candidate / EVALUATION}."
                )
            return candidate
    marked = [mark for mark in MARKS if (folder / mark).is_file()]
    why = "it holds no steps yet" if marked else f"it has no {RUN_FILE}"
    raise ConfigError(f"{name} is not the folder of a training ({why}): give the output_dir of one.")


def read_run(folder: Path) -> RunRecord:
    """Everything but the answers, which ``observe.answers`` reads.

    Raises:
        ConfigError: if a file is damaged.
    """
    told = _read(folder / RUN_FILE)
    settings = rename_settings(told.pop("settings", {}))
    try:
        metrics = read_metrics(folder)
        events = [json.loads(line) for line in _lines(folder / EVENTS)]
    except ValueError as error:
        raise ConfigError(f"The log in {folder} is damaged: {error}.") from error
    return RunRecord(folder, settings, told, metrics, _read(folder / EVALUATION), events)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}.") from error


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
