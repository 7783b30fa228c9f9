"""Statistics of an optimizer step, from its micro-batches on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from reinforcepp.distributed.ranks import Ranks

LOG_RATIO = "log_ratio_max"
SMALLEST = ("clip_ratio/low_min", "sampling/importance_sampling_ratio/min")
EXTREMES = (LOG_RATIO, "clip_ratio/high_max", "sampling/importance_sampling_ratio/max", *SMALLEST)
"""Statistics that are combined by minimum (``SMALLEST``) or maximum instead of by sum."""


class UpdateStats:
    """Collects the statistics of micro-batches, scalar tensors, without waiting for the device."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, stats: Mapping[str, Tensor], weight: float) -> None:
        """Add those of a micro-batch; rows with ``weight`` 0 are repeated and don't count."""
        for name, value in stats.items():
            if name not in EXTREMES:
                self._totals[name] = self._totals.get(name, torch.zeros_like(value)) + value * weight
                continue
            smallest = name in SMALLEST
            counted = value if weight else torch.full_like(value, math.inf if smallest else -math.inf)
            extreme = torch.minimum if smallest else torch.maximum
            self._totals[name] = extreme(self._totals.get(name, counted), counted)

    def combine(self, ranks: Ranks) -> dict[str, float]:
        """Return the statistics over all ranks."""
        signs = {name: -1 if name in SMALLEST else 1 for name in self._totals if name in EXTREMES}
        sums = {name: total for name, total in self._totals.items() if name not in signs}
        largest = ranks.max(torch.stack([sign * self._totals[name] for name, sign in signs.items()])).tolist()
        return {
            **dict(zip(sums, ranks.sum(torch.stack(list(sums.values()))).tolist(), strict=True)),
            **{name: sign * value for (name, sign), value in zip(signs.items(), largest, strict=True)},
        }
