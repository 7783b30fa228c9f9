"""The sample file: complete, varied, and without a shortcut that reveals which answer is chosen."""

from __future__ import annotations

import csv
import re
from difflib import SequenceMatcher
from itertools import combinations

import pytest

from reinforcepp.data import read_preferences
from scripts import ROOT

PATH = ROOT / "example_feedback_diverse.csv"


@pytest.fixture(scope="module")
def pairs():
    return read_preferences(PATH).pairs


@pytest.fixture(scope="module")
def answers(pairs):
    return {"chosen": [pair.chosen for pair in pairs], "rejected": [pair.rejected for pair in pairs]}


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def ngrams(text: str, length: int) -> set[tuple[str, ...]]:
    """Return all word n-grams of ``length`` words."""
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def test_all_24_pairs_are_usable(pairs):
    data = read_preferences(PATH)
    assert data.summary() == "example_feedback_diverse.csv: 24 usable pairs"
    assert len({pair.prompt for pair in pairs}) == 24
    assert "How do I check the IP address of my Linux machine?" in {pair.prompt for pair in pairs}


def test_file_is_plain_csv():
    raw = PATH.read_bytes()
    rows = list(csv.reader(raw.decode("utf-8").splitlines(), strict=True))
    assert rows[0] == ["prompt", "chosen", "rejected"]
    assert {len(row) for row in rows} == {3} and len(rows) == 25
    assert b"\r" not in raw and raw.endswith(b"\n")


def test_chosen_answers_are_between_25_and_70_words(answers):
    assert all(25 <= len(answer.split()) <= 70 for answer in answers["chosen"])


@pytest.mark.parametrize("length", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_length_does_not_reveal_the_label(pairs, length):
    assert 0.35 <= sum(length(pair.chosen) > length(pair.rejected) for pair in pairs) / len(pairs) <= 0.65
    # The total length of both sides is similar, too.
    totals = [sum(length(getattr(pair, side)) for pair in pairs) for side in ("chosen", "rejected")]
    assert 0.8 < totals[0] / totals[1] < 1.25


@pytest.mark.parametrize("mark", [r"`", r"(?<!\S)1\. ", r"[:;]", r"\?", r"!", r"\bsudo\b", r"n't\b", r"[()]"])
def test_formatting_does_not_reveal_the_label(answers, mark):
    chosen, rejected = (sum(bool(re.search(mark, answer)) for answer in answers[side]) for side in answers)
    assert abs(chosen - rejected) <= 4


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_no_answer_is_a_variant_of_another(answers, side):
    for one, other in combinations(answers[side], 2):
        assert SequenceMatcher(None, one, other, autojunk=False).ratio() < 0.6
        assert not ngrams(one, 5) & ngrams(other, 5)


def test_openings_differ(answers):
    for side in answers:
        openings = [tuple(words(answer)[:2]) for answer in answers[side]]
        assert len(set(openings)) == 24


def test_no_answer_repeats_its_prompt(pairs):
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            assert not ngrams(pair.prompt, 5) & ngrams(answer, 5)
            assert SequenceMatcher(None, pair.prompt, answer, autojunk=False).ratio() < 0.6
