"""Single answers with a label, as in data for KTO, are paired per prompt; SFT trains on the good ones."""

from __future__ import annotations

import json

import pytest
from data.pairs import texts

from reinforcepp.commands.lint.check import check_data
from reinforcepp.commands.lint.fix import write_fixed
from reinforcepp.config import LintConfig
from reinforcepp.data import load_preferences, load_prompts, read_preferences, read_texts
from reinforcepp.errors import DataError
from reinforcepp.types import Preference


def answer(prompt, completion, label, **more):
    return {"prompt": prompt, "completion": completion, "label": label, **more}


ROWS = [
    answer("p", "good 1", True),
    answer("q", "only", True),
    answer("p", "bad 1", False),
    answer(" p", "good 2", True),  # whitespace doesn't count
    answer("p", "good 3", True),
    answer("p", "bad 2", False),
    answer("p", "good  1", True),  # repeats row 1
    answer("r", "x", False),
    answer("r", "x", True),  # contradicts row 8
    answer("s", "alone", False),
    answer("t", "yes", True),
    answer("t", "no", False),
    answer("t", "", False),
    answer("t", "why", None),
]
PAIRS = [
    ("p", "good 1", "bad 1", "1+3"),
    (" p", "good 2", "bad 2", "4+6"),
    ("p", "good 3", "bad 1", "5+3"),
    ("t", "yes", "no", "11+12"),
]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_answer_is_paired_with_one_of_the_other_kind(write, streaming):
    data, train, heldout = load_preferences(write(*ROWS), heldout_fraction=0.5, seed=0, streaming=streaming)
    rows = sorted(data.rows, key=lambda pair: [pair[3] for pair in PAIRS].index(pair.row))
    assert [(pair.prompt, pair.chosen, pair.rejected, pair.row) for pair in rows] == PAIRS
    assert {pair.prompt.strip() for pair in train} ^ {pair.prompt.strip() for pair in heldout} == {"p", "t"}
    assert sorted((each.row, each.reason) for each in data.skipped) == [
        (2, "with only good answers to the prompt"),
        (7, "with an answer that repeats an earlier row"),
        (8, "with an answer that is labeled both good and bad"),
        (9, "with an answer that is labeled both good and bad"),
        (10, "with only bad answers to the prompt"),
        (13, "empty answer"),
        (14, "with an empty label"),
    ]
    assert "good and bad answers by the column 'label', paired per prompt" in data.summary()


def test_streaming_gives_the_same_rows_in_the_same_order(write):
    rows = [answer(f"p{i % 7}", f"a{i}", i % 3 == 0) for i in range(60)]
    path, split = write(*rows), {"heldout_fraction": 0.3, "seed": 2}
    found = [load_preferences(path, **split, streaming=streaming) for streaming in (False, True)]
    for one, other in zip(*([data.rows, train, heldout] for data, train, heldout in found), strict=True):
        assert list(one) == list(other)
    assert len(found[0][0].rows) == 40  # as many as there are bad answers


@pytest.mark.parametrize(
    ("shape", "label"),
    [
        (lambda a, label: {"prompt": [user("q")], "completion": [gpt(a)], "label": label}, True),
        (lambda a, label: {"messages": [user("q"), gpt(a)], "label": label}, True),
        (lambda a, label: {"conversations": [user("q"), gpt(a)], "kto_tag": label}, True),
        (lambda a, label: {"instruction": "q", "input": "", "output": a, "kto_tag": label}, True),
        (lambda a, label: {"prompt": "q", "completion": a, "label": str(label)}, True),
        (lambda a, label: {"prompt": "q", "completion": a, "label": int(label)}, True),
        (lambda a, label: {"prompt": "q", "response": a, "label": "Good" if label else "bad"}, True),
        (lambda a, label: {"prompt": "q", "completion": a, "label": 1 if label else -1}, True),
    ],
)
def test_every_shape_of_labeled_answers(write, shape, label):
    rows = [shape("g1", label), shape("b1", not label), shape("g2", label)]
    data = read_preferences(write(*rows))
    assert texts(data) == [("q", "g1", "b1"), ("q", "g2", "b1")] and [pair.row for pair in data.rows] == ["1+2", "3+2"]
    assert [row.completion for row in read_texts(write(*rows)).rows] == ["g1", "g2"]
    assert len(load_prompts(write(*rows), heldout_fraction=0, seed=0)[0].rows) == 1


