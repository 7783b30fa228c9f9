"""What a warm-up learns from: which columns, which texts of them, which rows are left out and which held out."""

import json

import pytest

from reinforcepp.data import SftRow, load_preferences, load_prompts, load_texts, read_texts
from reinforcepp.data.texts import SftColumnNames
from reinforcepp.errors import DataError

TALK = [{"role": "user", "content": "Is it up?"}, {"role": "assistant", "content": "Yes."}]
MORE = [*TALK, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Ping it."}]


@pytest.fixture
def write(tmp_path):
    """``write("a.csv", text)`` or ``write("a.jsonl", row, row)``: the path of the file."""

    def make(name: str, *rows):
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        return path

    return make


def learnt(data) -> list[tuple[str | None, str]]:
    return [(row.question, row.completion) for row in data.rows]


@pytest.mark.parametrize(
    ("row", "asked", "completion"),
    [
        ({"text": "A dog barks."}, None, "A dog barks."),
        ({"prompt": "Why?", "completion": "So."}, "Why?", "So."),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "Why?", "So."),
        ({"prompt": "Why?", "chosen": "So."}, "Why?", "So."),
        ({"chosen": "Why? So.", "rejected": "Why? No."}, "Why?", "So."),
        ({"question": "Why?", "answer": "So."}, "Why?", "So."),
        ({"instruction": "Why?", "response_j": "So.", "response_k": "No."}, "Why?", "So."),
        ({"messages": TALK}, "Is it up?", "Yes."),
        ({"conversations": MORE}, "Is it up?\nAnswer: Yes.\nQuestion: Sure?", "Ping it."),
        ({"messages": [{"role": "system", "content": "Be brief."}, *TALK]}, "Be brief.\n\nIs it up?", "Yes."),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, "Is it up?", "Yes."),
        ({"prompt": "Is it up?", "completion": TALK}, "Is it up?", "Yes."),
        # Several that would do: answers before conversations before texts.
        ({"text": "T", "messages": TALK, "prompt": "Why?", "completion": "So.", "chosen": "C"}, "Why?", "So."),
        ({"text": "T", "messages": TALK, "prompt": "Why?", "chosen": "C"}, "Why?", "C"),
        ({"text": "T", "messages": TALK, "prompt": "Why?"}, "Is it up?", "Yes."),
        ({"text": "T", "prompt": "Why?", "output": "So."}, None, "T"),
    ],
)
def test_a_row_s_text(write, row, asked, completion):
    assert learnt(read_texts(write("a.jsonl", row))) == [(asked, completion)]


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
def test_what_the_user_names_comes_first(write, names, expected):
    row = {"prompt": "Why?", "chosen": "C", "rejected": "R", "body": "B", "talk": TALK, "other": "O", "ask": "Really?"}
    assert learnt(read_texts(write("a.jsonl", row), SftColumnNames(**names))) == [expected]


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
def test_also_before_what_comes_first_otherwise(write, row, names, expected):
    assert learnt(read_texts(write("a.jsonl", row), SftColumnNames(**names))) == [expected]


def test_rows_that_teach_nothing_are_left_out_and_told(write):
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
        "a.jsonl: 1 row; the last answers of the conversations in 'messages'; left out 4 rows"
    )


def test_files_of_several_kinds(write, tmp_path):
    write("a.csv", "text,n", "A dog barks.,1", ",2", "A cat purrs.,3")
    write("b.jsonl", {"prompt": "Why?", "completion": "So."}, {"prompt": "Why?", "completion": "So."})
    data = read_texts(f"{tmp_path}/a.csv,{tmp_path}/b.jsonl")
    assert learnt(data) == [("Why?", "So."), (None, "A dog barks."), (None, "A cat purrs.")]
    assert [row.row for row in data.rows] == ["b.jsonl:1", "a.csv:2", "a.csv:4"]
    assert {(each.row, each.reason) for each in data.skipped} == {("b.jsonl:2", "duplicate"), ("a.csv:3", "empty text")}
    assert data.sha256 != read_texts(tmp_path / "a.csv").sha256


@pytest.mark.parametrize(
    ("rows", "names", "said"),
    [
        (
            ["a,b", "1,2"],
            {},
            ["row 1: the header has no column 'text', 'messages', 'completion'", "'a', 'b'", "--text_col"],
        ),
        (["prompt,b", "1,2"], {}, ["has no column 'text'"]),
        (["completion,b", "1,2"], {}, ["no column 'prompt'", "--prompt_column"]),
        (["text,b", "1,2"], {"text": "tetx"}, ["no column 'tetx'", "--text_column", "Did you mean 'text'"]),
        (["text,b", ",2"], {}, ["no usable row", "1 empty text (row 2)"]),
        (["text"], {}, ["row"]),
        ([{"text": TALK}], {}, ["row 1", "'text' holds messages", "--messages_column text"]),
        ([{"text": TALK[0]}], {}, ["row 1", "'text' holds messages"]),
        (["ask,text", "1,2"], {"prompt": "ask"}, ["no column 'completion'", "--completion_column"]),
        ([{"text": 3}], {}, ["row 1", "'text' holds 3"]),
        ([{"instruction": "I", "input": "J", "completion": "C"}], {}, ["'instruction', 'input'", "--prompt_column"]),
    ],
)
def test_what_can_not_be_read_is_told_in_a_sentence(write, rows, names, said):
    path = write("a.csv" if isinstance(rows[0], str) else "a.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        read_texts(path, SftColumnNames(**names))
    assert [words for words in ("a.", *said) if words not in str(caught.value)] == []


def test_the_same_prompts_are_held_out_as_in_the_other_trainings(pairs_csv):
    how = {"heldout_fraction": 0.4, "seed": 3}
    (_, train, heldout), pairs, prompts = (
        load(pairs_csv, **how) for load in (load_texts, load_preferences, load_prompts)
    )
    assert [row.prompt for row in heldout] == [row.prompt for row in pairs[2]] == [row.prompt for row in prompts[2]]
    assert len(heldout) == 3 and len(train) == 5
    assert {row.completion for row in train} == {row.chosen for row in pairs[1]}


def test_rows_count_as_often_as_their_file_s_weight_says_and_held_out_ones_once(write):
    path = write("a.csv", "text", *(f"Text number {i}." for i in range(10)))
    _, train, heldout = load_texts(f"{path}?weight=2", heldout_fraction=0.3, seed=1)
    assert (len(train), len(set(train)), len(heldout)) == (14, 7, 3)


def test_built_in_data_comes_split():
    data, train, heldout = load_texts("builtin:network", heldout_fraction=0.5, seed=0)
    _, pairs, others = load_preferences("builtin:network", heldout_fraction=0.5, seed=0)
    assert {row.prompt for row in train} == {row.prompt for row in pairs}
    assert {row.prompt for row in heldout} == {row.prompt for row in others}
    assert len(data.rows) == len(train) + len(heldout) and data.notes == ("answers from the column 'chosen'",)


def test_texts_are_held_out_by_themselves(write):
    path = write("a.csv", "text", *(f"Text number {i}." for i in range(10)))
    _, train, heldout = load_texts(path, heldout_fraction=0.3, seed=1)
    assert (len(train), len(heldout)) == (7, 3)
    assert all(isinstance(row, SftRow) and row.question is None for row in train)
