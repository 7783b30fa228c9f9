"""A run's settings compared with the defaults, and the command that reproduces the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reinforcepp.config import ReinforceConfig, RewardModelConfig, SftConfig, TrainConfig, as_dict
from reinforcepp.config.values import accepted_values
from reinforcepp.monitoring.run_record import RunRecord

PER_RUN = (
    *("output_dir", "overwrite", "resume", "allow_changes"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
)
"""Settings that don't change the result of a run."""
TRAININGS: dict[str, type[TrainConfig | RewardModelConfig | SftConfig]] = {
    "sft": SftConfig,
    "reward": RewardModelConfig,
    "train": TrainConfig,
}
"""Commands that train, with their configurations."""
CHOSEN_BY_MODEL = {"learning_rate": "by model size"}
"""Defaults that a training chooses, and how."""
COMMAND_OF = {config.__name__: command for command, config in TRAININGS.items()}


@dataclass(frozen=True)
class Setting:
    """A setting of the run as text; ``default`` is None if the defaults aren't known."""

    name: str
    value: str
    default: str | None

    @property
    def differs(self) -> bool:
        """Whether the value isn't the default and affects the result of the run."""
        return self.default is not None and self.value != self.default and self.name not in PER_RUN


@dataclass(frozen=True)
class ReproduceCommand:
    """The command that reproduces a run, and the YAML file that it reads, in which ``***`` stands for each secret."""

    command: str
    yaml: str


def settings_of(record: RunRecord) -> list[Setting]:
    """Return all settings of a run, in the order of their declaration."""
    defaults = defaults_of(record.facts.get("kind")) or {}
    found = []
    for name, value in record.settings.items():
        default = shown(defaults[name]) if name in defaults else None
        if value is not None and default == "None":
            default = CHOSEN_BY_MODEL.get(name, default)
        found.append(Setting(name, shown(value), default))
    return found


def defaults_of(kind: str | None) -> dict[str, Any] | None:
    """Return the defaults of the configuration ``kind``, or None if this version has none."""
    known = {config.__name__: config for config in (*TRAININGS.values(), ReinforceConfig)}
    return as_dict(known[kind]()) if kind in known else None


def differing(records: Mapping[str, RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between runs, each with the value of every run."""
    names = dict.fromkeys(name for record in records.values() for name in record.settings if name not in PER_RUN)
    rows = [(name, [_or_dash(record.settings, name) for record in records.values()]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def reproduce(record: RunRecord) -> ReproduceCommand | None:
    """Return the command that reproduces the run, or None if the run was started from Python."""
    import yaml

    kind = str(record.facts.get("kind"))
    command, defaults = COMMAND_OF.get(kind), defaults_of(kind)
    if command is None or defaults is None:
        return None
    known = accepted_values(TRAININGS[command])
    kept = {name: value for name, value in record.settings.items() if name in known and name not in PER_RUN}
    # A YAML file can't turn off a setting whose default is on, so these settings become flags.
    off = [name for name, value in kept.items() if value is None and defaults[name] is not None]
    flags = "".join(f" --{name} None" for name in off)
    text = yaml.safe_dump(
        {name: value for name, value in kept.items() if value is not None}, sort_keys=False, allow_unicode=True
    )
    return ReproduceCommand(f"reinforcepp {command} --config run.yaml --output_dir runs/again{flags}", text)


def shown(value: Any) -> str:
    """Return a setting's value as on the command line."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


def _or_dash(settings: Mapping[str, Any], name: str) -> str:
    return shown(settings[name]) if name in settings else "-"
