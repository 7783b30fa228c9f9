"""Win rates and their intervals: by hand, against naive loops, on data whose answer is known, and how often they are right."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from reinforcepp.reports.comparison import statistics
from reinforcepp.reports.comparison.statistics import (
    MIN_DECIDED,
    Rate,
    compare,
    length_controlled_rates,
    length_terms,
    win_rates,
)


def outcome(scores_a, scores_b, lengths_a=None, lengths_b=None, **settings):
    """``compare`` on plain lists, one sample of each prompt; without lengths all are equal."""
    shaped = []
    for values in (scores_a, scores_b, lengths_a, lengths_b):
        given = np.ones_like(shaped[0]) if values is None else np.asarray(values, dtype=float)
        shaped.append(given.reshape(len(given), -1))
    return compare(*shaped, **({"margin": 0.0, "resamples": 400, "seed": 0} | settings))


def test_the_error_of_a_ratio_is_its_scatter():
    draw = np.random.default_rng(0)
    found, ratios = [], []
    for _ in range(400):
        sizes = draw.integers(5, 50, 60).astype(float)
        parts = sizes * draw.gamma(2, 0.05, 60)
        found.append(statistics.ratio_error(parts, sizes))
        ratios.append(parts.sum() / sizes.sum())
    assert np.mean(found) == pytest.approx(np.std(ratios), rel=0.1)
    assert statistics.ratio_error(np.array([2.0]), np.array([4.0])) == 0


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_wins_ties_and_losses_are_those_of_b():
    found = outcome([0.1, 0.5, 0.9, 0.2], [0.4, 0.5, 0.3, 0.9])
    assert (found.wins, found.ties, found.losses, found.decided, found.prompts) == (2, 1, 1, 3, 4)
    assert found.win_rate.value == (2 + 0.5) / 4


def test_the_margin_is_the_largest_difference_that_is_a_tie():
    scores = ([0.0, 0.0, 0.0], [0.25, -0.25, 0.5])
    found = outcome(*scores, margin=0.25)
    assert (found.wins, found.ties, found.losses) == (1, 2, 0)
    found = outcome(*scores, margin=0.2)
    assert (found.wins, found.ties, found.losses) == (2, 0, 1)


def test_samples_of_a_prompt_are_compared_one_by_one_and_decided_together():
    # The first prompt is won once and lost once, so on the whole it is tied; the second is won and tied.
    found = outcome([[0, 1], [0, 0]], [[1, 0], [1, 0]])
    assert (found.prompts, found.wins, found.ties, found.losses, found.decided) == (2, 2, 1, 1, 1)
    assert found.win_rate.value == pytest.approx((0.5 + 0.75) / 2)


def test_a_prompt_counts_as_often_as_it_was_drawn():
    wins_PS = np.array([[1, 0.5], [0, 0], [0.5, 1]])
    weights_RP = np.array([[1, 1, 1], [3, 0, 0], [0, 2, 1]])
    naive = []
    for weights in weights_RP:
        drawn = [value for wins, times in zip(wins_PS, weights, strict=True) for value in list(wins) * times]
        naive.append(sum(drawn) / len(drawn))
    assert win_rates(wins_PS, weights_RP.astype(float)) == pytest.approx(naive)


def test_length_is_measured_in_deviations_from_equal_length():
    gaps = [10.0, -30.0, 80.0, 20.0]
    deviation = math.sqrt(sum((gap - 20) ** 2 for gap in gaps) / 3)
    assert length_terms(np.array([gaps])) == pytest.approx(np.array([[math.tanh(gap / deviation) for gap in gaps]]))
    assert (
        length_terms(np.full((3, 1), 7.0)) == 0
    ).all()  # a constant length difference can't be separated from quality
    assert (length_terms(np.array([[7.0]])) == 0).all()


@pytest.mark.parametrize(("longer", "shorter", "expected"), [(0.75, 0.25, 0.5), (0.9, 0.5, 0.75), (0.8, 0.8, 0.8)])
def test_the_rate_at_equal_length_by_hand(longer, shorter, expected):
    """With two lengths only, the fit goes through both shares, and at 0 it is halfway between their logits."""
    number = 2000
    wins = np.array([[share * number > i] for share in (longer, shorter) for i in range(number)], dtype=float)
    terms = np.repeat([[0.8], [-0.8]], number, axis=0)
    assert length_controlled_rates(wins, terms, np.ones((1, 2 * number))) == pytest.approx([expected], abs=1e-4)


def test_the_fit_is_that_of_a_naive_descent():
    draw = random.Random(5)
    terms = [draw.uniform(-1, 1) for _ in range(30)]
    labels = [draw.choice([0.0, 0.5, 1.0]) if draw.random() < 0.5 else float(term > 0) for term in terms]
    weights = [float(draw.randrange(4)) for _ in range(15)]
    theta = phi = 0.0
    for _ in range(20_000):
        slope_theta, slope_phi = statistics.RIDGE * theta, statistics.RIDGE * phi
        for place, (term, label) in enumerate(zip(terms, labels, strict=True)):
            fault = weights[place // 2] * (sigmoid(theta + phi * term) - label)  # two samples of each prompt
            slope_theta += fault
            slope_phi += fault * term
        theta, phi = theta - 0.03 * slope_theta, phi - 0.03 * slope_phi
    shaped = (np.array(values).reshape(15, 2) for values in (labels, terms))
    rates = length_controlled_rates(*shaped, np.array([weights]))
    assert rates == pytest.approx([sigmoid(theta)], abs=1e-9)


@pytest.mark.parametrize("side", [0.0, 1.0])
def test_one_side_that_always_wins_has_a_rate_too(side):
    draw = np.random.default_rng(0)
    terms = np.tanh(draw.normal(size=(400, 1)))
    rates = length_controlled_rates(np.full((400, 1), side), terms, np.ones((1, 400)))
    assert np.isfinite(rates).all() and rates == pytest.approx([side], abs=1e-3)
    # A judge of nothing but length separates the two perfectly; at equal length nothing is left.
    terms = np.concatenate([terms, -terms])
    assert length_controlled_rates((terms > 0) * 1.0, terms, np.ones((1, 800))) == pytest.approx([0.5], abs=1e-6)


# --- on data whose answer is known ------------------------------------------------------------------------------------


def drawn(prompts: int, theta: float, phi: float, extra: float, seed: int = 0, samples: int = 1):
    """Scores and lengths where B is preferred with probability sigmoid(theta + phi tanh(gap / deviation))."""
    draw = np.random.default_rng(seed)
    gaps = np.round(draw.normal(extra, 40, (prompts, samples)))
    wins = draw.random(gaps.shape) < 1 / (1 + np.exp(-(theta + phi * np.tanh(gaps / gaps.std()))))
    return 1.0 - wins, wins * 1.0, np.full(gaps.shape, 300.0), 300.0 + gaps


def test_a_judge_that_likes_length_is_seen_through():
    found = outcome(*drawn(800, theta=0.0, phi=2.5, extra=40))
    assert found.winner == "B" and found.win_rate.value > 0.7
    assert found.length_controlled_winner is None
    assert found.length_controlled.value == pytest.approx(0.5, abs=0.06)
    assert found.longer > 0.8


def test_quality_stays_at_equal_length():
    found = outcome(*drawn(400, theta=1.5, phi=0.0, extra=0))
    assert found.winner == found.length_controlled_winner == "B"
    assert found.win_rate.value == pytest.approx(sigmoid(1.5), abs=0.05)
    assert found.length_controlled.value == pytest.approx(sigmoid(1.5), abs=0.05)


def test_quality_shows_under_a_judge_that_likes_the_others_length():
    found = outcome(*drawn(800, theta=1.0, phi=3.0, extra=-40))
    assert found.winner == "A" and found.length_controlled_winner == "B"


def test_equal_responses_tie_exactly():
    scores, lengths = [0.3, 0.9, 0.1] * 20, [5, 90, 40] * 20
    found = outcome(scores, scores, lengths, lengths)
    assert (found.wins, found.ties, found.losses, found.decided) == (0, 60, 0, 0)
    assert found.win_rate == found.length_controlled == Rate(0.5, 0.5, 0.5)
    assert found.winner is None and found.length_controlled_winner is None


@pytest.mark.parametrize("samples", [1, 3])
def test_swapping_the_models_mirrors_everything(samples):
    a, b, length_a, length_b = drawn(60, theta=0.7, phi=1.0, extra=20, samples=samples)
    one, other = outcome(a, b, length_a, length_b), outcome(b, a, length_b, length_a)
    assert (one.wins, one.longer, one.winner) == (other.losses, other.shorter, "B") and other.winner == "A"
    for name in ("win_rate", "length_controlled"):
        rate, mirrored = getattr(one, name), getattr(other, name)
        assert (rate.value, rate.low, rate.high) == pytest.approx(
            (1 - mirrored.value, 1 - mirrored.high, 1 - mirrored.low), abs=1e-9
        )


@pytest.mark.parametrize("wins", range(1, 9))
def test_a_handful_of_prompts_is_inconclusive(wins):
    """Of resamples of a clean sweep none is otherwise, however short it is."""
    found = outcome([0.0] * wins + [0.0] * 3, [1.0] * wins + [0.0] * 3)
    if wins < MIN_DECIDED:
        assert found.winner is found.length_controlled_winner is None
    assert outcome([0.0] * wins, [1.0] * wins).winner == (None if wins < MIN_DECIDED else "B")


def test_the_interval_decides():
    assert Rate(0.6, 0.51, 0.7).winner == "B" and Rate(0.4, 0.3, 0.49).winner == "A"
    for low, high in ((0.5, 0.7), (0.3, 0.5), (0.4, 0.6), (0.5, 0.5), (0.5 + 1e-12, 0.7)):
        assert Rate(0.55, low, high).winner is None


# --- the intervals ----------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_interval():
    data = drawn(50, theta=0.3, phi=1.0, extra=10)
    assert outcome(*data, seed=3) == outcome(*data, seed=3)
    assert outcome(*data, seed=3).win_rate != outcome(*data, seed=4).win_rate


def test_parts_of_the_resamples_are_all_of_them(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_CELLS", 70)
    seen = []
    parts = statistics.resampled(lambda weights: (seen.append(weights), weights[:, 0])[1], (10, 2), 8, seed=0)
    assert [len(weights) for weights in seen] == [3, 3, 2] and len(parts) == 8
    assert all((weights.sum(axis=1) == 10).all() for weights in seen)


def test_the_interval_is_binomial_without_other_variance():
    found = outcome([0.0] * 60 + [1.0] * 40, [1.0] * 60 + [0.0] * 40, resamples=4000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (found.win_rate.low, found.win_rate.high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.015)


def test_repeated_samples_do_not_narrow_the_interval():
    a, b, *lengths = drawn(100, theta=0.4, phi=0.0, extra=0)
    one = outcome(a, b, *lengths)
    four = outcome(*(np.repeat(values, 4, axis=1) for values in (a, b, *lengths)))
    assert (four.win_rate.low, four.win_rate.high) == pytest.approx((one.win_rate.low, one.win_rate.high), abs=0.02)


def coverage(rate: str, truth: float, make) -> float:
    """How often the interval of ``rate`` holds the truth, over 300 data sets."""
    held = 0
    for seed in range(300):
        found = getattr(outcome(*make(seed), seed=seed), rate)
        held += found.low - 1e-9 <= truth <= found.high + 1e-9
    return held / 300


@pytest.mark.full  # takes 10 seconds
def test_the_interval_of_the_win_rate_holds_the_truth_in_19_of_20_cases():
    """Each prompt has its own chance, Beta(3, 2), so its four samples are alike; over prompts the mean is 0.6."""

    def make(seed):
        draw = np.random.default_rng(seed)
        wins = (draw.random((80, 4)) < draw.beta(3, 2, (80, 1))) * 1.0
        return 1 - wins, wins

    assert 0.92 <= coverage("win_rate", 0.6, make) <= 0.98


@pytest.mark.full  # takes 4 seconds
def test_the_interval_at_equal_length_holds_the_truth_in_19_of_20_cases():
    assert 0.92 <= coverage("length_controlled", sigmoid(0.4), lambda seed: drawn(100, 0.4, 1.5, 20, seed)) <= 0.98
