"""Each figure against numbers worked out by hand, and what has to hold for any pairs."""

import math
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scored import pair, pairs

from reinforcepp.reports.reward_model import analyze
from reinforcepp.reports.reward_model import metrics as f
from reinforcepp.types import ScoredPair

# --- how often it is right --------------------------------------------------------------------------------------------


def test_a_pair_is_right_wrong_or_a_tie_that_counts_half():
    assert [f.correctness(m) for m in (0.1, -0.1, 0.0)] == [1.0, 0.0, 0.5]
    assert f.share_right(pairs([1, 2, -1, 0])).value == pytest.approx(2.5 / 4)


# Of Wilson's interval as tables and other programs give it.
@pytest.mark.parametrize(
    ("cases", "count", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
        (1, 1, 0.2065493, 1.0),
    ],
)
def test_wilsons_interval(cases, count, low, high):
    found = f.share(cases, count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)
    assert (found.count, found.value) == (count, cases / count)


def test_wilsons_interval_holds_the_share():
    for count in range(1, 60):
        for cases in range(2 * count + 1):
            found = f.share(cases / 2, count)
            assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_difference_of_two_shares():
    """Newcombe 1998, table II, method 10: 56/70 against 48/80, and 10/10 against 0/10."""
    assert f.difference(f.share(56, 70), f.share(48, 80)) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert f.difference(f.share(10, 10), f.share(0, 10)) == pytest.approx((0.6075, 1.0), abs=1e-4)


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_quantiles_are_of_equal_size_and_in_order():
    assert f.quantiles([6, 1, 4, 3, 2, 5], 3) == [[1, 4], [2, 3], [0, 5]]
    assert f.quantiles([1, 2, 3, 4, 5], 2) == [[0, 1, 2], [3, 4]]


def test_equal_values_stay_in_one_quantile():
    assert f.quantiles([1, 1, 1, 1, 2, 3], 3) == [[0, 1, 2, 3], [4, 5]]
    assert f.quantiles([7, 7, 7], 3) == [[0, 1, 2]]


def test_accuracy_by_margin():
    """40 pairs are two buckets: margins to 0.2 are right in 15 of 20, those to 4.0 in all but one, wrong by 4.0."""
    small = [0.1] * 15 + [-0.2] * 5
    large = [3.0] * 19 + [-4.0]
    low, high = f.by_margin(pairs(large + small))
    assert (low.label, low.right) == ("0.10 to 0.20", f.share(15, 20))
    assert (high.label, high.right) == ("3.00 to 4.00", f.share(19, 20))


def test_small_margins_have_labels_that_differ():
    assert [b.label for b in f.by_margin(pairs([0.00011] * 20 + [0.012] * 20))] == [
        "0.00011 to 0.00011",
        "0.012 to 0.012",
    ]


def test_there_are_as_many_buckets_as_there_are_pairs_for():
    counts = {number: len(f.by_margin(pairs(range(number)))) for number in (1, 39, 40, 99, 100, 1000)}
    assert counts == {1: 1, 39: 1, 40: 2, 99: 4, 100: 5, 1000: 5}
    assert len(f.by_length([pair(length=i) for i in range(1000)])) == 4


def test_accuracy_by_length():
    """The mean of both answers decides: 10 and 14 are 12."""
    short = [pair(1, 4, length=10)] * 10 + [pair(-1, 4, length=10)] * 10
    long = [pair(1, -4, length=30)] * 20
    low, high = f.by_length(long + short)
    assert (low.label, low.right) == ("12 to 12", f.share(10, 20))
    assert (high.label, high.right) == ("28 to 28", f.share(20, 20))


@pytest.mark.parametrize(
    ("chosen", "rejected", "label"),
    [
        (10, 10, "about as long"),
        (11, 10, "about as long"),
        (10, 11, "about as long"),
        (112, 100, "longer"),
        (111, 100, "longer"),
        (100, 111, "shorter"),
        (15, 10, "longer"),
        (10, 15, "shorter"),
        (16, 10, "much longer"),
        (10, 16, "much shorter"),
        (5, 1, "much longer"),
    ],
)
def test_relative_length_labels(chosen, rejected, label):
    assert f.length_label(chosen, rejected) == label


def test_accuracy_by_length_difference():
    """A model that takes the longer answer is right where the chosen one is longer, and only there."""
    found = f.by_length_difference(pairs([-9, -2, 0, 2, 9, 9], [-9, -2, 0, 2, 9, 9]))
    assert [(b.label, b.right.count, b.right.value) for b in found] == [
        ("much shorter", 1, 0),
        ("shorter", 1, 0),
        ("about as long", 1, 0.5),
        ("longer", 1, 1),
        ("much longer", 2, 1),
    ]


