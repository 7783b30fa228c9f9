"""What a launcher (torchrun, accelerate launch) says of the processes it has started; needs no torch."""

from __future__ import annotations

import os


def started() -> int:
    """How many processes do this job together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this is the one that writes files and talks to the user."""
    return started() == 1 or int(os.environ.get("RANK") or 0) == 0


def is_first_here() -> bool:
    """Whether this is the first of the processes on its machine: it tells what can't be agreed on with other machines."""
    return int(os.environ.get("LOCAL_RANK") or 0) == 0
