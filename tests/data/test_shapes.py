"""Conversations, prompts inside answers and the column names of other tools give one prompt and two answers."""

from __future__ import annotations

import json
import re

import pytest
from data.pairs import texts

from reinforcepp.data import prompt_rows, read_preferences, read_prompts
from reinforcepp.data.columns import ANSWERS, HISTORY, JOINED, PROMPTS, SYSTEMS
from reinforcepp.errors import ConfigError, DataError
from scripts import ROOT


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def prompts(data):
    return [row.prompt for row in data.prompts]


SKY = ("What color is the sky?", "It is blue.", "It is green.")
SUN = ("Where is the sun?", "In the sky.", "In the sea.")


def explicit(asked, good, bad):
    return {"prompt": [user(asked)], "chosen": [assistant(good)], "rejected": [assistant(bad)]}


def implicit(asked, good, bad):
    return {"chosen": [user(asked), assistant(good)], "rejected": [user(asked), assistant(bad)]}


def sharegpt(asked, good, bad):
    turn = {"from": "human", "value": asked}
    return {
        "conversations": [turn],
        "chosen": {"from": "gpt", "value": good},
        "rejected": {"from": "gpt", "value": bad},
    }


def with_all(asked, good, bad):
    """Return a text prompt next to whole conversations, as in UltraFeedback Binarized."""
    return {"prompt": asked, **implicit(asked, good, bad), "messages": [user(asked), assistant(good)], "score": 8.5}


def verl(asked, good, bad):
    return {"data_source": "x", "prompt": [user(asked)], "chosen": good, "rejected": bad, "extra_info": {"index": 0}}


def dialogue(asked, good, bad):
    start = f"\n\nHuman: {asked}\n\nAssistant: "
    return {"chosen": start + good, "rejected": start + bad}


def in_parts(asked, good, bad):
    parts = [{"type": "text", "text": asked[:5]}, {"type": "text", "text": asked[5:]}]
    return {**explicit(asked, good, bad), "prompt": [user(parts)]}


# --- shapes of TRL and other tools --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        lambda *pair: dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)),
        explicit,
        implicit,
        sharegpt,
        with_all,
        verl,
        dialogue,
        in_parts,
        lambda asked, good, bad: {"question": asked, "response_chosen": good, "response_rejected": bad},
        lambda asked, good, bad: {"question": asked, "response_j": good, "response_k": bad},
        lambda asked, good, bad: {"input": asked, "chosen": good, "rejected": bad},
        lambda asked, good, bad: {"context_messages": [user(asked)], "chosen": good, "rejected": bad},
    ],
)
def test_every_shape_gives_the_same_pair(write, shape):
    path = write(shape(*SKY), shape(*SUN))
    assert texts(read_preferences(path)) == [SKY, SUN]
    assert prompts(read_prompts(path)) == [SKY[0], SUN[0]]


def test_shared_beginning_in_whole_words_is_the_prompt(write):
    rows = [
        {"chosen": "The sky is blue.", "rejected": "The sky is brown."},  # "b" isn't part of the prompt.
        {"chosen": "The sun is up", "rejected": "The sun is up now"},  # Neither is a word that one answer lacks.
        {"chosen": "The sun", "rejected": "A moon"},
        {"chosen": "The same.", "rejected": "The same."},
    ]
    data = read_preferences(write(*rows))
    assert texts(data) == [("The sky is", " blue.", " brown."), ("The sun is", " up", " up now")]
    assert [each.reason for each in data.skipped] == ["empty prompt", "with chosen equal to rejected"]
    assert data.notes == ("prompts are the shared beginning of 'chosen' and 'rejected'",)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "The sky is"}, "The sky is"),
        ({"prompt": [user("The sky?")]}, "The sky?"),
        ({"prompt": user("The sky?")}, "The sky?"),
        ({"messages": [user("The sky?"), assistant("Blue.")]}, "The sky?"),
        ({"conversations": [{"from": "human", "value": "The sky?"}, {"from": "gpt", "value": "Blue."}]}, "The sky?"),
        ({"context_messages": [user("The sky?")]}, "The sky?"),
        ({"instruction": "The sky?"}, "The sky?"),
        ({"prompt": [{"role": "user", "content": "The sky?", "name": None, "from": None}]}, "The sky?"),
        ({"prompt": [{"role": None, "content": None, "from": "human", "value": "The sky?"}]}, "The sky?"),
    ],
)
def test_every_shape_of_a_prompt(write, row, prompt):
    assert prompts(read_prompts(write(row))) == [prompt]


