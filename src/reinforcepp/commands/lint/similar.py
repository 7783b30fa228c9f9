"""Near-duplicate texts by the Jaccard similarity of word 3-grams.

MinHash and locality-sensitive hashing (LSH) find the candidates, so the time grows with the number of texts, not with its
square. Their similarity is first estimated by MinHash, then computed exactly. LSH misses a match with a probability below
``MISSED_SHARE``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reinforcepp.data import normalize, words

if TYPE_CHECKING:
    from rensa import RMinHash

SHINGLE_WORDS = 3
MAX_PERMUTATIONS = 128
MISSED_SHARE = 1e-4
ESTIMATE_DEVIATIONS = 5
"""Standard deviations of the MinHash estimate below the threshold at which a match is no longer possible."""
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
    index = _Index(threshold, len(texts))
    found = []
    for position, (hashes, sketch) in enumerate(_sketches(texts, threshold)):
        match = index.find(position, hashes, sketch)
        if match is not None:
            found.append(match)
        index.add(hashes, sketch)
        on_progress((position + 1) / len(texts))
    return found


def across(
    texts: Sequence[str],
    others: Sequence[str],
    threshold: float,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[Match]:
    """Return one match for each of ``texts`` that resembles one of ``others``, with the indices in the two lists."""
    index = _Index(threshold, len(others))
    found = []
    for position, (hashes, sketch) in enumerate(_sketches([[text] for text in (*others, *texts)], threshold)):
        if position < len(others):
            index.add(hashes, sketch)
        elif (match := index.find(position - len(others), hashes, sketch)) is not None:
            found.append(match)
        on_progress((position + 1) / (len(others) + len(texts)))
    return found


def _sketches(texts: Sequence[Sequence[str]], threshold: float) -> Iterator[tuple[Hashes, RMinHash]]:
    """Yield the sorted hashes of each text's shingles, and its MinHash."""
    from rensa import RMinHash

    permutations = math.prod(_bands(threshold))
    for start in range(0, len(texts), BATCH_TEXTS):
        sets = [shingles(each) for each in texts[start : start + BATCH_TEXTS]]
        sketches = RMinHash.from_token_sets(sets, permutations, SEED)
        for shingle_set, sketch in zip(sets, sketches, strict=True):
            hashes = np.fromiter(map(hash, shingle_set), np.int64, len(shingle_set))
            yield np.unique(hashes.astype(np.uint32)), sketch


class _Index:
    """The MinHashes of texts, in bands and whole, and the hashes of their shingles."""

    def __init__(self, threshold: float, size: int) -> None:
        from rensa import RMinHashLSH

        self._threshold = threshold
        bands, rows = _bands(threshold)
        self._lsh = RMinHashLSH(threshold, bands * rows, bands)
        self._digests = np.empty((size, bands * rows), np.uint32)
        self._sizes = np.empty(size, np.int64)
        self._hashes: list[Hashes] = []
        deviation = math.sqrt(threshold * (1 - threshold) * bands * rows)
        self._min_equal = threshold * bands * rows - ESTIMATE_DEVIATIONS * deviation

    def add(self, hashes: Hashes, sketch: RMinHash) -> None:
        """Add a text, so that later texts can match it."""
        position = len(self._hashes)
        self._lsh.insert(position, sketch)
        self._digests[position] = sketch.digest()
        self._sizes[position] = len(hashes)
        self._hashes.append(hashes)

    def find(self, position: int, hashes: Hashes, sketch: RMinHash) -> Match | None:
        """Return a match with an added text, if any."""
        size = len(hashes)
        for other in self._candidates(size, sketch):
            candidate = self._hashes[other]
            common = len(np.intersect1d(hashes, candidate, assume_unique=True))
            similarity = common / (size + len(candidate) - common)
            if similarity >= self._threshold - _TOLERANCE:
                return Match(position, other, similarity)
        return None

    def _candidates(self, size: int, sketch: RMinHash) -> Iterator[int]:
        """Yield the added texts that share a band, have a similar size, and whose whole MinHash is similar enough.

        Texts that share a template share bands, although they aren't near-duplicates. The estimate, which is 50 times faster
        than the exact similarity, excludes nearly all of them.
        """
        low, high = self._threshold * size - _TOLERANCE, size / self._threshold + _TOLERANCE
        found = np.sort(np.array(self._lsh.query(sketch), np.int64))
        digest = np.array(sketch.digest(), np.uint32) if len(found) else None
        for start in range(0, len(found), BATCH_TEXTS):
            batch = found[start : start + BATCH_TEXTS]
            batch = batch[(self._sizes[batch] >= low) & (self._sizes[batch] <= high)]
            yield from batch[(self._digests[batch] == digest).sum(axis=1) >= self._min_equal].tolist()


def _bands(threshold: float) -> tuple[int, int]:
    """Return the number of bands and their rows: the longest bands that miss ``MISSED_SHARE`` of matches at the threshold."""
    if threshold == 1:
        return 1, MAX_PERMUTATIONS
    needed = [
        (math.ceil(math.log(MISSED_SHARE) / math.log1p(-(threshold**rows))), rows)
        for rows in range(1, MAX_PERMUTATIONS + 1)
    ]
    return next((bands, rows) for bands, rows in reversed(needed) if bands * rows <= MAX_PERMUTATIONS)
