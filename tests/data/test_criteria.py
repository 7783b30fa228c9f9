"""Preferences by criterion: the columns of common datasets, and cells that can't be read."""

from __future__ import annotations

import json

import pytest

from reinforcepp.config.criteria import Criterion, parse_criteria
from reinforcepp.data import load_preferences
from reinforcepp.errors import ConfigError, DataError
from reinforcepp.types import Judgment

PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def rows_of(*cells, **texts):
    """Rows with distinct texts and these other cells."""
    return [
        {**PAIR, "prompt": f"Why {i}?", **texts, **(each if isinstance(each, dict) else {})}
        for i, each in enumerate(cells)
    ]


def read(tmp_path, rows, *criteria, streaming=False, **settings):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    given = {"heldout_fraction": 0.0, "seed": 0, "criteria": parse_criteria(criteria), "streaming": streaming}
    return load_preferences(path, **(given | settings))[0]


def sides(data):
    return [tuple(judgment.side for judgment in pair.judgments) for pair in data.rows]


# --- names ------------------------------------------------------------------------------------------------------------


def test_criteria_are_parsed():
    parsed = parse_criteria(["helpful,safe=harmless", " short=-length "])
    assert parsed == (
        Criterion("helpful", "helpful"),
        Criterion("safe", "harmless"),
        Criterion("short", "length", True),
    )
    assert parse_criteria(["x=chosen-rating"]) == (Criterion("x", "chosen-rating"),)


@pytest.mark.parametrize("text", ["", "2", "=length", "a=", "a=-", "a b", "a:1", "-length", "a/b"])
def test_odd_names_of_criteria_raise(text):
    with pytest.raises(ConfigError, match="isn't a criterion"):
        parse_criteria([text])


def test_a_criterion_that_is_given_twice_raises():
    with pytest.raises(ConfigError, match="safe is given twice"):
        parse_criteria(["safe", "safe=harmless"])


# --- ratings ----------------------------------------------------------------------------------------------------------

UNEQUAL = ((4, 2), (1, 3), (2, 2), (None, 3))
RATINGS = [
    # column of chosen, column of rejected, criterion, values
    ("chosen_helpful", "rejected_helpful", "helpful", UNEQUAL),
    ("helpful_chosen", "helpful_rejected", "helpful", UNEQUAL),
    ("chosen-rating", "rejected-rating", "rating", UNEQUAL),  # Argilla's UltraFeedback
    ("score_chosen", "score_rejected", "score", UNEQUAL),  # HuggingFaceH4's UltraFeedback
    ("chosen_avg_rating", "rejected_avg_rating", "avg", UNEQUAL),
    ("rating_helpful_chosen", "rating_helpful_rejected", "helpful", UNEQUAL),
    ("chosenRatingHelpful", "rejectedRatingHelpful", "helpful", UNEQUAL),
    ("chosen_helpful", "rejected_helpful", "helpful", (("4", "2"), ("1.5", "3"), (2, "2"), ("N/A", "3"))),
    ("chosen_safe", "rejected_safe", "safe", ((True, False), (False, "true"), (True, True), (None, True))),
    (
        "chosen_annotations",
        "rejected_annotations",
        "honesty",
        tuple(
            ({"honesty": {"Rating": one, "Rationale": "x"}}, {"honesty": {"Rating": other}})
            for one, other in (("4", "2"), ("1", "3"), ("2", "2"), ("N/A", "3"))
        ),
    ),
    (
        "chosen_scores",
        "rejected_scores",
        "safe",
        (('{"safe": 4}', '{"safe": 2}'), ({"safe": 1}, {"safe": 3}), ({"safe": 2}, {"safe": 2}), ({}, {"safe": 3})),
    ),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("one", "other", "criterion", "values"), RATINGS, ids=lambda value: str(value)[:20])
def test_the_better_rating_is_preferred(tmp_path, one, other, criterion, values, streaming):
    rows = rows_of(*({one: better, other: worse, "all": 1} for better, worse in values))
    data = read(tmp_path, rows, criterion, "all", streaming=streaming)
    assert sides(data) == [(1, 1), (-1, 1), (0, 1), (None, 1)]
    assert not any("unused" in note for note in data.notes)


def test_ratings_follow_the_names_of_the_answers(tmp_path):
    """As in HelpSteer2 and PKU-SafeRLHF, where the first answer isn't always the better one."""
    rows = rows_of(*({"response_1_helpful": a, "response_2_helpful": b} for a, b in UNEQUAL[:3]))
    rows = [{**row, "response_1": "Because.", "response_2": "No."} for row in rows]
    rows = [{key: value for key, value in row.items() if key not in ("chosen", "rejected")} for row in rows]
    names = {"chosen_column": "response_1", "rejected_column": "response_2"}
    assert sides(read(tmp_path, rows, "helpful", **names)) == [(1,), (-1,), (0,)]


@pytest.mark.parametrize("streaming", [False, True])
def test_criteria_of_a_file_with_a_verdict(tmp_path, streaming):
    """As in PKU-SafeRLHF: the verdict decides which answer is chosen, and the judgments follow."""
    verdicts = ((1, 0, True, False), (0, 0, True, True), (1, 1, False, True))
    names = ("better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe")
    rows = [
        {"prompt": f"Why {i}?", "response_0": "Because.", "response_1": "No.", **dict(zip(names, each, strict=True))}
        for i, each in enumerate(verdicts)
    ]
    data = read(tmp_path, rows, "better=chosen", "safer=safer_response_id", "safe", streaming=streaming)
    assert [pair.chosen for pair in data.rows] == ["No.", "Because.", "No."]
    assert sides(data) == [(1, -1, -1), (1, 1, 0), (1, 1, 1)]