def test_verl_rows_keep_all_columns_and_gain_ground_truth(write):
    row = {
        "data_source": "gsm8k",
        "prompt": [user("2 + 2?")],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 0},
    }
    data = read_prompts(write(row))
    rest = {name: value for name, value in row.items() if name != "prompt"}
    assert data.prompts[0].columns == {**rest, "ground_truth": "4"}
    assert (
        data.summary() == "data.jsonl: 1 prompt; ground_truth for reward functions comes from the column 'reward_model'"
    )
    explicit_truth = read_prompts(write({**row, "ground_truth": "four"}))
    assert explicit_truth.prompts[0].columns["ground_truth"] == "four" and explicit_truth.notes == ()


def test_prompts_in_memory_can_be_messages():
    rows = prompt_rows([{"prompt": [system("Be brief."), user("Why?")], "n": 1}], "train_dataset")
    assert [(row.prompt, row.columns) for row in rows] == [("Be brief.\n\nWhy?", {"n": 1})]
    for prompt in ([], [system("Be brief.")], 3, [user("")]):
        with pytest.raises(DataError, match="train_dataset:0: no text"):
            prompt_rows([{"prompt": prompt}], "train_dataset")
    with pytest.raises(DataError, match="train_dataset:0: a message in 'prompt' has the role 'judge'"):
        prompt_rows([{"prompt": [{"role": "judge", "content": "x"}]}], "train_dataset")


def test_messages_of_tools_and_variables_of_the_template_are_kept():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [user("Why?"), call, {"role": "tool", "content": "3", "name": "f"}]
    row = {"prompt": messages, "tools": '[{"name": "f"}]', "chat_template_kwargs": {"enable_thinking": False}}
    (found,) = prompt_rows([row], "train_dataset")
    assert list(found.messages) == messages
    assert found.chat_template_kwargs == {"tools": [{"name": "f"}], "enable_thinking": False}
    with pytest.raises(DataError, match="train_dataset:0: 'tools' holds 'x', expected a list"):
        prompt_rows([{"prompt": "a", "tools": "x"}], "train_dataset")


DOCS = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_shapes_in_the_docs_give_the_same_pair(write):
    decoder, rows = json.JSONDecoder(), []
    for block in re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL):
        position = 0
        while position < len(block):
            row, position = decoder.raw_decode(block, position)
            rows.append(row)
            position += 1  # Skip the line break.
    assert len(rows) == 4
    for row in rows:
        data = read_preferences(write(row, json.loads(json.dumps(row).replace("sky", "sea"))))
        stripped = [tuple(map(str.strip, each)) for each in texts(data)]
        assert stripped == [("The sky is", "blue.", "green."), ("The sea is", "blue.", "green.")]


def test_docs_list_every_recognized_column():
    table = DOCS[DOCS.index("| default |") : DOCS.index("If two columns match")]
    named = set(re.findall(r"`(\w+)`", table)) - {"prompt", "chosen"}
    joined = {name for names in JOINED for name in names}
    assert named == {*PROMPTS, *joined, *SYSTEMS, HISTORY, *(name for pair in ANSWERS for name in pair)}


# --- flattened conversations -----------------------------------------------------------------------------------------------

LONG = [system("Be brief."), user("Up?"), assistant("Yes."), user("Sure?")]
FLATTENED = "Be brief.\n\nUp?\nAnswer: Yes.\nQuestion: Sure?"


def test_conversations_keep_their_messages_and_are_reported(write):
    path = write(
        {"prompt": LONG, "chosen": [assistant("I am.")], "rejected": [assistant("No.")]},
        {"prompt": "", "chosen": [*LONG, assistant("Ping it.")], "rejected": [*LONG, assistant("Why?")]},
        {"prompt": "Sure?", "chosen": [*LONG, assistant("So it says.")], "rejected": [*LONG, assistant("Sure.")]},
        explicit(*SKY),
    )
    data = read_preferences(path)
    assert texts(data) == [
        (FLATTENED, "I am.", "No."),
        (FLATTENED, "Ping it.", "Why?"),
        (FLATTENED, "So it says.", "Sure."),
        SKY,
    ]
    assert data.notes == ("3 rows with a system message or earlier turns",)
    assert prompts(read_prompts(path)) == [FLATTENED, SKY[0]]
    assert [list(row.messages) for row in read_prompts(path).rows] == [LONG, [user(SKY[0])]]
    assert [list(row.messages) for row in data.rows] == [LONG, LONG, LONG, [user(SKY[0])]]


