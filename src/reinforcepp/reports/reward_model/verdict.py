"""What a reward model is worth, in one sentence, and no surer than the number of held-out pairs allows."""

from __future__ import annotations

from typing import NamedTuple

from reinforcepp.reports.reward_model.figures import Analysis, Share, difference

SOUND = ("Usable", "Good")
ENOUGH_PAIRS, ENOUGH_OF_A_KIND = 20, 10
USABLE, GOOD = 0.6, 0.7
"""What accuracy has to reach, and the lower end of its interval; people agree with each other on about 0.7 of pairs."""
LEANING, UNTOLD = 0.1, 0.3
"""Gap between the accuracies by which answer is longer: from where on it matters, and from where on it must show."""
BY_HEART = 0.1


class Leaning(NamedTuple):
    """Whether scores go by length, in words; ``decisive`` where length is all that a policy would learn from them."""

    text: str
    decisive: bool = False


UNTOLD_LENGTH = Leaning("too few pairs of unequal length to tell whether it goes by length")


def verdict(analysis: Analysis, train_accuracy: float | None = None) -> str:
    """``Good: accuracy 0.96 on 122 held-out pairs (95 % interval 0.91 to 0.98); doesn't go by length; ...``."""
    right = analysis.right
    pairs = "1 held-out pair" if right.count == 1 else f"{right.count} held-out pairs"
    known = f"accuracy {right.value:.2f} on {pairs} (95 % interval {right.low:.2f} to {right.high:.2f})"
    parts = [f"{worth(analysis)}: {known}"]
    if not is_too_few(right):
        parts += [leaning(analysis).text, calibration_part(analysis)]
        if train_accuracy is not None and train_accuracy > max(right.high, right.value + BY_HEART):
            parts.append(f"learned by heart ({train_accuracy:.2f} on its training pairs)")
    return "; ".join(parts) + "."


def is_sound(analysis: Analysis) -> bool:
    """Whether a policy may be trained against it."""
    return worth(analysis) in SOUND


def is_too_few(right: Share) -> bool:
    """Whether a coin and a good model are both possible."""
    return right.count < ENOUGH_PAIRS or (right.low <= 0.5 and right.high >= GOOD)


def worth(analysis: Analysis) -> str:
    """The sentence's beginning."""
    right = analysis.right
    if is_too_few(right):
        return "Too few held-out pairs to tell"
    if right.high < 0.5:
        return "Worse than chance (are chosen and rejected swapped?)"
    if right.low <= 0.5 or right.value < USABLE:
        return "Near chance (a policy trained against it won't improve)"
    if leaning(analysis).decisive:
        return "Doubtful"
    return SOUND[right.low >= GOOD]


def leaning(analysis: Analysis) -> Leaning:
    """Is it right more often where the chosen answer is the longer one, or where it is the shorter one?"""
    figures, longer, shorter = analysis.figures, analysis.longer, analysis.shorter
    for word, wins in (("longer", figures.longer_wins), ("shorter", 1 - figures.longer_wins)):
        if wins > 0.5 and wins >= figures.accuracy:
            return Leaning(f"no better than taking the {word} answer ({wins:.2f})", decisive=True)
    if longer is None or shorter is None or min(longer.count, shorter.count) < ENOUGH_OF_A_KIND:
        return UNTOLD_LENGTH
    low, high = difference(longer, shorter)
    if low > 0 and longer.value - shorter.value >= LEANING:
        return _leaning("longer", longer, shorter)
    if high < 0 and shorter.value - longer.value >= LEANING:
        return _leaning("shorter", shorter, longer)
    return UNTOLD_LENGTH if max(-low, high) > UNTOLD else Leaning("doesn't go by length")


def _leaning(word: str, better: Share, worse: Share) -> Leaning:
    other = "shorter" if word == "longer" else "longer"
    decisive = worse.high < 0.5
    return Leaning(
        f"{'goes by length and takes' if decisive else 'leans towards'} the {word} answer ({better.value:.2f} right where "
        f"the chosen one is {word}, {worse.value:.2f} where it is {other})",
        decisive,
    )


def calibration_part(analysis: Analysis) -> str:
    """Whether it is as sure as it is right, on average."""
    sure, right = analysis.confidence, analysis.right
    if right.low <= sure <= right.high:
        return "as sure as it should be"
    word = "overconfident" if sure > right.high else "less sure than it could be"
    return f"{word} (sure to {sure:.2f}, right in {right.value:.2f})"
