"""The command `migrate`: print the settings of a training of TRL, OpenRLHF or verl as YAML for `reinforcepp train`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from reinforcepp.commands.migrate.reading import TITLES, Training, read_training
from reinforcepp.commands.migrate.translation import Translation, translate
from reinforcepp.config import MigrateConfig, TrainConfig
from reinforcepp.config.aliases import plain
from reinforcepp.errors import ConfigError
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.runtime.terminal import echo, print_output, printable


def run_migrate(config: MigrateConfig) -> None:
    """Print or write the YAML file.

    Raises:
        ConfigError: the source can't be read, or holds no training.
    """
    source = Path(config.file).expanduser()
    output = check_output_file(config.output) if config.output is not None else None
    training = read_training(source, config.source)
    translation = translate(training)
    problem = _problem(translation.settings)
    text = as_yaml(source, training, translation, problem)
    if output is None:
        print_output(text, end="")
    else:
        with whole_file(output) as file:
            file.write(text)
        echo(f"Saved the settings to {output}", "green")
    if translation.notes:
        echo(
            f"Settings that aren't part of it: {len(translation.notes)}. The comments at its end give the reasons.",
            "yellow",
        )
    if problem is not None:
        echo(f"The settings need a change before training: {problem}", "yellow")
    else:
        echo(f"Check them with: reinforcepp train --config {output or 'FILE'} --dry_run")


def _problem(settings: dict[str, Any]) -> str | None:
    """Return why the settings aren't valid as they are, if they aren't."""
    try:
        TrainConfig(**settings)
    except ConfigError as error:
        return str(error)
    return None


def as_yaml(source: Path, training: Training, translation: Translation, problem: str | None = None) -> str:
    """Return the settings that differ from our defaults as YAML, each with its origin, and the notes as comments."""
    return printable("\n".join(_lines(source, training, translation, problem)) + "\n")


def _lines(source: Path, training: Training, translation: Translation, problem: str | None) -> Iterator[str]:
    framework = TITLES[training.framework]
    yield _comment(f"Settings of `reinforcepp train`, translated from {source.name} ({framework}).")
    if problem is not None:
        yield _comment(f"Change before training: {problem}")
    settings = translation.settings
    for setting in fields(TrainConfig):
        name = setting.name
        if name in settings and settings[name] != setting.default:
            origin = translation.origins.get(name) or f"default of {framework}"
            yield f"{name}: {_scalar(settings[name])}  {_comment(origin)}"
    if translation.notes:
        yield ""
        yield "# Not part of these settings:"
        for name, reason in sorted(translation.notes.items()):
            yield _comment(f"{name}: {reason}")


def _comment(text: str) -> str:
    """Return a text as a comment on one line, so that a line break in it can't begin a setting."""
    return f"# {' '.join(text.split())}"


def _scalar(value: Any) -> str:
    """Return a value as YAML on one line."""
    import yaml

    value = plain(value)
    listed = list(value) if isinstance(value, tuple) else value
    return str(yaml.safe_dump(listed, default_flow_style=True, width=10_000)).removesuffix("...\n").strip()
