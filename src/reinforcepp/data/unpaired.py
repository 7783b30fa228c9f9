"""Pairs of single answers that a label marks as good or bad, as in data for KTO.

Answers to the same prompt are paired in the order of the file: the first good one with the first bad one, and so on. If there
are more of one kind, the other kind starts again, so no answer stays unused and none is used more often than needed.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from reinforcepp.data.rows import Row, normalize, text_digest

ONLY_GOOD, ONLY_BAD = "with only good answers to the prompt", "with only bad answers to the prompt"
BOTH = "with an answer that is labeled both good and bad"
REPEATED = "with an answer that repeats an earlier row"
UNPAIRED = (ONLY_GOOD, ONLY_BAD)
"""Problems of rows that are right but can't be paired."""


class Answers:
    """The hashes of prompts and answers, and the labels, in about twenty bytes per answer."""

    def __init__(self) -> None:
        self.prompts, self.answers, self.good = array("Q"), array("Q"), array("b")

    def append(self, prompt: int, answer: int, good: bool) -> None:
        """Add an answer."""
        self.prompts.append(prompt)
        self.answers.append(answer)
        self.good.append(good)


class Match(NamedTuple):
    """The indices of a good and a bad answer that form a pair, or the ``problem`` of the answer at ``good``."""

    good: int
    bad: int
    problem: str | None = None


def match_answers(found: Answers) -> list[Match]:
    """Return the pairs and the answers that can't be paired, ordered by their first index."""
    prompts = np.frombuffer(found.prompts, dtype=np.uint64)
    order = np.argsort(prompts, kind="stable")
    starts = np.flatnonzero(np.diff(prompts[order])) + 1
    matches = [match for group in np.split(order, starts) if len(group) for match in _in_group(group.tolist(), found)]
    return sorted(matches, key=lambda match: (min(match.good, match.bad), max(match.good, match.bad)))


def _in_group(group: Sequence[int], found: Answers) -> Iterator[Match]:
    """Yield the matches of the answers to one prompt."""
    by_label: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for index in group:
        first = by_label[bool(found.good[index])].setdefault(found.answers[index], index)
        if first != index:
            yield Match(index, index, REPEATED)
    both = by_label[True].keys() & by_label[False].keys()
    for label in (True, False):
        yield from (Match(by_label[label][answer], by_label[label][answer], BOTH) for answer in sorted(both))
    good, bad = ([index for answer, index in by_label[label].items() if answer not in both] for label in (True, False))
    if good and bad:
        for i in range(max(len(good), len(bad))):
            yield Match(good[i % len(good)], bad[i % len(bad)])
    else:
        yield from (Match(index, index, ONLY_GOOD if good else ONLY_BAD) for index in (good or bad))


class Shelf(Protocol):
    """A list of rows, in memory or on disk."""

    def append(self, row: Row, /) -> None:
        """Add a row."""
        ...

    def __getitem__(self, index: int, /) -> Row:
        """Return a row."""
        ...


def pair_answers(rows: Iterable[Row], shelf: Shelf) -> Iterator[Row]:
    """Yield the rows, of which single answers are paired: each pair is one row, at the end.

    Single answers that can't be paired keep their row and get a problem. Meanwhile, ``shelf`` holds the single answers.
    """
    found = Answers()
    for row in rows:
        if row.good is None or row.problem:
            yield row
            continue
        prompt, answer = map(normalize, row.texts[:2])
        if not (prompt and answer):
            yield row if not prompt else replace(row, problem="empty answer")
            continue
        variables = json.dumps(row.chat_template_kwargs, sort_keys=True)
        found.append(_hash(prompt, variables), _hash(answer), row.good)
        shelf.append(row)
    for good, bad, problem in match_answers(found):
        yield replace(shelf[good], problem=problem, good=None) if problem else _paired(shelf[good], shelf[bad])


def _hash(*texts: str) -> int:
    return int.from_bytes(text_digest(*texts)[:8], "big")


def _paired(good: Row, bad: Row) -> Row:
    """Return the row of a pair, such as row ``3+7``; its weight is the mean."""
    first, second = str(good.number), str(bad.number)
    file, _, _ = first.rpartition(":")
    number = f"{first}+{second.removeprefix(f'{file}:') if file else second}"
    texts = (*good.texts[:2], bad.texts[1])
    weight = (good.weight + bad.weight) / 2
    return replace(good, number=number, texts=texts, weight=weight, good=None, answers=(good, bad))
