"""Prompt format, tokenization, padding and masks."""

import pytest
import tiny

from reinforcepp.data import PromptRow
from reinforcepp.errors import DataError, ModelError
from reinforcepp.models import conversations
from reinforcepp.models import tokenization as tokens
from reinforcepp.models.prompt_format import QUESTION_ANSWER_TEMPLATE


@pytest.fixture
def tokenizer():
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = QUESTION_ANSWER_TEMPLATE
    return tokenizer


def test_the_plain_template(tokenizer):
    assert conversations.format_prompt(tokenizer, "Why?") == "Question: Why?\nAnswer:"
    assert conversations.format_completion(tokenizer, "Why?", "Because.") == " Because."


def test_a_completion_has_one_eos_unless_it_was_truncated(tokenizer):
    eos = tokenizer.eos_token_id
    ended = tokens.encode_example(tokenizer, "Why?", "Because.")
    cut = tokens.encode_example(tokenizer, "Why?", "Because.", finished=False)
    assert ended == [*cut, eos] and eos not in cut


def test_a_template_with_text_after_the_eos_still_ends_with_it(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert conversations.format_completion(tokenizer, "Why?", "Because.") == "Because."
    assert tokens.encode_example(tokenizer, "Why?", "Because.")[-1] == tokenizer.eos_token_id


def test_a_template_that_changes_the_prompt_raises(tokenizer):
    tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ModelError, match="training and inference would differ"):
        conversations.format_completion(tokenizer, "Why?", "Because.")


@pytest.fixture
def calls(monkeypatch, tokenizer):
    """Numbers of texts per call of the tokenizer."""
    seen, call = [], type(tokenizer).__call__

    def counted(self, text, *args, **named):
        seen.append(1 if isinstance(text, str) else len(text))
        return call(self, text, *args, **named)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    return seen


def test_examples_and_prompts_are_tokenized_in_batches(tokenizer, calls):
    eos = tokenizer.eos_token
    pairs = [(f"Why {i}?", f"Because of {i}.") for i in range(300)] + [("Why?", ""), (f"{eos}?", f"No {eos}.")]
    prompts, _ = tokens.encode_prompts(tokenizer, rows(*(prompt for prompt, _ in pairs)), max_prompt_length=99)
    examples = [tokens.Answers(prompt, (answer,)) for prompt, answer in pairs]
    split, whole = tokens.split_examples(tokenizer, examples), tokens.encode_examples(tokenizer, examples)
    texts = tokens.encode_texts(tokenizer, [answer for _, answer in pairs])
    assert calls.count(tokens.BATCH_ROWS) == 1 and sum(number > 40 for number in calls) == 6
    assert len(calls) < 60
    assert [list(prompt.ids) for prompt in prompts] == [tokens.encode_prompt(tokenizer, prompt) for prompt, _ in pairs]
    assert split == [tokens.split_example(tokenizer, *pair) for pair in pairs]
    assert whole == [[tokens.encode_example(tokenizer, *pair)] for pair in pairs]
    assert texts == [tokens.encode_text(tokenizer, answer) for _, answer in pairs]


def rows(*texts):
    return [PromptRow(text, {"topic": text[:1]}, i) for i, text in enumerate(texts)]


def test_long_prompts_are_truncated_on_the_left_and_keep_the_template(tokenizer):
    long = "alpha beta gamma delta " * 20 + "the end?"
    prompts, too_long = tokens.encode_prompts(tokenizer, rows("Why?", long), max_prompt_length=40)
    assert too_long == [1] and [p.key for p in prompts] == [0, 1]
    text = tokenizer.decode(prompts[1].ids)
    assert len(prompts[1].ids) <= 40
    assert text.startswith("Question: ") and text.endswith("the end?\nAnswer:")
    assert prompts[1].columns == {"topic": "a"}


def test_long_prompts_are_dropped_on_request(tokenizer):
    prompts, too_long = tokens.encode_prompts(
        tokenizer, rows("x " * 200, "Why?"), max_prompt_length=40, long_prompts="drop"
    )
    assert too_long == [0] and [p.key for p in prompts] == [1]


def test_truncation_leaves_no_broken_character(tokenizer):
    prompts, _ = tokens.encode_prompts(tokenizer, rows("日本語のネットワーク" * 20), max_prompt_length=41)
    assert "\ufffd" not in tokenizer.decode(prompts[0].ids)


def test_no_room_for_the_prompt_raises(tokenizer):
    with pytest.raises(DataError, match="leaves no room"):
        tokens.encode_prompts(tokenizer, rows("x " * 50), max_prompt_length=5)


def test_masks_come_from_lengths_not_from_ids():
    ids, mask = tokens.pad([[5, 0], [7, 0, 0]], pad_id=0)
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]] and ids.tolist() == [[5, 0, 0], [7, 0, 0]]
    _, left = tokens.pad([[5, 0], [7, 0, 0]], pad_id=0, left=True)
    assert left.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert tokens.position_ids(left).tolist() == [[0, 0, 1], [0, 1, 2]]


@pytest.mark.parametrize("kind", ["plain", "first", "each"])
def test_batches_give_the_same_ids(tokenizer, kind):
    if kind != "plain":
        tokenizer = tiny.sentencepiece_tokenizer(QUESTION_ANSWER_TEMPLATE, space=kind)
    rows = [
        tokens.Answers(*row)
        for row in (("Why?", ("So.", f"a {tokenizer.eos_token} b")), ("Why?", ("",)), ("Sure?", ("Yes.", "No.", "So.")))
    ]
    found = tokens.encode_examples(tokenizer, rows)
    assert found == [
        [tokens.encode_example(tokenizer, prompt, answer) for answer in answers] for prompt, answers, _ in rows
    ]
    assert tokens.encode_examples(tokenizer, []) == []
