"""SFT data: which columns and texts are trained on, which rows are skipped and which held out."""

import json

import pytest

from reinforcepp.data import SftRow, load_preferences, load_prompts, load_texts, read_texts
from reinforcepp.data.columns import SftColumnNames
from reinforcepp.errors import DataError

TALK = [{"role": "user", "content": "Is it up?"}, {"role": "assistant", "content": "Yes."}]
MORE = [*TALK, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Ping it."}]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes lines or JSON rows to a file: ``write("a.csv", text)``, ``write("a.jsonl", row)``."""

    def make(name: str, *rows):
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        return path

    return make


def trained_on(data) -> list[tuple[str | None, str]]:
    return [(row.question, row.completion) for row in data.rows]


@pytest.mark.parametrize(
    ("row", "question", "completion"),
    [
        ({"text": "A dog barks."}, None, "A dog barks."),
        ({"prompt": "Why?", "completion": "So."}, "Why?", "So."),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "Why?", "So."),
        ({"prompt": "Why?", "chosen": "So."}, "Why?", "So."),
        ({"chosen": "Why? So.", "rejected": "Why? No."}, "Why?", " So."),
        ({"question": "Why?", "answer": "So."}, "Why?", "So."),
        ({"instruction": "Why?", "response_j": "So.", "response_k": "No."}, "Why?", "So."),
        ({"messages": TALK}, "Is it up?", "Yes."),
        ({"conversations": MORE}, "Is it up?\nAnswer: Yes.\nQuestion: Sure?", "Ping it."),
        ({"messages": [{"role": "system", "content": "Be brief."}, *TALK]}, "Be brief.\n\nIs it up?", "Yes."),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, "Is it up?", "Yes."),
        ({"prompt": "Is it up?", "completion": TALK}, "Is it up?", "Yes."),
        # If a file has several kinds: answers before conversations before texts.
        ({"text": "T", "messages": TALK, "prompt": "Why?", "completion": "So.", "chosen": "C"}, "Why?", "So."),
        ({"text": "T", "messages": TALK, "prompt": "Why?", "chosen": "C"}, "Why?", "C"),
        ({"text": "T", "messages": TALK, "prompt": "Why?"}, "Is it up?", "Yes."),
        ({"text": "T", "prompt": "Why?", "output": "So."}, None, "T"),
    ],
)
def test_columns_and_text_of_a_row(write, row, question, completion):
    assert trained_on(read_texts(write("a.jsonl", row))) == [(question, completion)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"text": "body"}, (None, "B")),
        ({"messages": "talk"}, ("Is it up?", "Yes.")),
        ({"completion": "other"}, ("Why?", "O")),
        ({"chosen": "other"}, ("Why?", "O")),
        ({"prompt": "ask"}, ("Really?", "C")),
    ],
)
def test_named_column_comes_first(write, names, expected):
    row = {"prompt": "Why?", "chosen": "C", "rejected": "R", "body": "B", "talk": TALK, "other": "O", "ask": "Really?"}
    assert trained_on(read_texts(write("a.jsonl", row), SftColumnNames(**names))) == [expected]


@pytest.mark.parametrize(
    ("row", "names", "expected"),
    [
        ({"prompt": "Why?", "completion": "So.", "good": "Good."}, {"chosen": "good"}, ("Why?", "Good.")),
        ({"prompt": "Why?", "completion": "So.", "talk": TALK}, {"messages": "talk"}, ("Is it up?", "Yes.")),
        ({"prompt": "Why?", "completion": "So.", "messages": TALK, "body": "B"}, {"text": "body"}, (None, "B")),
        ({"ask": "Why?", "text": "T", "answer": "So."}, {"prompt": "ask"}, ("Why?", "So.")),
        (
            {"ask": "Why?", "prompt": "P", "completion": "So.", "chosen": "C"},
            {"completion": "completion"},
            ("P", "So."),
        ),
    ],
)
def test_named_column_overrides_the_default_order(write, row, names, expected):
    assert trained_on(read_texts(write("a.jsonl", row), SftColumnNames(**names))) == [expected]


def test_unusable_rows_are_skipped_and_reported(write):
    odd = [
        {"messages": TALK},
        {"messages": TALK[:1]},
        {"messages": [{"role": "system", "content": "Be brief."}, TALK[1]]},
        {"messages": TALK},
        {"messages": [{"role": "user", "content": ""}, TALK[1]]},
    ]
    data = read_texts(write("a.jsonl", *odd))
    assert [(skipped.row, skipped.reason) for skipped in data.skipped] == [
        (2, "empty answer"),
        (3, "without a question"),
        (4, "duplicate"),
        (5, "empty prompt"),
    ]
    assert data.summary().startswith(
        "a.jsonl: 1 row; the last answers of the conversations in 'messages'; skipped 4 rows"
    )


