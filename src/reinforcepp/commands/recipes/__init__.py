"""Configuration files that ship with the package, each for one kind of machine or task; the verb lists and copies them.

A recipe is a file for ``train --config`` and, where a reward model comes before it, ``NAME.reward.yaml`` for ``reward``.
What is told of it is in the comment that it begins with: a sentence, then lines of ``Hardware:``, ``Plan:``, ``First:``
and ``Start:``. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from reinforcepp.config import RecipesConfig
from reinforcepp.errors import ConfigError, nearest
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.monitoring import echo

FOLDER = Path(__file__).parent
REWARD = ".reward"
ENDING = ".yaml"
FACT = re.compile(r"# (Hardware|Plan|First|Start): +(.+)")


@dataclass(frozen=True)
class Recipe:
    """A recipe, and what its comment says."""

    name: str
    about: str
    """One sentence."""
    hardware: str
    commands: tuple[str, ...]
    """What is to be run, one after another."""
    plan: str
    """The command that tells whether it fits."""


def names() -> list[str]:
    """All recipes."""
    return sorted(path.stem for path in FOLDER.glob(f"*{ENDING}") if not path.stem.endswith(REWARD))


def text_of(name: str) -> str:
    """The file of a recipe or, with ``.reward`` behind the name, of its reward model.

    Raises:
        ConfigError: there is none.
    """
    path = FOLDER / f"{name}{ENDING}"
    if path.parent != FOLDER or not path.is_file():
        raise ConfigError(f"There is no recipe {name!r}, only {', '.join(names())}.{nearest(name, names())}")
    return path.read_text(encoding="utf-8")


def read_recipe(name: str) -> Recipe:
    """What the comment of a recipe says.

    Raises:
        ConfigError: there is no such recipe, or it is the file of a reward model, which comes with another.
    """
    if name.endswith(REWARD) and name.removesuffix(REWARD) in names():
        raise ConfigError(f"{name} comes along with {name.removesuffix(REWARD)}: copy that.")
    comment = text_of(name).partition("\n\n")[0].splitlines()
    facts = {match[1]: match[2] for match in map(FACT.fullmatch, comment) if match}
    about = " ".join(line.removeprefix("# ") for line in comment[: comment.index("#")])
    commands = tuple(facts[step] for step in ("First", "Start") if step in facts)
    return Recipe(name, about, facts["Hardware"], commands, facts["Plan"])


def run_recipes(config: RecipesConfig) -> None:
    """List the recipes, show one, or copy one to where it can be changed.

    Raises:
        ConfigError: there is no such recipe, or its copy would replace a file.
    """
    if config.action == "list":
        print("\n\n".join(told(read_recipe(name)) for name in names()))
        print("\nCopy one to change and start it: reinforcepp recipes copy NAME")
    elif config.action == "show":
        print(text_of(str(config.name)), end="")
    else:
        copy(str(config.name), config.file, overwrite=config.overwrite)


def told(recipe: Recipe) -> str:
    """A recipe in some lines."""
    steps = [f"  {'then ' if place else 'start'}  {step}" for place, step in enumerate(recipe.commands)]
    return "\n".join([recipe.name, f"  {recipe.about}", f"  needs  {recipe.hardware}", *steps])


def copy(name: str, file: str | None, *, overwrite: bool) -> list[Path]:
    """Write a recipe, and that of its reward model beside it, under the name ``file``; returns the files.

    The commands in their comments name the copies.
    """
    recipe = read_recipe(name)
    target = check_output_file(file or f"{name}{ENDING}", "file")
    stem = target.name.removesuffix(ENDING)
    copies = {target: text_of(name)}
    if (FOLDER / f"{name}{REWARD}{ENDING}").is_file():
        copies[target.with_name(f"{stem}{REWARD}{ENDING}")] = text_of(f"{name}{REWARD}")
    there = [path for path in copies if path.exists()]
    if there and not overwrite:
        raise ConfigError(f"{there[0]} is there already: give another file, or --overwrite to replace it.")
    for path, text in copies.items():
        with whole_file(path) as written:
            written.write(_renamed(text, name, target))
    steps = " && ".join(_renamed(step, name, target) for step in recipe.commands)
    echo(f"Wrote {' and '.join(map(str, copies))}, for {recipe.hardware}. To start: {steps}")
    return list(copies)


def _renamed(text: str, name: str, target: Path) -> str:
    """``text`` with the names of the copies for those of the recipe."""
    reward = str(target.with_name(target.name.removesuffix(ENDING) + REWARD + ENDING))
    return text.replace(f"{name}{REWARD}{ENDING}", reward).replace(f"{name}{ENDING}", str(target))
