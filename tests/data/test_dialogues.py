"""Texts that contain their prompt or are formatted dialogues, and columns that belong to a prompt."""

# ruff: noqa: RUF001

from __future__ import annotations

import json

import pytest
from data.pairs import texts

from reinforcepp.data import load_preferences, load_prompts, load_texts, read_preferences, read_prompts, read_texts
from reinforcepp.data.dialogues import Message, parse_dialogue, split_shared_prompt
from reinforcepp.errors import DataError

QUESTION = Message("user", "Why?")
ANSWERED = [QUESTION, Message("assistant", "So."), Message("user", "Sure?")]


# --- the shared beginning of two texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("天空是什么颜色的？", "天空是蓝色的。", "天空是绿色的。"),
        ("请看 iPhone 的价格是多少？", "五百元。", "五元。"),
        ("水的化学式是", "H2O", "CO2"),
        ("首都是", "北京", "上海"),
        ("答案是", "《红楼梦》", "《西游记》"),
        ("空は何色ですか？", " 空は青です。", " 空は緑です。"),
        ("飲み物は", "コーヒーです", "コーラです"),
        ("ฟ้าสีอะไร", "ฟ้า", "เขียว"),
        ("What color is the sky?", " It is blue.", " It is green.\n"),
        ("  The sky is", " blue and vast", " blue"),
        ("Pi is", "\t3.14", "\t3.15"),
        ("First line\nAnd the next?\n\n", "It is a boat. ", "It is a bird."),
    ],
)  # fmt: skip
def test_prompt_ends_at_a_sentence_or_word(prompt, chosen, rejected):
    assert split_shared_prompt(prompt + chosen, prompt + rejected) == (prompt, chosen, rejected)


def test_chinese_pairs_without_a_prompt_column(write):
    path = write({"chosen": "水？是水。", "rejected": "水？是火。"}, {"chosen": "火？是火。", "rejected": "火？是水。"})
    assert texts(read_preferences(path))[0] == ("水？", "是水。", "是火。")
    assert [row.prompt for row in read_prompts(path).prompts] == ["水？", "火？"]


# --- dialogues ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "\n\nHuman: Why?\n\nAssistant:",
        "User: Why?\nAssistant: ",
        "Question: Why?\nAnswer:",
        "问：Why?\n答：",
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        "<|user|>\nWhy?</s>\n<|assistant|>\n",
        "<s>[INST] Why? [/INST]",
        "Below is an instruction.\n\n### Instruction:\nWhy?\n\n### Response:\n",
    ],
)  # fmt: skip
def test_formatted_prompts_are_parsed(write, text):
    assert parse_dialogue(text) == [QUESTION]
    path = write(
        {"prompt": text, "chosen": "Good.", "rejected": "Bad."}, {"prompt": "b", "chosen": "x", "rejected": "y"}
    )
    assert texts(read_preferences(path))[0] == ("Why?", "Good.", "Bad.")
    data = read_prompts(path)
    assert data.prompts[0].prompt == "Why?" and "1 row with a prompt that was already formatted" in data.summary()


@pytest.mark.parametrize(
    "text",
    [
        "Human: Why?\n\nAssistant: So.\n\nHuman: Sure?\n\nAssistant:",
        "<s>[INST] Why? [/INST] So. </s><s>[INST] Sure? [/INST]",
    ],
)
def test_several_turns_are_parsed(text):
    assert parse_dialogue(text) == ANSWERED


@pytest.mark.parametrize(
    "text",
    [
        "Write a dialogue:\n\nHuman: Why?\n\nAssistant: So.",
        "Human: Why?\n\nHuman: So?\n\nAssistant: Yes.",
        "Human: Why?",
        "What does [INST] mean?",
        "A: x\nB: y",
    ],
)
def test_other_texts_are_no_dialogues(text):
    assert parse_dialogue(text) == []


def test_prompt_that_ends_with_an_answer_stays_text(write):
    quiz = "Q: Which?\nA: Red.\nB: Blue."
    assert read_prompts(write({"prompt": quiz})).prompts[0].prompt == quiz


def test_dialogues_that_repeat_the_prompt_column(write):
    start = "\n\nHuman: Why?\n\nAssistant:"
    row = {"prompt": "Why?", "chosen": f"{start} So.", "rejected": f"{start} No."}
    asked_for = {**row, "prompt": "Write a dialogue."}
    assert texts(read_preferences(write(row, asked_for))) == [
        ("Why?", "So.", "No."),
        ("Write a dialogue.", row["chosen"], row["rejected"]),
    ]


# --- columns that belong to the prompt ---------------------------------------------------------------------------------------

