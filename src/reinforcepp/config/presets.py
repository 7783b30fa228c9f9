"""Settings of the commands that show the package at work: recipes and demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reinforcepp.config.base import Config, PositiveInt, Seed, check_output_dir
from reinforcepp.config.shared import DeviceConfig
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class RecipesConfig(Config):
    """List, show or copy the configuration files of the package."""

    action: Literal["list", "show", "copy"] = "list"
    """Action: list recipes, print a recipe, or copy it to a file"""
    name: str | None = None
    """Recipe to show or copy"""
    file: str | None = None
    """File for the copy; default: NAME.yaml in the working folder"""
    overwrite: bool = False
    """Replace files with this name"""

    def _check_rules(self) -> None:
        if self.action != "list" and not self.name:
            raise ConfigError(f"name: recipes {self.action} needs the name of a recipe. List them: reinforcepp recipes")
        if self.action == "list" and self.name:
            raise ConfigError(
                f"name: recipes list takes no name. Run recipes show {self.name}, or recipes copy {self.name}."
            )
        if self.file is not None and self.action != "copy":
            raise ConfigError(f"file is only for recipes copy. Run recipes copy {self.name} {self.file}.")


@dataclass(frozen=True)
class DemoConfig(DeviceConfig):
    """Run every stage offline on the built-in model and data: reward model, REINFORCE++, generation, comparison."""

    output_dir: str = "runs/demo"
    """Folder for everything the demo writes"""
    seed: Seed = 0
    """Seed of the reward model and of the training"""
    max_steps: PositiveInt = 125
    """Training steps of 64 completions"""
    rollout: Literal["auto", "transformers", "vllm"] = "transformers"
    """Rollout engine"""
    overwrite: bool = False
    """Replace an earlier demo in output_dir"""

    def _check_rules(self) -> None:
        check_output_dir(self.output_dir, self.overwrite)
