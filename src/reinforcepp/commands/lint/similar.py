"""Near-duplicate texts by the Jaccard similarity of word 3-grams.

MinHash and locality-sensitive hashing (LSH) find the candidates, so the time grows with the number of texts, not with its
square. The similarity of each candidate is then computed exactly. LSH misses a match with a probability below
``MISSED_SHARE``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reinforcepp.data import normalize, words

if TYPE_CHECKING:
    from rensa import RMinHash

SHINGLE_WORDS = 3
PERMUTATIONS = 128
MISSED_SHARE = 1e-4
SEED = 42
BATCH_TEXTS = 256
_TOLERANCE = 1e-9
Hashes = NDArray[np.uint32]
"""Hashes of 32 bits: two of a few hundred shingles are alike in one of 100,000 pairs of texts."""


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


def near_duplicates(
    texts: Sequence[Sequence[str]], threshold: float, on_progress: Callable[[float], None] = lambda share: None
) -> list[Match]:
    """Return one match for each text that resembles an earlier one; ``on_progress`` receives the finished share."""
    index = _Index(threshold)
    found = []
    for position, (hashes, sketch) in enumerate(_sketches(texts)):
        match = index.find(position, hashes, sketch)
        if match is not None:
            found.append(match)
        index.add(hashes, sketch)
        on_progress((position + 1) / len(texts))
    return found


def across(texts: Sequence[str], others: Sequence[str], threshold: float) -> list[Match]:
    """Return one match for each of ``texts`` that resembles one of ``others``, with the indices in the two lists."""
    index = _Index(threshold)
    for hashes, sketch in _sketches([[text] for text in others]):
        index.add(hashes, sketch)
    sketched = enumerate(_sketches([[text] for text in texts]))
    matches = (index.find(position, hashes, sketch) for position, (hashes, sketch) in sketched)
    return [match for match in matches if match is not None]


def _sketches(texts: Sequence[Sequence[str]]) -> Iterator[tuple[Hashes, RMinHash]]:
    """Yield the sorted hashes of each text's shingles, and its MinHash."""
    from rensa import RMinHash

    for start in range(0, len(texts), BATCH_TEXTS):
        sets = [shingles(each) for each in texts[start : start + BATCH_TEXTS]]
        sketches = RMinHash.from_token_sets(sets, PERMUTATIONS, SEED)
        for shingle_set, sketch in zip(sets, sketches, strict=True):
            hashes = np.fromiter(map(hash, shingle_set), np.int64, len(shingle_set))
            yield np.unique(hashes.astype(np.uint32)), sketch


class _Index:
    """The shingles of texts, and their MinHashes in bands."""

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHashLSH

        self._threshold = threshold
        self._lsh = RMinHashLSH(threshold, PERMUTATIONS, _num_bands(threshold))
        self._hashes: list[Hashes] = []

    def add(self, hashes: Hashes, sketch: RMinHash) -> None:
        """Add a text, so that later texts can match it."""
        self._lsh.insert(len(self._hashes), sketch)
        self._hashes.append(hashes)

    def find(self, position: int, hashes: Hashes, sketch: RMinHash) -> Match | None:
        """Return a match with an added text, if any."""
        size = len(hashes)
        low, high = self._threshold * size - _TOLERANCE, size / self._threshold + _TOLERANCE
        for other in sorted(self._lsh.query(sketch)):
            candidate = self._hashes[other]
            if not low <= len(candidate) <= high:
                continue
            common = len(np.intersect1d(hashes, candidate, assume_unique=True))
            similarity = common / (size + len(candidate) - common)
            if similarity >= self._threshold - _TOLERANCE:
                return Match(position, other, similarity)
        return None


def _num_bands(threshold: float) -> int:
    """Return the smallest number of bands that misses at most ``MISSED_SHARE`` of the matches at the threshold."""
    bands = 1
    while bands < PERMUTATIONS and (1 - threshold ** (PERMUTATIONS // bands)) ** bands > MISSED_SHARE:
        bands *= 2
    return bands
