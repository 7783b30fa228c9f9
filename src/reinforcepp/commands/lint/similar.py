"""Near-duplicate texts: exact Jaccard similarity of word 3-grams, with an inverted index.

Shingles (3-grams) are ordered by frequency, the rarest first. Two sets with a similarity of at least t share at least t of
each set's shingles, so they share one of the first n - ceil(t n) + 1 of both. Only those are looked up (the prefix filter of
Chaudhuri et al., A Primitive Operator for Similarity Joins, ICDE 2006). The filter misses no match and leaves few others to
compare.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from reinforcepp.data import normalize, words

SHINGLE_WORDS = 3
_TOLERANCE = 1e-9


class Match(NamedTuple):
    """The text at ``position`` resembles the earlier one at ``other``."""

    position: int
    other: int
    similarity: float


def shingles(texts: Sequence[str]) -> list[str]:
    """Return the distinct word 3-grams of the texts, marked with the column; a shorter text is one shingle."""
    found: list[str] = []
    for column, text in enumerate(texts):
        listed = words(text) or [normalize(text)]
        last = max(1, len(listed) - SHINGLE_WORDS + 1)
        found += [f"{column} {' '.join(listed[i : i + SHINGLE_WORDS])}" for i in range(last)]
    return list(dict.fromkeys(found))


def near_duplicates(texts: Sequence[Sequence[str]], threshold: float) -> list[Match]:
    """Return one match for each text that resembles an earlier one."""
    inverted = _InvertedIndex([shingles(each) for each in texts], threshold)
    found = []
    for index in range(len(texts)):
        match = inverted.find(index)
        if match is not None:
            found.append(match)
        inverted.add(index)
    return found


def across(texts: Sequence[str], others: Sequence[str], threshold: float) -> list[Match]:
    """Return one match for each of ``texts`` that resembles one of ``others``, with the indices in the two lists."""
    inverted = _InvertedIndex([shingles([each]) for each in (*others, *texts)], threshold)
    for index in range(len(others)):
        inverted.add(index)
    matches = [inverted.find(len(others) + index) for index in range(len(texts))]
    return [match._replace(position=match.position - len(others)) for match in matches if match is not None]


class _InvertedIndex:
    """Maps each of the rarest shingles of a text to the texts that contain it."""

    def __init__(self, sets: Sequence[Sequence[str]], threshold: float) -> None:
        frequency = Counter(shingle for each in sets for shingle in each)
        # A shingle of a single text counts for its size and comes first in the order, but can't lead to another text.
        shared = sorted((shingle for shingle, number in frequency.items() if number > 1), key=frequency.__getitem__)
        rank = {shingle: position for position, shingle in enumerate(shared)}
        self._threshold = threshold
        self._sizes = [len(each) for each in sets]
        self._sets = [frozenset(rank[shingle] for shingle in each if shingle in rank) for each in sets]
        self._holders: defaultdict[int, list[int]] = defaultdict(list)

    def add(self, index: int) -> None:
        """Add a text, so that later texts can match it."""
        for rank in self._prefix(index):
            self._holders[rank].append(index)

    def find(self, index: int) -> Match | None:
        """Return a match with an added text, if any."""
        shingles, size = self._sets[index], self._sizes[index]
        low, high = self._threshold * size - _TOLERANCE, size / self._threshold + _TOLERANCE
        seen: set[int] = set()
        for rank in self._prefix(index):
            for other in self._holders[rank]:
                if other in seen or not low <= self._sizes[other] <= high:
                    continue
                seen.add(other)
                common = len(shingles & self._sets[other])
                similarity = common / (size + self._sizes[other] - common)
                if similarity >= self._threshold - _TOLERANCE:
                    return Match(index, other, similarity)
        return None

    def _prefix(self, index: int) -> list[int]:
        size, shared = self._sizes[index], self._sets[index]
        looked_up = size - math.ceil(self._threshold * size - _TOLERANCE) + 1
        return sorted(shared)[: max(0, looked_up - (size - len(shared)))]
