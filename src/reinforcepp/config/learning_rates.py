"""Default learning rates, by training, model size, and full or LoRA training.

They follow from ``benchmarks/defaults.py``: the table "Best practices" in the documentation is written from its results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

Training = Literal["reward", "sft", "policy"]


class Rates(NamedTuple):
    """Peak learning rates of models of at most ``parameters``."""

    parameters: float
    full: float
    lora: float


DEFAULT_LEARNING_RATES: Mapping[Training, tuple[Rates, ...]] = {
    "reward": (Rates(50e6, 1e-4, 1e-3), Rates(200e6, 2e-5, 2e-4), Rates(3e9, 5e-6, 5e-5), Rates(math.inf, 2e-6, 2e-5)),
    "sft": (Rates(50e6, 1e-4, 1e-3), Rates(math.inf, 2e-5, 2e-4)),
    "policy": (Rates(50e6, 1e-4, 1e-3), Rates(200e6, 1e-5, 1e-4), Rates(math.inf, 1e-6, 1e-5)),
}


def default_learning_rate(training: Training, parameters: int, *, lora: bool) -> float:
    """Return the default peak learning rate of a model with ``parameters``."""
    rates = next(rates for rates in DEFAULT_LEARNING_RATES[training] if parameters <= rates.parameters)
    return rates.lora if lora else rates.full
