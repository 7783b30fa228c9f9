"""The verdict on a reward model, and that it claims no more than the pairs allow."""

import pytest
from scored import pair, pairs

from reinforcepp.reports.reward_model import analyze
from reinforcepp.reports.reward_model import verdict as v
from reinforcepp.reports.reward_model.metrics import share


def verdict(scored, train_accuracy=None):
    return v.verdict(analyze(scored), train_accuracy)


def balanced(right, wrong, *, margin=1.0, other=None):
    """Return right and wrong pairs; in every second one of each kind, the chosen response is the longer one."""
    other = margin if other is None else other
    return [pair(margin, (-1) ** i, row=i) for i in range(right)] + [
        pair(-other, (-1) ** i, row=right + i) for i in range(wrong)
    ]


def test_a_good_model():
    assert verdict(balanced(100, 0, margin=6)) == (
        "Good: accuracy 1.00 on 100 held-out pairs (95% interval 0.96 to 1.00); no length bias; well calibrated."
    )


@pytest.mark.parametrize(
    ("right", "wrong", "beginning"),
    [
        (80, 20, "Good: accuracy 0.80 "),
        (790, 210, "Good: accuracy 0.79 "),
        (78, 22, "Usable: accuracy 0.78 "),  # the interval begins at 0.69
        (65, 35, "Usable: accuracy 0.65 "),
        (590, 410, "Near chance (a policy trained against it won't improve): accuracy 0.59 "),
        (500, 500, "Near chance (a policy trained against it won't improve): accuracy 0.50 "),
        (45, 55, "Near chance (a policy trained against it won't improve): accuracy 0.45 "),
        (30, 70, "Worse than chance (are chosen and rejected swapped?): accuracy 0.30 "),
        (12, 8, "Inconclusive (too few held-out pairs): accuracy 0.60 on 20 "),
        (19, 0, "Inconclusive (too few held-out pairs): accuracy 1.00 on 19 "),
        (20, 0, "Good: accuracy 1.00 on 20 "),
        (0, 1, "Inconclusive (too few held-out pairs): accuracy 0.00 on 1 held-out pair ("),
    ],
)
def test_verdicts(right, wrong, beginning):
    assert verdict(balanced(right, wrong)).startswith(beginning)


def test_too_few_pairs_give_no_other_statement():
    assert verdict(balanced(5, 0)).endswith("(95% interval 0.57 to 1.00).")
    assert verdict(balanced(5, 0)).count(";") == 0


# --- length -----------------------------------------------------------------------------------------------------------


def by_length(longer, shorter, equal=(0, 0)):
    """Return the length bias for (right, wrong) pairs whose chosen response is longer, shorter, and equally long."""
    margins, lengths = [], []
    for (right, wrong), more in ((longer, 3), (shorter, -3), (equal, 0)):
        margins += [1.0] * right + [-1.0] * wrong
        lengths += [more] * (right + wrong)
    return v.length_bias(analyze(pairs(margins, lengths))).text


def test_a_model_that_only_sees_length_matches_the_baseline():
    assert by_length((60, 0), (0, 40)) == "no better than choosing the longer response (0.60)"
    assert by_length((0, 40), (60, 0)) == "no better than choosing the shorter response (0.60)"


def test_a_length_biased_model_with_some_other_signal():
    assert by_length((50, 0), (12, 38)) == (
        "length-biased: chooses the longer response (accuracy 1.00 if the chosen response is longer, 0.24 if it is shorter)"
    )
    assert by_length((12, 38), (50, 0)) == (
        "length-biased: chooses the shorter response (accuracy 1.00 if the chosen response is shorter, 0.24 if it is longer)"
    )


def test_a_length_biased_model_is_doubtful_at_any_accuracy():
    margins, lengths = [1.0] * 91 + [-1.0] * 9, [3] * 90 + [-3] * 10
    assert verdict(pairs(margins, lengths)).startswith("Doubtful: accuracy 0.91 on 100 ")
    only_length = pairs([1.0] * 90 + [-1.0] * 10, lengths)
    assert verdict(only_length).startswith("Doubtful: accuracy 0.90 on 100 ")
    leaning = pairs([1.0] * 96 + [-1.0] * 4, lengths)  # 6 of 10 right if the chosen response is shorter
    assert verdict(leaning).startswith("Good: accuracy 0.96 on 100 ") and "; leans towards" in verdict(leaning)
    assert [v.is_sound(analyze(one)) for one in (pairs(margins, lengths), only_length, leaning)] == [False, False, True]


def test_is_sound():
    given = [balanced(80, 20), balanced(65, 35), balanced(50, 50), balanced(30, 70), balanced(5, 0)]
    assert [v.is_sound(analyze(one)) for one in given] == [True, True, False, False, False]


def test_a_weak_length_bias():
    assert by_length((49, 1), (35, 15)) == (
        "leans towards the longer response (accuracy 0.98 if the chosen response is longer, 0.70 if it is shorter)"
    )
    assert by_length((50, 0), (20, 30)).startswith("leans towards"), "0.40 of 50 is not significantly below 0.5"
    assert by_length((35, 15), (49, 1)).startswith("leans towards the shorter response (accuracy 0.98 if")


def test_a_small_difference_is_not_a_length_bias():
    assert by_length((950, 50), (890, 110)) == "no length bias"  # significant, but small
    assert by_length((46, 4), (40, 10)) == "no length bias"  # larger, but not significant
    assert by_length((20, 30), (20, 30)) == "no length bias"  # inaccurate rather than biased


@pytest.mark.parametrize(
    ("longer", "shorter"),
    [((4, 1), (3, 2)), ((90, 0), (2, 1)), ((1, 0), (0, 0)), ((0, 0), (1, 0)), ((9, 0), (10, 10)), ((12, 3), (10, 5))],
)
def test_too_few_pairs_to_measure_length_bias(longer, shorter):
    assert by_length(longer, shorter, equal=(99, 1)) == ("too few pairs of unequal length to measure the length bias")


# --- confidence -------------------------------------------------------------------------------------------------------


def calibration(*given, **named):
    return v.calibration_part(analyze(balanced(*given, **named)))


def test_confidence():
    assert calibration(75, 25, margin=1.0986) == "well calibrated"
    assert calibration(75, 25, margin=5) == "overconfident (confidence 0.99, accuracy 0.75)"
    assert calibration(95, 5, margin=0.5) == "underconfident (confidence 0.62, accuracy 0.95)"


# --- training pairs ---------------------------------------------------------------------------------------------------


def test_overfitting_is_reported():
    scored = balanced(80, 20)
    assert verdict(scored, 1.0).endswith("; overfit (accuracy 1.00 on its training pairs).")
    assert "overfit" not in verdict(scored, 0.89) + verdict(scored) + verdict(balanced(5, 0), 1.0)
    assert "overfit" not in verdict(balanced(16, 4), 0.91), "the interval reaches it"


def test_enough_pairs_rule_out_chance_or_a_good_model():
    assert v.is_too_few(share(20, 36)) and not v.is_too_few(share(200, 360))
    assert v.is_too_few(share(19, 19)) and not v.is_too_few(share(20, 20))
