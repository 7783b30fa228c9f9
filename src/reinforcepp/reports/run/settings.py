"""A run's settings beside the defaults, and what it takes to do the run again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from reinforcepp.config import VERBS, ReinforceConfig, as_dict
from reinforcepp.monitoring.run_record import RunRecord

WHERE = ("output_dir", "overwrite", "resume", "allow_changes")  # of this one run, not of what it did
VERB_OF = {config.__name__: verb for verb, config in VERBS.items()}


@dataclass(frozen=True)
class Setting:
    """A setting as the run had it; ``default`` is as text, None where the defaults aren't known."""

    name: str
    value: str
    default: str | None

    @property
    def differs(self) -> bool:
        """Whether it is another one than the default, and says something about the run."""
        return self.default is not None and self.value != self.default and self.name not in WHERE


@dataclass(frozen=True)
class Recipe:
    """How to do a run again: the command, and the file that it reads."""

    command: str
    yaml: str


def settings_of(record: RunRecord) -> list[Setting]:
    """All settings of a run, in the order in which they are declared."""
    defaults = defaults_of(record.facts.get("kind"))
    return [
        Setting(name, shown(value), shown(defaults[name]) if defaults is not None and name in defaults else None)
        for name, value in record.settings.items()
    ]


def defaults_of(kind: str | None) -> dict[str, Any] | None:
    """The defaults of the configuration of this name; None if there is none in this version."""
    known = {config.__name__: config for config in (*VERBS.values(), ReinforceConfig)}
    return as_dict(known[kind]()) if kind in known else None


def differing(records: Mapping[str, RunRecord]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, each with the value of every run."""
    names = dict.fromkeys(name for record in records.values() for name in record.settings if name not in WHERE)
    rows = [(name, [_or_dash(record.settings, name) for record in records.values()]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def recipe(record: RunRecord) -> Recipe | None:
    """How to do the run again on the command line; None for one that another program started."""
    import yaml

    kind = str(record.facts.get("kind"))
    verb, defaults = VERB_OF.get(kind), defaults_of(kind)
    if verb is None or defaults is None:
        return None
    known = {field.name for field in fields(VERBS[verb])}
    kept = {name: value for name, value in record.settings.items() if name in known and name not in WHERE}
    # A file can't say that a setting is off whose default is not.
    off = [name for name, value in kept.items() if value is None and defaults[name] is not None]
    flags = "".join(f" --{name} None" for name in off)
    text = yaml.safe_dump(
        {name: value for name, value in kept.items() if value is not None}, sort_keys=False, allow_unicode=True
    )
    return Recipe(f"reinforcepp {verb} --config run.yaml --output_dir runs/again{flags}", text)


def shown(value: Any) -> str:
    """A setting's value as it would be written on the command line."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


def _or_dash(settings: Mapping[str, Any], name: str) -> str:
    return shown(settings[name]) if name in settings else "-"
