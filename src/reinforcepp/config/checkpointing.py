"""Settings of what a run keeps, and how it goes on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from reinforcepp.config._checks import check_output, not_negative, positive
from reinforcepp.errors import ConfigError, nearest
from reinforcepp.run_dir import RENAMED_SETTINGS

INPUTS = ("model", "data", "reward_model")
"""What a run starts from; it may have changed under the same name."""


@dataclass(frozen=True)
class Keeping:
    """What a training, of a policy or a reward model, keeps."""

    output_dir: str = "runs/train"
    """Folder for everything the run writes."""
    save_every: int = 50
    """Steps between checkpoints; 0 keeps only the one written when a signal stops the run."""
    keep_last: int = 2
    """Checkpoints to keep, counted from the last."""
    keep_best: str | None = None
    """Keep the checkpoint with the highest value of this metric, too, whatever its age; with a - before it, the lowest."""
    max_skipped_updates: int = 3
    """Updates in a row that may be left out because a value isn't finite or a ratio is too large; one more stops the run."""
    watchdog_seconds: float = 1800.0
    """Without progress for so long the run ends, with every thread's stack in stacks.txt; 0 is never."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    resume: bool | str = False
    """Go on from the last checkpoint in output_dir, or from the one whose folder is given."""
    allow_changes: str | None = None
    """Settings, with commas between them, that a resumed run is meant to have otherwise than when it was stopped."""

    @property
    def checkpoints_at_most(self) -> int:
        """Checkpoints that are on the disk at a time, the one being written among them."""
        return self.keep_last + (self.keep_best is not None) + 1 if self.save_every else 1

    @property
    def allowed_changes(self) -> list[str]:
        """The names in allow_changes."""
        names = [name.strip() for name in (self.allow_changes or "").split(",")]
        return [RENAMED_SETTINGS.get(name, name) for name in names if name]


def check_keeping(config: Any) -> None:
    """Check these settings of a configuration."""
    check_output(config)
    not_negative(config, "save_every", "max_skipped_updates", "watchdog_seconds")
    positive(config, "keep_last")
    if config.resume == "":
        raise ConfigError("resume is empty: leave the path out for the last checkpoint.")
    if config.keep_best is not None and not config.keep_best.strip("- "):
        raise ConfigError("keep_best is empty: give the name of a metric, for example reward.")
    if config.keep_best is not None and not config.save_every:
        raise ConfigError("keep_best chooses among checkpoints, but save_every is 0: set it to a number of steps.")
    known = {field.name for field in fields(config)} | set(INPUTS)
    for name in config.allowed_changes:
        if name not in known:
            raise ConfigError(f"allow_changes names {name!r}, which is no setting.{nearest(name, known)}")
    if config.allowed_changes and not config.resume:
        raise ConfigError("allow_changes matters only to a run that is resumed: add --resume.")