def test_flattened_prompt_matches_the_plain_chat_template():
    import tiny
    from transformers import PreTrainedTokenizerFast

    from reinforcepp.models.conversations import format_prompt
    from reinforcepp.models.prompt_format import QUESTION_ANSWER_TEMPLATE

    tokenizer = tiny.tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.chat_template = QUESTION_ANSWER_TEMPLATE
    turns = LONG[1:]
    (row,) = prompt_rows([{"prompt": turns}], "x")
    framed = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert format_prompt(tokenizer, row.conversation) == framed


def test_prompt_ends_with_the_last_question(write):
    data = read_prompts(write({"messages": [*LONG, assistant("I am."), assistant("Bye.")]}, {"messages": LONG[:3]}))
    assert prompts(data) == [FLATTENED, "Be brief.\n\nUp?"]
    assert "2 rows with an answer at the end of the prompt, removed" in data.notes


def test_shared_messages_of_two_conversations_are_the_prompt(write):
    chosen = [user("a"), assistant("b"), user("c"), assistant("good")]
    rejected = [user("a"), assistant("b"), user("c"), assistant("bad"), assistant("worse")]
    data = read_preferences(write({"chosen": chosen, "rejected": rejected}, implicit(*SKY)))
    assert texts(data)[0] == ("a\nAnswer: b\nQuestion: c", "good", "bad\nworse")


def test_dialogues_as_text(write):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: I "
    data = read_preferences(write({"chosen": start + "know", "rejected": start + "do not"}, dialogue(*SKY)))
    assert texts(data)[0] == ("a\nAnswer: b\nQuestion: c", "I know", "I do not")
    assert "2 rows parsed as Human/Assistant dialogues" in data.notes


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("x")]},
            "with a user message inside an answer",
        ),
        (
            {"prompt": [user("a"), assistant("b")], "chosen": "c", "rejected": "d"},
            "with a prompt that doesn't end with a user message",
        ),
        ({"prompt": "z", **implicit("a", "b", "c")}, "with a prompt that differs from the prompt in its answers"),
        (
            {"prompt": [user("z")], **implicit("a", "b", "c")},
            "with a prompt that differs from the prompt in its answers",
        ),
        (
            {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [assistant("c")]},
            "with a whole conversation as only one of the answers",
        ),
        (
            {"prompt": [user("a"), system("s"), user("b")], "chosen": "c", "rejected": "d"},
            "with a system message that isn't the first message",
        ),
        ({"prompt": [], "chosen": "c", "rejected": "d"}, "empty prompt"),
        ({"prompt": [user(" ")], "chosen": "c", "rejected": "d"}, "empty prompt"),
        ({"prompt": [user("a"), assistant("b"), user("")], "chosen": "c", "rejected": "d"}, "empty prompt"),
        ({"prompt": [user("a")], "chosen": [], "rejected": "d"}, "empty chosen"),
        ({"prompt": [user("a")], "chosen": "b", "rejected": [assistant(None)]}, "empty rejected"),
        (implicit("a", "b", " b "), "with chosen equal to rejected"),
        (
            {"prompt": "a", "chosen": [{**assistant(None), "tool_calls": [{"id": "1"}]}], "rejected": [assistant("b")]},
            "with a tool call in an answer",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("b")]},
            "with answers to different prompts",
        ),
    ],
)
def test_rows_that_are_not_a_pair_are_skipped_and_reported(write, row, reason):
    data = read_preferences(write(explicit(*SKY), {"prompt": None, **row}, explicit(*SUN)))
    assert texts(data) == [SKY, SUN]
    assert [(each.row, each.reason) for each in data.skipped] == [(2, reason)]


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ([{"role": "judge", "content": "x"}], "has the role 'judge', not one of 'system', 'user', 'assistant', 'tool'"),
        ([{"role": 3, "content": "x"}], "has the role 3"),
        ([{"content": "x"}], "has no role"),
        ([{"role": "user", "content": 3}], "the content of a message in 'chosen' isn't text"),
        ([{"role": "user", "content": [{"type": "refusal"}]}], "the content of a message in 'chosen' isn't text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "value": "1.jpg"}]}],
            "a message in 'chosen' holds image data, but only text is supported",
        ),
        ("[{'role': 'user', 'content': 'x'}]", "'chosen' holds a list of messages as a string"),
        (4.5, "'chosen' holds 4.5, expected text or a list of messages"),
    ],
)
def test_cells_that_are_neither_text_nor_messages_are_errors(write, cell, problem):
    with pytest.raises(DataError) as caught:
        read_preferences(write(explicit(*SKY), {"prompt": "a", "chosen": cell, "rejected": "b"}))
    assert "data.jsonl:2: " in str(caught.value) and problem in str(caught.value)


