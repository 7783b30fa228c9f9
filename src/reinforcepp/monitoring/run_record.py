"""The record of a run, read from its folder for the report and the doctor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reinforcepp.errors import ConfigError
from reinforcepp.monitoring import EVENTS, read_metrics
from reinforcepp.run_dir import FINISHED, MARKS, REWARD_CARD, RUN_FILE, rename_settings
from reinforcepp.runtime.redaction import without_secrets

METRICS, EVALUATION = "metrics.jsonl", "evaluation.json"


@dataclass(frozen=True)
class RunRecord:
    """The logged data of a finished or running training.

    ``facts`` are the entries of run.json other than the settings: ``kind`` of the settings, ``num_steps``, ``prompts``,
    ``heldout_prompts``, ``inputs`` (fingerprints), ``rewards`` (name, and the card of a trained reward model),
    ``environment`` (versions, hardware, device), ``command`` and ``started``. ``metrics`` has one mapping per step,
    ``evaluations`` has metrics by name: before, step N, after.
    """

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, float]] = ()
    evaluations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    events: Sequence[Mapping[str, str]] = ()

    def series(self, name: str) -> list[float]:
        """Return the values of a metric, from the steps that have it."""
        return [m[name] for m in self.metrics if name in m]

    @property
    def reward_cards(self) -> list[Mapping[str, Any]]:
        """Cards of the trained reward models among the rewards."""
        return [reward["card"] for reward in self.facts.get("rewards", ()) if reward.get("card")]

    @property
    def is_sft(self) -> bool:
        """Whether the run was SFT instead of RL."""
        return self.facts.get("kind") == "SftConfig"

    @property
    def finished(self) -> bool:
        """Whether all steps are finished, or a callback ended the training."""
        if FINISHED in self.facts:
            return True
        return bool(self.metrics) and self.metrics[-1]["step"] >= self.facts.get("num_steps", float("inf"))


def find_run(name: str) -> Path:
    """Return the run folder for ``name``: the folder itself, or ``policy`` within a demo's folder.

    Raises:
        ConfigError: The folder doesn't contain a run.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{name}: folder not found. Pass the output_dir of a training.")
    if (folder / REWARD_CARD).is_file():
        raise ConfigError(
            f"{name}: the folder is a reward model, not a policy training. Show it with `reinforcepp report {name}`."
        )
    for candidate in (folder, folder / "policy"):
        if (candidate / RUN_FILE).is_file() and (candidate / METRICS).is_file():
            if read_run(candidate).is_sft:
                raise ConfigError(
                    f"{name}: the folder is an SFT run, not a policy training. See {candidate / METRICS} and "
                    f"{candidate / EVALUATION}."
                )
            return candidate
    marked = [mark for mark in MARKS if (folder / mark).is_file()]
    why = "it has no steps yet" if marked else f"it has no {RUN_FILE}"
    raise ConfigError(f"{name}: the folder isn't a training run ({why}). Pass the output_dir of a training.")


def read_run(folder: Path) -> RunRecord:
    """Read everything except the completions, see ``completion_log``; secrets that earlier versions wrote are replaced.

    Raises:
        ConfigError: A file is damaged.
    """
    facts = _read(folder / RUN_FILE)
    settings = rename_settings(facts.pop("settings", {}))
    try:
        metrics = read_metrics(folder)
        events = without_secrets([json.loads(line) for line in _lines(folder / EVENTS)])
    except ValueError as error:
        raise ConfigError(f"{folder}: the log is damaged ({error}).") from error
    return RunRecord(folder, settings, facts, metrics, _read(folder / EVALUATION), events)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(without_secrets(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: the file is damaged ({error}).") from error


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
