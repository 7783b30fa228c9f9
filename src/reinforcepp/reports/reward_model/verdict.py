"""The verdict on a reward model in one sentence, as certain as the number of held-out pairs allows."""

from __future__ import annotations

from typing import NamedTuple

from reinforcepp.reports.reward_model.metrics import Analysis, Share, difference

SOUND = ("Usable", "Good")
MIN_PAIRS, MIN_PAIRS_BY_LENGTH = 20, 10
USABLE, GOOD = 0.6, 0.7
"""Thresholds of the accuracy and of the lower end of its interval. Human annotators agree on about 0.7 of pairs."""
BIASED_GAP, VISIBLE_GAP = 0.1, 0.3
"""Gap between the accuracies with the longer and the shorter response chosen: from the first on, it is a length bias; a gap
up to the second can hide in a wide interval."""
OVERFIT_GAP = 0.1


class LengthBias(NamedTuple):
    """The length bias in words; ``decisive`` if length is all that a policy would learn from the scores."""

    text: str
    decisive: bool = False


UNKNOWN_BIAS = LengthBias("too few pairs of unequal length to measure the length bias")


def verdict(analysis: Analysis, train_accuracy: float | None = None) -> str:
    """``Good: accuracy 0.96 on 122 held-out pairs (95% interval 0.91 to 0.98); no length bias; ...``."""
    right = analysis.right
    pairs = "1 held-out pair" if right.count == 1 else f"{right.count} held-out pairs"
    known = f"accuracy {right.value:.2f} on {pairs} (95% interval {right.low:.2f} to {right.high:.2f})"
    parts = [f"{worth(analysis)}: {known}"]
    if not is_too_few(right):
        parts += [length_bias(analysis).text, calibration_part(analysis)]
        if train_accuracy is not None and train_accuracy > max(right.high, right.value + OVERFIT_GAP):
            parts.append(f"overfit (accuracy {train_accuracy:.2f} on its training pairs)")
    return "; ".join(parts) + "."


def is_sound(analysis: Analysis) -> bool:
    """Return whether the reward model is good enough to train a policy with."""
    return worth(analysis) in SOUND


def is_too_few(right: Share) -> bool:
    """Return whether the interval allows both chance and a good model."""
    return right.count < MIN_PAIRS or (right.low <= 0.5 and right.high >= GOOD)


def worth(analysis: Analysis) -> str:
    """Return the start of the verdict."""
    right = analysis.right
    if is_too_few(right):
        return "Inconclusive (too few held-out pairs)"
    if right.high < 0.5:
        return "Worse than chance (are chosen and rejected swapped?)"
    if right.low <= 0.5 or right.value < USABLE:
        return "Near chance (a policy trained against it won't improve)"
    if length_bias(analysis).decisive:
        return "Doubtful"
    return SOUND[right.low >= GOOD]


def length_bias(analysis: Analysis) -> LengthBias:
    """Return whether accuracy depends on which response is longer."""
    metrics, longer, shorter = analysis.metrics, analysis.longer, analysis.shorter
    for word, wins in (("longer", metrics.longer_wins), ("shorter", 1 - metrics.longer_wins)):
        if wins > 0.5 and wins >= metrics.accuracy:
            return LengthBias(f"no better than choosing the {word} response ({wins:.2f})", decisive=True)
    if longer is None or shorter is None or min(longer.count, shorter.count) < MIN_PAIRS_BY_LENGTH:
        return UNKNOWN_BIAS
    low, high = difference(longer, shorter)
    if low > 0 and longer.value - shorter.value >= BIASED_GAP:
        return _biased("longer", longer, shorter)
    if high < 0 and shorter.value - longer.value >= BIASED_GAP:
        return _biased("shorter", shorter, longer)
    return UNKNOWN_BIAS if max(-low, high) > VISIBLE_GAP else LengthBias("no length bias")


def _biased(word: str, better: Share, worse: Share) -> LengthBias:
    other = "shorter" if word == "longer" else "longer"
    decisive = worse.high < 0.5
    return LengthBias(
        f"{'length-biased: chooses' if decisive else 'leans towards'} the {word} response (accuracy {better.value:.2f} if the "
        f"chosen response is {word}, {worse.value:.2f} if it is {other})",
        decisive,
    )


def calibration_part(analysis: Analysis) -> str:
    """Return whether mean confidence matches accuracy."""
    confidence, right = analysis.confidence, analysis.right
    if right.low <= confidence <= right.high:
        return "well calibrated"
    word = "overconfident" if confidence > right.high else "underconfident"
    return f"{word} (confidence {confidence:.2f}, accuracy {right.value:.2f})"