# --- column names ---------------------------------------------------------------------------------------------------------


def test_recognized_columns_are_reported(write):
    rows = [{"question": a, "response_chosen": b, "response_rejected": c} for a, b, c in (SKY, SUN)]
    note = "prompts from the column 'question'; chosen and rejected from the columns 'response_chosen' and 'response_rejected'"
    assert read_preferences(write(*rows)).summary() == f"data.jsonl: 2 usable pairs; {note}"
    data = read_prompts(write(*rows))
    assert data.summary() == "data.jsonl: 2 prompts; prompts from the column 'question'"
    assert data.prompts[0].columns == {"response_chosen": SKY[1], "response_rejected": SKY[2]}


def test_skip_reasons_name_the_columns_of_the_file(write):
    rows = [{"question": a, "better": b, "worse": c} for a, b, c in (SKY, SUN, ("x", "", "y"), ("x", "y", "y"))]
    reasons = [each.reason for each in read_preferences(write(*rows)).skipped]
    assert reasons == ["empty better", "with better equal to worse"]


def test_default_and_configured_names_come_first(write):
    path = write({"prompt": "a", "question": "b", "q": "c"})
    assert prompts(read_prompts(path)) == ["a"] and read_prompts(path).notes == ()
    assert prompts(read_prompts(path, prompt_column="q")) == ["c"]
    pair = {"prompt": "p", "chosen": "g", "rejected": "b", "response_j": "j", "response_k": "k"}
    path = write(pair, {**pair, "prompt": "q"})
    assert texts(read_preferences(path))[0] == ("p", "g", "b")
    found = read_preferences(path, chosen_column="response_k", rejected_column="response_j")
    assert texts(found)[0] == ("p", "k", "j")


def test_ambiguous_columns_are_an_error(write):
    with pytest.raises(DataError, match=r"'question', 'query'.*with prompt_column.*prompt_column question\+query"):
        read_prompts(write({"question": "a", "query": "b"}))
    row = {"prompt": "a", "better": "b", "worse": "c", "response_j": "d", "response_k": "e"}
    with pytest.raises(DataError, match=r"'response_j', 'response_k' or 'better', 'worse'.*with chosen_column"):
        read_preferences(write(row, row))
    assert prompts(read_prompts(write(row))) == ["a"]  # Ambiguous answers don't matter for prompts.


def test_configured_name_has_no_substitute(write):
    path = write(*[{"question": a, "better": b, "worse": c} for a, b, c in (SKY, SUN)])
    with pytest.raises(DataError, match=r"no column 'questoin', only .*prompt_column. Did you mean 'question'"):
        read_prompts(path, prompt_column="questoin")
    with pytest.raises(DataError, match=r"no column 'bettr', only .*chosen_column"):
        read_preferences(path, chosen_column="bettr")
    # The prompt isn't taken from the answers, either.
    with pytest.raises(DataError, match="no column 'good'"):
        read_prompts(write(implicit(*SKY)), prompt_column="good")
    with pytest.raises(ConfigError, match=r"chosen_column and rejected_column .*'better'"):
        read_preferences(path, chosen_column="better", rejected_column="better")


def test_answer_column_is_not_used_as_prompt(write):
    rows = [{"question": a, "input": b, "query": c} for a, b, c in (SKY, SUN)]
    assert texts(read_preferences(write(*rows), chosen_column="input", rejected_column="query")) == [SKY, SUN]


def test_one_alternative_answer_column_is_not_enough(write):
    with pytest.raises(DataError, match="no column 'chosen', only 'prompt', 'response_chosen', 'rejected'"):
        read_preferences(write({"prompt": "a", "response_chosen": "b", "rejected": "c"}))


def test_columns_are_recognized_per_file(write, tmp_path):
    write({"prompt": SKY[0], "chosen": SKY[1], "rejected": SKY[2]}, name="a.jsonl")
    write(implicit(*SUN), name="b.jsonl")
    data = read_preferences(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl")
    assert texts(data) == [SKY, SUN]
    assert data.notes == ("prompts are the shared beginning of 'chosen' and 'rejected'",)
    write({"prompt": "a"}, name="b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl: the file has no column 'chosen'"):
        read_preferences(f"{tmp_path}/*.jsonl")
