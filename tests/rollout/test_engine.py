"""The text of a completion, as reward functions, logs and files show it."""

import tiny

from reinforcepp.models import tokenization as tokens
from reinforcepp.rollout.engine import partial_completions, to_completion
from reinforcepp.types import Completion, Prompt

TAGS = ("<think>", "</think>", "<|end_of_turn|>", "<|pad|>")
ANSWER = "<think>2 + 2</think> ping <tool>"


def tagged_tokenizer():
    """Return a tokenizer whose tags, end of turn and padding are special tokens."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS), "pad_token": "<|pad|>"})
    return tokenizer


def completion(tokenizer, text: str) -> Completion:
    ids = tokens.encode(tokenizer, text)
    ends = frozenset(tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "<|end_of_turn|>"]))
    return to_completion(tokenizer, ends, Prompt("p", (1,), 0), ids, [0.0] * len(ids))


def test_tags_that_are_special_tokens_stay_in_the_text():
    tokenizer = tagged_tokenizer()
    assert completion(tokenizer, ANSWER).text == ANSWER
    for end in ("<|end_of_turn|>", "<|endoftext|>"):
        finished = completion(tokenizer, ANSWER + end)
        assert finished.text == ANSWER and finished.finish_reason == "stop"
    assert completion(tokenizer, "<|pad|><think>a<|pad|>b<|end_of_turn|>").text == "<think>ab"


def test_a_stream_shows_the_same_text():
    tokenizer = tagged_tokenizer()
    whole = completion(tokenizer, ANSWER + "<|end_of_turn|>")
    *_, last = partial_completions(tokenizer, frozenset({whole.ids[-1]}), whole)
    assert last.text == whole.text == ANSWER
