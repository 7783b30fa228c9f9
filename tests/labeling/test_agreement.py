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


def test_the_order_of_two_answers_means_nothing():
    """Preferences agree as much, whichever answer a unit holds first: in files of pairs, the better one is always first."""
    rng = random.Random(0)
    sorted_units = [(1, 1 if rng.random() < 0.9 else -1) for _ in range(500)]
    signs = [rng.choice([1, -1]) for _ in sorted_units]
    mixed = [tuple(sign * value for value in unit) for sign, unit in zip(signs, sorted_units, strict=True)]
    assert krippendorff_alpha(sorted_units) < 0.1, "plain alpha expects that labelers prefer the first answer"
    alpha = krippendorff_alpha(sorted_units, mirrored=True)
    assert alpha == pytest.approx(krippendorff_alpha(mixed, mirrored=True))
    assert alpha == pytest.approx(krippendorff_alpha(mixed), abs=0.02)
    assert alpha == pytest.approx(0.8, abs=0.05), "1 - 0.1 / 0.5"
    assert krippendorff_alpha([(1, 1), (1, 1)], mirrored=True) == 1.0
