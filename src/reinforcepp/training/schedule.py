"""The course of a learning rate: a linear rise to its peak, then down to zero or not at all."""

from __future__ import annotations

import math


def share_of_peak(step: int, *, kind: str, warmup: int, steps: int) -> float:
    """What a learning rate is multiplied with at optimiser step ``step`` of ``steps``, counted from 0.

    step / warmup while it rises; then, with t the share of the rest that is done, 1 (``constant``), 1 - t (``linear``)
    or (1 + cos πt) / 2 (``cosine``).
    """
    if step < warmup:
        return step / warmup
    done = min((step - warmup) / max(1, steps - warmup), 1.0)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind]