def user(text):
    return {"role": "user", "content": text}


def gpt(text):
    return {"role": "assistant", "content": text}


def test_variables_of_the_template_tell_prompts_apart_and_files_are_paired_together(write, tmp_path):
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    one = write(answer("p", "g", True, **thinking), answer("p", "b", False, margin=3), answer("q", "g", True))
    two = tmp_path / "two.jsonl"
    rows = [answer("p", "b2", False, **thinking), answer("q", "b", False), answer("p", "g2", True)]
    two.write_text("\n".join(map(json.dumps, rows)))
    data = read_preferences(f"{one},{two}?weight=3")
    assert [(pair.chosen, pair.rejected, pair.row, pair.weight, pair.margin) for pair in data.rows] == [
        ("g", "b2", "data.jsonl:1+two.jsonl:1", 2, 0),
        ("g2", "b", "two.jsonl:3+data.jsonl:2", 2, 0),
        ("g", "b", "data.jsonl:3+two.jsonl:2", 2, 0),
    ]
    assert data.rows[0].chat_template_kwargs == {"enable_thinking": True}
    assert isinstance(data.rows[0], Preference)


def test_labels_that_are_neither_true_nor_false(write):
    rows = [answer(f"p{i // 2}", f"a{i}", i % 2 == 0) for i in range(40)]
    rows[5]["label"] = "maybe"
    for read in (read_preferences, read_texts):
        data = read(write(*rows))
        assert (6, "with a label that is neither true nor false") in [(each.row, each.reason) for each in data.skipped]
    rows = [answer(f"p{i}", "a", i % 3) for i in range(9)]  # a column of classes
    with pytest.raises(DataError, match="no column 'chosen'"):
        read_preferences(write(*rows))


def test_answers_that_cannot_be_paired_are_one_clear_error(write):
    rows = [answer(f"p{i}", "a", i > 2) for i in range(5)]
    with pytest.raises(DataError) as caught:
        read_preferences(write(*rows))
    assert str(caught.value).endswith(
        "0 usable pairs, but at least 2 are needed (skipped 5 rows: 3 with only bad answers to the prompt (rows 1, 2, 3), "
        "2 with only good answers to the prompt (rows 4, 5)). Add a good and a bad answer to the same prompts, or train on "
        "the good answers with `reinforcepp sft`."
    )


def test_lint_checks_the_pairs_and_reports_single_answers(write):
    report = check_data(LintConfig(data=str(write(*ROWS))))
    assert [(file.noun, file.rows, file.usable) for file in report.files] == [("pair", len(ROWS), 4)]
    (found,) = (each for each in report.findings if each.rule == "unpaired")
    assert found.severity == "warning" and found.rows == (2, 10)
    assert found.message == "2 answers have no answer of the other kind to the same prompt (rows 2, 10)"


def test_a_cleaned_copy_keeps_single_answers_and_their_order(write, tmp_path):
    rows = [answer("p", "good\u0007", True), answer("p", "", True), *ROWS[1:3], answer("p", "bad 2", False)]
    copy = tmp_path / "copy.jsonl"
    changes = write_fixed(write(*rows), copy, LintConfig(data="data.jsonl"))
    cleaned = ({"chosen": "good\u0007"}, {"chosen": "good"})
    assert [(each.row, each.before, each.after) for each in changes if each.after] == [
        ("1+4", *cleaned),
        ("1+5", *cleaned),
    ]
    found = [json.loads(line) for line in copy.read_text(encoding="utf-8").splitlines()]
    assert found == [answer("p", "good", True), *ROWS[1:3], answer("p", "bad 2", False)]
    again = tmp_path / "again.jsonl"
    assert write_fixed(copy, again, LintConfig(data="data.jsonl")) == [] and again.read_text() == copy.read_text()