# --- calibration ------------------------------------------------------------------------------------------------------


def test_confidence():
    assert f.confidence(0) == 0.5
    assert f.confidence(math.log(3)) == f.confidence(-math.log(3)) == pytest.approx(0.75)
    assert f.confidence(-1e9) == pytest.approx(1)


def test_the_calibration_curve():
    """Odds of 3 to 1 are a confidence of 0.75, right in 2 of 4; a certain pair is right; a tie is 0.5 and half right."""
    three = math.log(3) + 1e-9  # into the bin that begins at 0.75
    tie, quarter, certain = f.calibration([three, three, -three, -three, 60, 0])
    assert (tie.confidence, tie.right) == (0.5, f.share(0.5, 1))
    assert (quarter.confidence, quarter.right) == (pytest.approx(0.75), f.share(2, 4))
    assert (certain.confidence, certain.right) == (pytest.approx(1), f.share(1, 1))
    assert f.calibration_error([three, three, -three, -three, 60, 0]) == pytest.approx(4 / 6 * 0.25)


def test_the_bins_are_of_equal_width():
    """Confidences 0.51, 0.549 and 0.551: 0.55 is the only border between them."""
    margins = [math.log(c / (1 - c)) for c in (0.51, 0.549, 0.551)]
    assert [b.right.count for b in f.calibration(margins)] == [2, 1]
    assert [b.confidence for b in f.calibration(margins)] == pytest.approx([0.5295, 0.551])


def test_bins_of_few_pairs_are_joined():
    """Three bins of 2, 1 and 4 margins, in each of them the same ones."""
    low, middle, high = (math.log(c / (1 - c)) for c in (0.61, 0.77, 0.99))
    margins = [high, low, -high, middle, -low, high, high]
    assert [b.right.count for b in f.calibration(margins)] == [2, 1, 4]
    first, second = f.calibration(margins, least=3)
    assert (first.confidence, first.right) == (pytest.approx((0.61 * 2 + 0.77) / 3), f.share(2, 3))
    assert (second.confidence, second.right) == (pytest.approx(0.99), f.share(3, 4))
    assert [b.right.count for b in f.calibration(margins, least=2)] == [2, 5]
    assert [b.right.count for b in f.calibration(margins, least=5)] == [7], "what is left over joins the last"
    assert [b.right.count for b in f.calibration(margins, least=99)] == [7]
    ten = pairs([low] * 9 + [high] * 10)
    assert [b.right.count for b in analyze(ten).calibration] == [19]
    assert [b.right.count for b in analyze([*ten, pair(low)]).calibration] == [10, 10]


def test_calibration_error():
    assert f.calibration_error([50.0, 50.0]) == pytest.approx(0, abs=1e-6)
    assert f.calibration_error([-50.0, 50.0]) == pytest.approx(0.5, abs=1e-6)
    confidence = 1 / (1 + math.exp(-1))
    assert f.calibration_error([1.0, 1.0, 1.0, -1.0]) == pytest.approx(abs(confidence - 0.75))


# --- scores and lengths -----------------------------------------------------------------------------------------------


def test_ranks_are_shared_by_equal_values():
    assert f.ranks([10, 30, 20]) == [1, 3, 2]
    assert f.ranks([5, 1, 5, 5, 9]) == [3, 1, 3, 3, 5]


def test_correlations_of_score_and_length():
    """Scores are the lengths' cubes: the same order, but no straight line. Chosen are 3 and 2, rejected 1 and 4 long."""
    scored = [ScoredPair(0, "", "", "", 27, 1, 3, 1), ScoredPair(1, "", "", "", 8, 64, 2, 4)]
    found = analyze(scored)
    assert found.rank_correlation == pytest.approx(1)
    # deviations -24, 2, -17, 39 and -1.5 to 1.5
    assert found.metrics.length_correlation == pytest.approx(104 / math.sqrt(2390 * 5))
    flipped = [ScoredPair(0, "", "", "", -27, -1, 3, 1), ScoredPair(1, "", "", "", -8, -64, 2, 4)]
    assert analyze(flipped).rank_correlation == pytest.approx(-1)
    assert analyze(flipped).metrics.length_correlation == pytest.approx(-104 / math.sqrt(2390 * 5))


def test_the_slope_is_the_score_of_a_token():
    assert f.length_slope(pairs([2, 4], [1, 2])) == pytest.approx(22 / 11)  # through (11, 2), (12, 4) and twice (10, 0)
    assert f.length_slope(pairs([3, -1])) == 0


