"""Settings of the verb for recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reinforcepp.config._checks import check_values
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class RecipesConfig:
    """List, show or copy the configuration files that ship with the package: recipes copy NAME [FILE]."""

    action: Literal["list", "show", "copy"] = "list"
    """What to do: tell what there is, print a file, or write it to where it can be changed."""
    name: str | None = None
    """The recipe to show or copy."""
    file: str | None = None
    """What the copy is called. Default: NAME.yaml in the working folder."""
    overwrite: bool = False
    """Replace files of that name."""

    def __post_init__(self) -> None:
        """Check what belongs together."""
        check_values(self)
        if self.action != "list" and not self.name:
            raise ConfigError(f"recipes {self.action} needs the name of a recipe: reinforcepp recipes lists them.")
        if self.action == "list" and self.name:
            raise ConfigError(
                f"recipes list takes no name: give recipes show {self.name}, or recipes copy {self.name}."
            )
        if self.file is not None and self.action != "copy":
            raise ConfigError(f"file is where a recipe is copied to: give recipes copy {self.name} {self.file}.")
