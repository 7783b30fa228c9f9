"""Krippendorff's alpha against the values that its author published."""

from __future__ import annotations

import random

import pytest

from reinforcepp.labeling.agreement import interval, krippendorff_alpha, nominal

NONE = None
# Krippendorff (2011), section C: four observers, twelve units, with missing values. He gives 0.743 and 0.849.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]
UNITS = [[value for value in column if value is not None] for column in zip(*OBSERVERS, strict=True)]
# Section A: two observers, ten units with binary values. He gives 0.095.
BINARY = list(zip([0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0], strict=True))


@pytest.mark.parametrize(
    ("units", "distance", "alpha"), [(UNITS, nominal, 0.743), (UNITS, interval, 0.849), (BINARY, nominal, 0.095)]
)
def test_published_examples(units, distance, alpha):
    assert krippendorff_alpha(units, distance) == pytest.approx(alpha, abs=5e-4)


def test_limits():
    assert krippendorff_alpha([(0, 0), (1, 1)]) == 1.0
    assert krippendorff_alpha([(0, 1), (1, 0)]) == pytest.approx(-0.5)
    assert krippendorff_alpha([(1, 1), (1, 1)]) is None
    assert krippendorff_alpha([(1,), ()]) is None
    rng = random.Random(0)
    assert abs(krippendorff_alpha([[rng.randrange(3) for _ in range(3)] for _ in range(2000)])) < 0.05
