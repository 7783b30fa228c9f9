"""The adaptive KL coefficient against hand-computed values."""

import pytest

from reinforcepp.algorithm.kl import next_kl_coef


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.06, 0.1 * (1 + 0.2 * 64 / 1000)),  # relative error 0.2, the clipping limit
        (0.5, 0.1 * (1 + 0.2 * 64 / 1000)),
        (0.055, 0.1 * (1 + 0.1 * 64 / 1000)),
        (0.05, 0.1),
        (0.045, 0.1 * (1 - 0.1 * 64 / 1000)),
        (0.0, 0.1 * (1 - 0.2 * 64 / 1000)),
    ],
)
def test_hand_computed_values(kl, expected):
    assert next_kl_coef(0.1, kl, target=0.05, completions=64, horizon=1000) == pytest.approx(expected, rel=1e-12)


def test_it_never_becomes_negative():
    assert next_kl_coef(0.1, 0.0, target=0.05, completions=64, horizon=1) == 0.0
