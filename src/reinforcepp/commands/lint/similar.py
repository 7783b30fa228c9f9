"""Which texts resemble which: exact Jaccard similarity of word shingles, found through an inverted index.

Shingles are put in one order, the rarest first. Two sets whose similarity is at least t share t of each one's
shingles, so they share one of the first n - ceil(t n) + 1 of both; only those are looked up (the prefix filter of
Chaudhuri et al., A Primitive Operator for Similarity Joins, ICDE 2006). Nothing is missed, and hardly anything else is compared.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from reinforcepp.data import normalize, words

SHINGLE = 3  # words
_ROUNDING = 1e-9


class Match(NamedTuple):
    """The text at ``place`` resembles the earlier one at ``like``."""

    place: int
    like: int
    similarity: float


def shingles(texts: Sequence[str]) -> list[str]:
    """Distinct runs of three words of each text; those of different columns differ. A shorter text is one as a whole."""
    found: list[str] = []
    for column, text in enumerate(texts):
        listed = words(text) or [normalize(text)]
        last = max(1, len(listed) - SHINGLE + 1)
        found += [f"{column} {' '.join(listed[i : i + SHINGLE])}" for i in range(last)]
    return list(dict.fromkeys(found))


def near_duplicates(texts: Sequence[Sequence[str]], threshold: float) -> list[Match]:
    """For each of the texts that resembles an earlier one, one such match."""
    index = _Index([shingles(each) for each in texts], threshold)
    found = []
    for place in range(len(texts)):
        match = index.find(place)
        if match is not None:
            found.append(match)
        index.add(place)
    return found


def across(texts: Sequence[str], others: Sequence[str], threshold: float) -> list[Match]:
    """For each of ``texts`` that resembles one of the ``others``, one such match, with the places in the two lists."""
    index = _Index([shingles([each]) for each in (*others, *texts)], threshold)
    for place in range(len(others)):
        index.add(place)
    matches = [index.find(len(others) + place) for place in range(len(texts))]
    return [match._replace(place=match.place - len(others)) for match in matches if match is not None]


class _Index:
    """Sets of shingles by their rarest members."""

    def __init__(self, sets: Sequence[Sequence[str]], threshold: float) -> None:
        frequency = Counter(shingle for each in sets for shingle in each)
        # What only one text has counts for its size, and comes first in the order, but can't lead to another text.
        shared = sorted((shingle for shingle, number in frequency.items() if number > 1), key=frequency.__getitem__)
        rank = {shingle: place for place, shingle in enumerate(shared)}
        self._threshold = threshold
        self._sizes = [len(each) for each in sets]
        self._sets = [frozenset(rank[shingle] for shingle in each if shingle in rank) for each in sets]
        self._holders: defaultdict[int, list[int]] = defaultdict(list)

    def add(self, place: int) -> None:
        """Let later texts find this one."""
        for rank in self._prefix(place):
            self._holders[rank].append(place)

    def find(self, place: int) -> Match | None:
        """An added text that resembles this one, if there is any."""
        own, size = self._sets[place], self._sizes[place]
        low, high = self._threshold * size - _ROUNDING, size / self._threshold + _ROUNDING
        seen: set[int] = set()
        for rank in self._prefix(place):
            for other in self._holders[rank]:
                if other in seen or not low <= self._sizes[other] <= high:
                    continue
                seen.add(other)
                common = len(own & self._sets[other])
                similarity = common / (size + self._sizes[other] - common)
                if similarity >= self._threshold - _ROUNDING:
                    return Match(place, other, similarity)
        return None

    def _prefix(self, place: int) -> list[int]:
        size, shared = self._sizes[place], self._sets[place]
        looked_up = size - math.ceil(self._threshold * size - _ROUNDING) + 1
        return sorted(shared)[: max(0, looked_up - (size - len(shared)))]