PAIR = {"chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add.", "input": "1 2"}, "Add.\n1 2"),
        ({"instruction": "Add.", "input": ""}, "Add."),
        ({"instruction": "Add.", "context": "1 2"}, "Add.\n1 2"),
        ({"system": "Be brief.", "question": "Why?"}, "Be brief.\n\nWhy?"),
        ({"system_prompt": "Be brief.", "prompt": [{"role": "user", "content": "Why?"}]}, "Be brief.\n\nWhy?"),
        ({"system": "", "question": "Why?"}, "Why?"),
        ({"instruction": "Why?", "history": [["Hi?", "Hello."]]}, "Hi?\nAnswer: Hello.\nQuestion: Why?"),
        (
            {"system": "Be brief.", "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]},
            "Be brief.\n\n?",
        ),
    ],
)  # fmt: skip
def test_columns_of_the_prompt_are_used(write, row, prompt):
    path = write({**row, **PAIR}, {**row, "chosen": "x", "rejected": "y"})
    assert [pair.prompt for pair in read_preferences(path).pairs] == [prompt] * 2
    assert [each.prompt for each in read_prompts(path).prompts] == [prompt]
    assert [each.question for each in read_texts(path).rows] == [prompt] * 2


def test_columns_are_joined_by_name(write):
    path = write({"a": "one", "b": "two", "a+c": "x"})
    assert read_prompts(path, prompt_column="a+b").prompts[0].prompt == "one\ntwo"
    assert read_prompts(path, prompt_column="a+c").prompts[0].prompt == "x"
    with pytest.raises(DataError, match="no column 'd'"):
        read_prompts(path, prompt_column="a+d")


def test_unused_columns_are_reported(write):
    rows = ({"prompt": "a", **PAIR, "source": "x", "tags": []}, {"prompt": "b", **PAIR})
    assert read_preferences(write(*rows)).notes == ("unused columns 'source', 'tags'",)
    assert "unused columns 'source', 'tags'" in read_texts(write(*rows)).summary()
    assert read_prompts(write(*rows)).notes == ()  # Reward functions receive them.


def test_bad_answers_are_not_trained_on(write):
    rows = [{"prompt": "a", "completion": "good", "label": True}, {"prompt": "a", "completion": "bad", "label": False}]
    data = read_texts(write(*rows))
    assert [row.completion for row in data.rows] == ["good"] and "1 with label false (row 2)" in data.summary()
    with pytest.raises(DataError, match=r"0 usable pairs.*with only good answers to the prompt.*reinforcepp sft"):
        read_preferences(write(rows[0]))
    topics = [{"prompt": "a", "completion": "x", "label": "red"}, {"prompt": "b", "completion": "y", "label": "blue"}]
    assert len(read_texts(write(*topics)).rows) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [{"role": "Human", "content": "q"}, {"role": "Assistant", "content": "g"}],
         "rejected": [{"role": "USER", "content": "q"}, {"role": "GPT", "content": "b"}]},
        {"input": {"messages": [{"role": "user", "content": "q"}], "tools": []},
         "preferred_output": [{"role": "assistant", "content": "g"}],
         "non_preferred_output": [{"role": "assistant", "content": "b"}]},
        {"chosen_messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]}, {"from": "gpt", "value": "g"}],
         "rejected_messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
        {"prompt": ["q"], "chosen": ["g"], "rejected": ["b"]},
    ],
)  # fmt: skip
def test_formats_of_other_tools(write, row):
    other = json.loads(json.dumps(row).replace('"q"', '"r"'))
    assert texts(read_preferences(write(row, other))) == [("q", "g", "b"), ("r", "g", "b")]


# --- rows with odd cells ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_few_odd_rows_are_skipped(write, streaming):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    rows[3]["chosen"], rows[9]["prompt"] = True, [{"role": "judge", "content": "x"}]
    path, split = write(*rows), {"heldout_fraction": 0.1, "seed": 0}
    data, _, _ = load_preferences(path, **split, streaming=streaming)
    assert len(data.rows) == 18
    assert "1 with a boolean in 'chosen' (row 4), 1 with the role 'judge' in 'prompt' (row 10)" in data.summary()
    for load in (load_preferences, load_prompts, load_texts):
        options = {} if load is load_texts else {"streaming": streaming}
        assert load(path, **split, **options, max_bad_rows=2)
        with pytest.raises(DataError, match=r"data.jsonl:\d+: .*raise max_bad_rows"):
            load(path, **split, **options, max_bad_rows=0)


def test_many_odd_rows_are_an_error(write):
    rows = [{"prompt": f"p{i}", "chosen": i, "rejected": "b"} for i in range(4)]
    rows += [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    with pytest.raises(DataError, match=r"data.jsonl:1: 'chosen' holds 0, expected text.*4 of 8 rows"):
        read_preferences(write(*rows))
