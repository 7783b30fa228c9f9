"""The command ``recipes``: list and copy the configuration files of the package, each for one kind of hardware or task.

A recipe is a file for ``train --config`` and, if a reward model comes first, ``NAME.reward.yaml`` for ``reward``. Its
description is the comment at its beginning: a sentence, then lines of ``Hardware:``, ``Plan:``, ``First:`` and
``Start:``. This module imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from reinforcepp.config import RecipesConfig
from reinforcepp.errors import ConfigError, nearest
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.runtime.terminal import echo, print_output

FOLDER = Path(__file__).parent
REWARD = ".reward"
ENDING = ".yaml"
FACT = re.compile(r"# (Hardware|Plan|First|Start): +(.+)")


@dataclass(frozen=True)
class Preset:
    """The description of a recipe, from its comment."""

    name: str
    about: str
    """One sentence."""
    hardware: str
    commands: tuple[str, ...]
    """Commands to run, one after another."""
    plan: str
    """Command that checks whether the training fits into memory."""


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob(f"*{ENDING}") if not path.stem.endswith(REWARD))


def text_of(name: str) -> str:
    """Return the file of a recipe or, with ``.reward`` after the name, of its reward model.

    Raises:
        ConfigError: If the recipe doesn't exist.
    """
    path = FOLDER / f"{name}{ENDING}"
    if path.parent != FOLDER or not path.is_file():
        raise ConfigError(f"name: recipe {name!r} not found.{nearest(name, names())} Choose from {', '.join(names())}.")
    return path.read_text(encoding="utf-8")


def read_preset(name: str) -> Preset:
    """Return the description in the comment of a recipe.

    Raises:
        ConfigError: If the recipe doesn't exist, or is the file of a reward model, which comes with another.
    """
    if name.endswith(REWARD) and name.removesuffix(REWARD) in names():
        raise ConfigError(f"name: {name} is part of {name.removesuffix(REWARD)}. Copy that recipe.")
    comment = text_of(name).partition("\n\n")[0].splitlines()
    facts = {match[1]: match[2] for match in map(FACT.fullmatch, comment) if match}
    about = " ".join(line.removeprefix("# ") for line in comment[: comment.index("#")])
    commands = tuple(facts[step] for step in ("First", "Start") if step in facts)
    return Preset(name, about, facts["Hardware"], commands, facts["Plan"])


def run_recipes(config: RecipesConfig) -> None:
    """List the recipes, print one, or copy one to a file.

    Raises:
        ConfigError: If the recipe doesn't exist, or its copy would replace a file.
    """
    if config.action == "list":
        print_output("\n\n".join(format_preset(read_preset(name)) for name in names()))
        print_output("\nCopy a recipe to edit and start it: reinforcepp recipes copy NAME")
    elif config.action == "show":
        print_output(text_of(str(config.name)), end="")
    else:
        copy(str(config.name), config.file, overwrite=config.overwrite)


def format_preset(preset: Preset) -> str:
    """Return a recipe as a few lines of text."""
    steps = [f"  {'then ' if index else 'start'}  {step}" for index, step in enumerate(preset.commands)]
    return "\n".join([preset.name, f"  {preset.about}", f"  needs  {preset.hardware}", *steps])


def copy(name: str, file: str | None, *, overwrite: bool) -> list[Path]:
    """Write a recipe, and that of its reward model in the same folder, to ``file``, and return the files.

    The commands in their comments name the copies.
    """
    preset = read_preset(name)
    target = check_output_file(file or f"{name}{ENDING}", "file")
    stem = target.name.removesuffix(ENDING)
    copies = {target: text_of(name)}
    if (FOLDER / f"{name}{REWARD}{ENDING}").is_file():
        copies[target.with_name(f"{stem}{REWARD}{ENDING}")] = text_of(f"{name}{REWARD}")
    existing = [path for path in copies if path.exists()]
    if existing and not overwrite:
        raise ConfigError(f"file: {existing[0]} already exists. Give another file, or --overwrite to replace it.")
    for path, text in copies.items():
        with whole_file(path) as written:
            written.write(_renamed(text, name, target))
    steps = " && ".join(_renamed(step, name, target) for step in preset.commands)
    echo(f"Wrote {' and '.join(map(str, copies))}, for {preset.hardware}. To start: {steps}")
    return list(copies)


def _renamed(text: str, name: str, target: Path) -> str:
    """Return ``text`` with the names of the copies instead of those of the recipe."""
    reward = str(target.with_name(target.name.removesuffix(ENDING) + REWARD + ENDING))
    return text.replace(f"{name}{REWARD}{ENDING}", reward).replace(f"{name}{ENDING}", str(target))
