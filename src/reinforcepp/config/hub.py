"""Names and settings of uploads to the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from reinforcepp.config.base import FilledStr
from reinforcepp.config.shared import CheckpointConfig
from reinforcepp.errors import ConfigError

REPOSITORY = r"[\w][\w.-]*(/[\w][\w.-]*)?"
"""A name on the Hub, as a regular expression."""


def check_repository(setting: str, name: str) -> None:
    """Check that ``name`` is valid for a repository, with or without its owner.

    Raises:
        ConfigError: It isn't.
    """
    if not re.fullmatch(REPOSITORY, name, re.ASCII) or ".." in name or "--" in name or name[-1] in ".-":
        raise ConfigError(
            f"{setting}: {name!r} isn't a valid name on the Hugging Face Hub. Give letters, digits, '-', '_' and '.', as in "
            "USER/NAME."
        )


@dataclass(frozen=True)
class HubConfig(CheckpointConfig):
    """Where a run is saved, and where its model is uploaded; with the names of transformers."""

    push_to_hub: bool = False
    """Upload the model to the Hugging Face Hub when training ends"""
    hub_model_id: FilledStr | None = None
    """Repository for the model: USER/NAME, or NAME. Default: output_dir's name"""
    hub_private_repo: bool | None = None
    """Whether that repository is private. Default: as set in your account"""

    @property
    def repository(self) -> str:
        """Name of the repository on the Hub."""
        return self.hub_model_id or Path(self.output_dir).expanduser().absolute().name

    def _check_rules(self) -> None:
        if self.push_to_hub or self.hub_model_id:
            check_repository("hub_model_id", self.repository)