def test_lower_can_be_better(tmp_path):
    rows = rows_of(*({"chosen_verbosity": a, "rejected_verbosity": b} for a, b in UNEQUAL[:3]))
    data = read(tmp_path, rows, "short=-verbosity", criteria_margins=True)
    assert [pair.judgments for pair in data.rows] == [(Judgment(-1, 2),), (Judgment(1, 2),), (Judgment(0, 0),)]


# --- judgments in one column ------------------------------------------------------------------------------------------


def test_one_column_names_the_better_answer(tmp_path):
    cells = ["chosen", "REJECTED", "tie", "", None, 1, -2, 0, "0.5", [3, 5], {"chosen": 2, "rejected": 1}, "[1, 1]"]
    data = read(tmp_path, rows_of(*({"safe": cell, "all": 1} for cell in cells)), "safe", "all")
    expected = [1, -1, 0, None, None, 1, -1, 0, 1, -1, 1, 0]
    assert [side for side, _ in sides(data)] == expected
    assert all(judgment.margin == 0 for pair in data.rows for judgment in pair.judgments)


def test_sizes_are_margins_on_request(tmp_path):
    data = read(tmp_path, rows_of({"s": 3}, {"s": -0.5}, {"s": "chosen"}, {"s": [5, 1]}), "s", criteria_margins=True)
    assert [pair.judgments[0] for pair in data.rows] == [(1, 3), (-1, 0.5), (1, 0), (1, 4)]


def test_the_label_of_a_pair_can_be_a_criterion(tmp_path):
    rows = rows_of({"margin": 0.5, "s": -1}, {"tie": True, "s": 1}, {"s": 0})
    assert [pair.judgments for pair in read(tmp_path, rows, "overall=chosen", "s").rows] == [
        ((1, 0.5), (-1, 0)),
        ((0, 0), (1, 0)),
        ((1, 0), (0, 0)),
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_any_judgment_are_skipped(tmp_path, streaming):
    rows = rows_of({"a": 1, "b": None}, {"a": None, "b": 1}, {"a": None, "b": ""}, {"a": 1})
    data = read(tmp_path, rows, "a", "b", streaming=streaming)
    assert sides(data) == [(1, None), (None, 1), (1, None)]
    assert [str(each) for each in data.skipped] == ["row 3: without a judgment by any criterion"]


@pytest.mark.parametrize("cell", [True, "false", "good", [1, 2, 3], float("inf"), {"a": 1}])
def test_an_odd_judgment_is_skipped_and_reported(tmp_path, cell):
    path = tmp_path / "pairs.jsonl"
    if cell == float("inf"):
        cell = "inf"
    path.write_text("\n".join(map(json.dumps, rows_of({"s": cell}, *[{"s": 1}] * 8))))
    data = load_preferences(path, heldout_fraction=0.0, seed=0, criteria=parse_criteria(["s"]))[0]
    assert [str(each) for each in data.skipped] == ["row 1: without chosen, rejected, tie or a number in 's'"]


def test_many_odd_judgments_name_the_cell(tmp_path):
    with pytest.raises(DataError, match=r"'s' holds True, expected chosen, rejected, tie or a number\. 4 of 4"):
        read(tmp_path, rows_of(*[{"s": True}] * 4), "s")


# --- what isn't found -------------------------------------------------------------------------------------------------


def test_an_unknown_criterion_names_those_of_the_file(tmp_path):
    rows = rows_of(
        *[{"chosen_helpful": 3, "rejected_helpful": 1, "chosen_model": "a", "rejected_model": "b", "safe": "chosen"}]
        * 2
    )
    with pytest.raises(DataError, match=r"no column 'helpfull'.*rates 'helpful', 'safe'.*Did you mean 'helpful'"):
        read(tmp_path, rows, "helpfull")


def test_ambiguous_ratings_raise(tmp_path):
    rows = rows_of(*[{"chosen_helpful": 3, "rejected_helpful": 1, "helpful_chosen": 3, "helpful_rejected": 1}] * 2)
    with pytest.raises(DataError, match="several columns could rate 'helpful'"):
        read(tmp_path, rows, "helpful")


def test_ratings_of_generations_have_another_order(tmp_path):
    """In the data of distilabel, ``rating`` follows ``generations``, whose order is shuffled."""
    rows = rows_of(*[{"rating": [9, 7], "generations": ["No.", "Because."], "order": ["rejected", "chosen"]}] * 2)
    with pytest.raises(DataError, match="'rating' rates the answers in the order of 'generations'"):
        read(tmp_path, rows, "rating")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_summary_suggests_criteria(tmp_path, streaming):
    rows = rows_of(
        *[{"chosen-rating": 3, "rejected-rating": 1, "safe": "rejected", "chosen_model": "a", "rejected_model": "b"}]
        * 2
    )
    data = read(tmp_path, rows, streaming=streaming)
    assert "judgments by criterion found: train them with criteria rating safe" in data.summary()
    assert all(pair.judgments == () for pair in data.rows)
    assert "unused columns" in data.summary()