def test_accuracy_without_length():
    """The scores are twice the length, and one more for the chosen answer of the first pair, less for the second."""
    lengths = [(14, 10), (10, 14), (18, 10), (10, 18)]
    scored = [ScoredPair(i, "", "", "", 2.0 * a, 2.0 * b, a, b) for i, (a, b) in enumerate(lengths)]
    assert f.accuracy_without_length(scored) == 0.5
    assert f.share_right(scored).value == 0.5
    taught = [ScoredPair(i, "", "", "", 2.0 * a + 1, 2.0 * b, a, b) for i, (a, b) in enumerate(lengths)]
    assert f.accuracy_without_length(taught) == 1
    assert f.share_right(taught).value == 0.5
    inverted = [ScoredPair(i, "", "", "", 2.0 * a - 1, 2.0 * b, a, b) for i, (a, b) in enumerate(lengths)]
    assert f.accuracy_without_length(inverted) == 0


def test_rounding_does_not_decide_where_length_is_all():
    scored = [
        ScoredPair(i, "", "", "", math.fsum([0.1] * a), 0.1 * b, a, b)
        for i, (a, b) in enumerate((random.Random(3).choices(range(5, 90), k=2)) for _ in range(50))
    ]
    assert f.accuracy_without_length(scored) == 0.5


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_the_summary():
    found = f.summary(pairs([2, -1, 0, 3], [1, 1, -1, 0]))
    assert (found.pairs, found.accuracy, found.ties, found.mean_margin) == (4, 2.5 / 4, 1, 1)
    assert found.longer_wins == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert found.mean_score == pytest.approx(0.5)
    assert found.score_std == pytest.approx(math.sqrt((4 + 1 + 9) / 8 - 0.25))


def test_worst_errors_are_wrong_and_the_worst_first():
    found = f.worst_errors(pairs([-1, 5, -3, 0, -2, -3]), 3)
    assert [(p.row, p.margin) for p in found] == [(2, -3), (5, -3), (4, -2)]
    assert f.worst_errors(pairs([1, 0])) == []


def test_longer_and_shorter_refer_to_the_chosen_response():
    found = analyze(pairs([1, 1, -1, 1, 1], [3, 1, -1, -5, 0]))
    assert found.longer == f.share(2, 2) and found.shorter == f.share(1, 2)
    assert analyze(pairs([1])).longer is analyze(pairs([1])).shorter is None


margins = st.sampled_from([-30.0, -2.5, -1.0, -0.25, 0.0, 0.25, 1.0, 2.5, 30.0]) | st.floats(-9, 9, width=32)
some = st.lists(st.builds(pair, margins, st.integers(-8, 8), base=margins, length=st.integers(9, 30)), min_size=1)


@given(some)
def test_every_pair_is_in_one_bucket_of_each_kind(scored):
    found = analyze(scored)
    parts = [found.by_margin, found.by_length_difference, found.by_length, found.calibration]
    for buckets in parts:
        counts = [b.right.count for b in buckets]
        assert sum(counts) == len(scored) and min(counts) > 0
        mean = sum(b.right.count * b.right.value for b in buckets) / len(scored)
        assert mean == pytest.approx(found.metrics.accuracy)
    assert found.right.value == pytest.approx(found.metrics.accuracy)
    assert 0 <= found.right.low <= found.right.value <= found.right.high <= 1
    assert found.confidence == pytest.approx(
        fmean(b.confidence for b in found.calibration for _ in range(b.right.count))
    )


@given(some, st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_matter(scored, random):
    shuffled = scored[:]
    random.shuffle(shuffled)
    one, other = analyze(scored), analyze(shuffled)
    assert [(b.label, b.right) for b in one.by_margin] == [(b.label, b.right) for b in other.by_margin]
    assert [(b.label, b.right) for b in one.by_length] == [(b.label, b.right) for b in other.by_length]
    assert [p.margin for p in one.worst] == [p.margin for p in other.worst]


@given(some)
def test_swapping_chosen_and_rejected_turns_everything_around(scored):
    swapped = [
        ScoredPair(
            p.row, p.prompt, p.rejected, p.chosen, p.rejected_score, p.chosen_score, p.rejected_length, p.chosen_length
        )
        for p in scored
    ]
    one, other = analyze(scored), analyze(swapped)
    assert other.metrics.accuracy == pytest.approx(1 - one.metrics.accuracy)
    assert other.metrics.longer_wins == pytest.approx(1 - one.metrics.longer_wins)
    assert other.without_length == pytest.approx(1 - one.without_length)
    assert other.rank_correlation == pytest.approx(one.rank_correlation)
    assert other.confidence == pytest.approx(one.confidence)
    turned = {
        b.label.replace("shorter", "LONGER").replace("longer", "shorter").lower() for b in one.by_length_difference
    }
    assert turned == {b.label for b in other.by_length_difference}
