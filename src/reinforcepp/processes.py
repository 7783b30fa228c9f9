"""What a launcher (torchrun, accelerate launch) says of the processes it has started; needs no torch."""

from __future__ import annotations

import os


def started() -> int:
    """How many processes do this job together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this is the one that writes files and talks to the user."""
    return started() == 1 or int(os.environ.get("RANK") or 0) == 0