def test_several_files_of_different_kinds(write, tmp_path):
    write("a.csv", "text,n", "A dog barks.,1", ",2", "A cat purrs.,3")
    write("b.jsonl", {"prompt": "Why?", "completion": "So."}, {"prompt": "Why?", "completion": "So."})
    data = read_texts(f"{tmp_path}/a.csv,{tmp_path}/b.jsonl")
    assert trained_on(data) == [("Why?", "So."), (None, "A dog barks."), (None, "A cat purrs.")]
    assert [row.row for row in data.rows] == ["b.jsonl:1", "a.csv:2", "a.csv:4"]
    assert {(each.row, each.reason) for each in data.skipped} == {("b.jsonl:2", "duplicate"), ("a.csv:3", "empty text")}
    assert data.sha256 != read_texts(tmp_path / "a.csv").sha256


@pytest.mark.parametrize(
    ("rows", "names", "parts"),
    [
        (
            ["a,b", "1,2"],
            {},
            ["a.csv:1", "no column 'text', 'messages', 'completion'", "'a', 'b'", "text_col"],
        ),
        (["prompt,b", "1,2"], {}, ["has no column 'text'"]),
        (["completion,b", "1,2"], {}, ["no column 'prompt'", "prompt_column"]),
        (["text,b", "1,2"], {"text": "tetx"}, ["no column 'tetx'", "text_column", "Did you mean 'text'"]),
        (["text,b", ",2"], {}, ["no usable row", "1 empty text (row 2)"]),
        (["text"], {}, ["no row"]),
        ([{"text": TALK}], {}, ["a.jsonl:1", "'text' holds messages", "messages_column"]),
        ([{"text": TALK[0]}], {}, ["a.jsonl:1", "'text' holds messages"]),
        (["ask,text", "1,2"], {"prompt": "ask"}, ["no column 'completion'", "completion_column"]),
        ([{"text": 3}], {}, ["a.jsonl:1", "'text' holds 3"]),
        ([{"question": "I", "query": "J", "completion": "C"}], {}, ["'question', 'query'", "prompt_column"]),
    ],
)
def test_unreadable_data_is_an_error_that_names_the_problem(write, rows, names, parts):
    path = write("a.csv" if isinstance(rows[0], str) else "a.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        read_texts(path, SftColumnNames(**names))
    assert [part for part in ("a.", *parts) if part not in str(caught.value)] == []


def test_every_loader_holds_out_the_same_prompts(pairs_csv):
    settings = {"heldout_fraction": 0.4, "seed": 3}
    (_, train, heldout), pairs, prompts = (
        load(pairs_csv, **settings) for load in (load_texts, load_preferences, load_prompts)
    )
    assert [row.prompt for row in heldout] == [row.prompt for row in pairs[2]] == [row.prompt for row in prompts[2]]
    assert len(heldout) == 3 and len(train) == 5
    assert {row.completion for row in train} == {row.chosen for row in pairs[1]}


def test_weights_repeat_training_rows_but_not_held_out_rows(write):
    path = write("a.csv", "text", *(f"Text number {i}." for i in range(10)))
    _, train, heldout = load_texts(f"{path}?weight=2", heldout_fraction=0.3, seed=1)
    assert (len(train), len(set(train)), len(heldout)) == (14, 7, 3)


def test_built_in_data_is_already_split():
    data, train, heldout = load_texts("builtin:network", heldout_fraction=0.5, seed=0)
    _, pairs, others = load_preferences("builtin:network", heldout_fraction=0.5, seed=0)
    assert {row.prompt for row in train} == {row.prompt for row in pairs}
    assert {row.prompt for row in heldout} == {row.prompt for row in others}
    assert len(data.rows) == len(train) + len(heldout) and data.notes == ("answers from the column 'chosen'",)


def test_plain_texts_are_held_out_by_their_text(write):
    path = write("a.csv", "text", *(f"Text number {i}." for i in range(10)))
    _, train, heldout = load_texts(path, heldout_fraction=0.3, seed=1)
    assert (len(train), len(heldout)) == (7, 3)
    assert all(isinstance(row, SftRow) and row.question is None for row in train)
