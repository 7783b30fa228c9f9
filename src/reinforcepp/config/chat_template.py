"""Settings of what is written round prompts and answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class Framing:
    """The frame; it is stored with the trained model and used wherever that answers."""

    chat_template: str | None = None
    """File with a chat template (Jinja), or the template itself. Default: the model's own; a base model has a plain one."""
    system_prompt: str | None = None
    """What every conversation begins with; it becomes a part of the stored template."""


def check_framing(config: Any) -> None:
    """Check these settings of a configuration."""
    for name in ("chat_template", "system_prompt"):
        value = getattr(config, name)
        if value is not None and not value.strip():
            raise ConfigError(f"{name} is empty: leave it out, or give a text.")
