"""Scored pairs with given margins and lengths."""

from reinforcepp.types import ScoredPair


def pair(margin=1.0, longer=0, *, length=10, row=0, base=0.0, **texts):
    """Return a pair whose chosen response scores ``margin`` more and is ``longer`` tokens longer than ``length``."""
    given = {"prompt": f"p{row}", "chosen": f"c{row}", "rejected": f"r{row}"} | texts
    return ScoredPair(
        row=row,
        **given,
        chosen_score=base + margin,
        rejected_score=base,
        chosen_length=length + longer,
        rejected_length=length,
    )


def pairs(margins, longer=None):
    """Return one pair per margin, in order."""
    return [pair(m, more, row=i) for i, (m, more) in enumerate(zip(margins, longer or [0] * len(margins), strict=True))]
