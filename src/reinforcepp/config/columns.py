"""Settings of where in a data file what is, and how the file is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from reinforcepp.config._checks import fraction
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class Mapped:
    """Names of columns, all at once; ``TEXTS`` are those that have a setting of their own."""

    TEXTS: ClassVar[tuple[str, ...]] = ()

    columns: tuple[str, ...] = ()
    """Columns by other names, as in prompt=question chosen=better: the name wanted, and the file's. In a policy's training
    also what reward functions ask for, as in solution=answer."""
    heldout_fraction: float = 0.1
    """Share of the prompts kept out of training and used for the figures; built-in data brings its own split."""

    @property
    def column_names(self) -> dict[str, Any]:
        """The names, as whatever reads data takes them."""
        named = self._named
        return {f"{name}_column": named.get(name, getattr(self, f"{name}_column")) for name in self.TEXTS}

    @property
    def renamed(self) -> dict[str, str]:
        """Columns of the file by the names that reward functions know them by."""
        return {name: column for name, column in self._named.items() if name not in self.TEXTS}

    @property
    def _named(self) -> dict[str, str]:
        return dict(text.split("=", 1) for text in self.columns)


@dataclass(frozen=True)
class Columns(Mapped):
    """Names of the data file's columns."""

    TEXTS = ("prompt", "chosen", "rejected")

    prompt_column: str = "prompt"
    """Column with the prompt."""
    chosen_column: str = "chosen"
    """Column with the preferred answer."""
    rejected_column: str = "rejected"
    """Column with the answer that was not preferred."""


@dataclass(frozen=True)
class Reading(Columns):
    """How the data is read."""

    streaming: bool = False
    """For data larger than memory: check every row in one pass over the files and keep the rows on the disk, where each is
    read when its turn comes; they need about as much room in TMPDIR as the files have."""


def check_columns(config: Mapped) -> None:
    """Check the names of columns and the share that is held out."""
    fraction(config, "heldout_fraction")
    seen: set[str] = set()
    for text in config.columns:
        name, equals, column = text.partition("=")
        if not (name.strip() and equals and column.strip()):
            raise ConfigError(f"columns takes NAME=COLUMN, as in prompt=question, not {text!r}.")
        if name in seen:
            raise ConfigError(f"columns names {name} twice: leave one of them out.")
        if name in config.TEXTS and getattr(config, f"{name}_column") != name:
            raise ConfigError(
                f"{name}_column and columns both say which column holds the {name}: leave one of them out."
            )
        seen.add(name)
