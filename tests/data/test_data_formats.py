"""Every command reads the formats of other tools as docs/data_formats.md states, and skips their odd rows."""

from __future__ import annotations

import csv
import json

import pytest

from reinforcepp.data import load_preferences, load_prompts, load_texts, verdicts
from reinforcepp.errors import DataError
from scripts import benchmark

data_formats = benchmark("data_formats")
SPLIT = {"heldout_fraction": 0, "seed": 0}


def example(name: str):
    (found,) = (each for each in data_formats.FORMATS if each.name == name)
    return found


def test_the_page_states_how_every_command_reads_every_format():
    text = data_formats.PAGE.read_text(encoding="utf-8")
    assert data_formats.page(text) == text, "run python benchmarks/data_formats.py"


def test_an_answer_on_the_wrong_side_is_noticed(tmp_path, monkeypatch):
    pku, *others = verdicts.VERDICTS
    wrong = pku._replace(first=pku.second, second=pku.first)
    monkeypatch.setattr(verdicts, "VERDICTS", (wrong, *others))
    with pytest.raises(AssertionError, match="No idea"):
        data_formats.cells(example("PKU-SafeRLHF"), tmp_path)


@pytest.mark.parametrize("each", data_formats.FORMATS, ids=lambda each: each.name)
def test_an_odd_row_is_skipped_and_counted(each, write):
    made = [each.rows(f"Question {i}?", f"Good {i}.", f"Bad {i}.") for i in range(8)]
    rows = [row for rows in made for row in (rows if isinstance(rows, list) else [rows])]
    odd = dict.fromkeys(rows[0], 7)
    for load in (load_preferences, load_prompts, load_texts):
        try:
            load(write(*rows), **SPLIT)
        except DataError:
            continue  # the table says why
        data = load(write(*rows[:-1], odd, rows[-1]), **SPLIT)[0]
        assert len(rows) in [skipped.row for skipped in data.skipped] and len(data.rows) == 8
        with pytest.raises(DataError, match=rf"data.jsonl:{len(rows)}: .*1 of {len(rows) + 1} rows .*max_bad_rows"):
            load(write(*rows[:-1], odd, rows[-1]), **SPLIT, max_bad_rows=0)


def test_answers_that_are_equally_good(write):
    arena = [{"conversation_a": turns(f"q{i}", "a"), "conversation_b": turns(f"q{i}", "b")} for i in range(3)]
    for row, winner in zip(arena, ("tie (bothbad)", "model_a", "model_b"), strict=True):
        row["winner"] = winner
    pairs = load_preferences(write(*arena), **SPLIT)[0].rows
    assert [(pair.chosen, pair.rejected, pair.tie) for pair in pairs] == [
        ("a", "b", True),
        ("a", "b", False),
        ("b", "a", False),
    ]
    texts = load_texts(write(*arena), **SPLIT)[0]
    assert [row.completion for row in texts.rows] == ["a", "b"]
    assert [(each.row, each.reason) for each in texts.skipped] == [(1, "with two equally good answers")]
    rated = [{"prompt": f"p{i}", "generations": ["a", "b", "c"], "ratings": [2, 2, i]} for i in range(4)]
    data = load_preferences(write(*rated, {**rated[0], "generations": ["a"]}), **SPLIT)[0]
    assert [(pair.chosen, pair.rejected) for pair in data.rows] == [("a", "c"), ("a", "c"), ("c", "a")]
    assert [(each.row, each.reason) for each in data.skipped] == [
        (3, "with equally rated answers"),
        (5, "with fewer than two rated answers in 'generations'"),
    ]


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_tool_calls_tell_conversations_apart(write):
    rows = [example("LLaMA-Factory: ShareGPT").rows("q", "a", "b") for _ in range(2)]
    rows[1]["conversations"][1]["value"] = '{"name": "read_log", "arguments": {"lines": 2}}'
    data = load_texts(write(*rows), **SPLIT)[0]
    assert len(data.rows) == 2 and "tools" not in data.summary()
    calls = [row.messages[2]["tool_calls"][0]["function"] for row in data.rows]
    assert calls == [{"name": "read_log", "arguments": {"lines": lines}} for lines in (1, 2)]
    rows[1]["conversations"][1]["value"] = "read_log(2)"
    more = [example("LLaMA-Factory: ShareGPT").rows(f"{i}", "a", "b") for i in range(9)]
    data = load_texts(write(*rows, *more), **SPLIT)[0]
    assert [each.reason for each in data.skipped] == ["with an invalid function call in 'conversations'"]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_with_other_tools_are_no_duplicates(write, streaming):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "tools": tools} for tools in (None, [{"name": "f"}], "[]")]
    rows.append({"prompt": "p", "chosen": "b", "rejected": "a", "tools": [{"name": "f"}]})
    data = load_preferences(write(*rows), **SPLIT, streaming=streaming)[0]
    assert [pair.row for pair in data.rows] == [1, 2, 4] and data.contradictions == ((2, 4),)


def test_messages_as_json_text_in_csv(write, tmp_path):
    path = tmp_path / "data.csv"
    cells = [
        json.dumps([{"role": "user", "content": 'a "quoted" q'}]),
        "x",
        json.dumps([{"role": "assistant", "content": "y"}]),
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "chosen", "rejected"), cells, [*cells[:1], "z", "y"]])
    pairs = load_preferences(path, **SPLIT)[0].rows
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        ('a "quoted" q', "x", "y"),
        ('a "quoted" q', "z", "y"),
    ]


def test_conversations_that_begin_with_a_greeting(write):
    greeting = {"role": "assistant", "content": "Hello."}
    rows = [{"messages": [greeting, *turns(f"q{i}", "a")]} for i in range(2)]
    texts = load_texts(write(*rows), **SPLIT)[0].rows
    assert [[each["role"] for each in row.messages] for row in texts] == [["assistant", "user"]] * 2
    pairs = [
        {"chosen": [greeting, *turns(f"q{i}", "a")], "rejected": [greeting, *turns(f"q{i}", "b")]} for i in range(2)
    ]
    assert [(pair.chosen, pair.rejected) for pair in load_preferences(write(*pairs), **SPLIT)[0].rows] == [
        ("a", "b")
    ] * 2
