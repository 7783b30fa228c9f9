"""Prompts of models without a chat template: plain text by default, or ``Question: ... Answer:``."""

import json

import pytest
import tiny
from transformers import AutoTokenizer

from reinforcepp import encode_answer, encode_prompt
from reinforcepp.commands.chat.conversation import Conversation
from reinforcepp.config import RewardModelConfig, SftConfig
from reinforcepp.data import PromptRow, SftRow
from reinforcepp.errors import ConfigError
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.conversations import format_example, format_prompt
from reinforcepp.models.loading import prepare_tokenizer
from reinforcepp.models.prompt_format import prompt_form
from reinforcepp.models.tokenization import split_example
from reinforcepp.rollout.engine import to_completion
from reinforcepp.training.prompt_summary import print_prompt_format
from reinforcepp.types import Completion, Preference, Prompt

TOKENIZERS = {
    "gpt2": tiny.tokenizer,
    "llama3": lambda: tiny.chat_tokenizer(None, bos="<s>", eos="<|endoftext|>"),
    "llama2": lambda: tiny.sentencepiece_tokenizer(None),
    "llama1": lambda: tiny.sentencepiece_tokenizer(None, space="each"),
}
ROWS = [
    ("The sky is", " blue."),
    ("The sky is", "blue."),
    ("  How do I ping it? \n\n", "\tRun ping.\n"),
    (" a", "b "),
    ("def f(x):\n    return", " x\n\n"),
    ("Wie heißt der Router?\n", "Grüße, 天空 ."),
]
TALK = [
    {"role": "user", "content": "Is it up?"},
    {"role": "assistant", "content": " Yes. "},
    {"role": "user", "content": "Sure?"},
]
TALK_TEXT = "Question: Is it up?\nAnswer: Yes.{eos}Question: Sure?\nAnswer:"


def prepared(name="gpt2"):
    return prepare_tokenizer(TOKENIZERS[name](), tiny.model().config, name)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_prompts_and_answers_are_tokenized_as_by_the_tokenizer_alone(name):
    tokenizer = prepared(name)
    assert prompt_form(tokenizer) == "plain"
    for prompt, answer in ROWS:
        start = tokenizer(prompt)["input_ids"]
        whole = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        assert encode_prompt(tokenizer, prompt) == start
        assert encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) == start
        assert encode_answer(tokenizer, prompt, answer) == whole
        context, target = split_example(tokenizer, prompt, answer)
        assert context + target == whole
        assert split_example(tokenizer, prompt, answer, finished=False)[1][-1:] == whole[-2:-1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_in_plain_text_are_text(name):
    tokenizer = prepared(name)
    eos = tokenizer.eos_token
    ids = encode_answer(tokenizer, f"Write {eos}.", f" {eos} is it.")
    assert ids.count(tokenizer.eos_token_id) == 1 + (tokenizer("a")["input_ids"][0] == tokenizer.eos_token_id)
    assert tokenizer.decode(ids).count(eos) == 3


def test_conversations_of_a_plain_model_get_labels():
    tokenizer = prepared()
    text = TALK_TEXT.format(eos=tokenizer.eos_token)
    assert format_prompt(tokenizer, TALK) == text
    assert format_example(tokenizer, TALK, "Ping it.") == (text, " Ping it.")
    system = [{"role": "system", "content": "Be brief."}, TALK[0]]
    assert format_prompt(tokenizer, system) == "Be brief.\n\nQuestion: Is it up?\nAnswer:"
    tools = [TALK[0], {"role": "assistant", "content": "ping"}, {"role": "tool", "content": "3 ms"}]
    assert format_prompt(tokenizer, tools).endswith(f"Answer: ping{tokenizer.eos_token}Tool: 3 ms\nAnswer:")


def test_a_chat_with_a_plain_model():
    tokenizer = prepared()
    chat = Conversation(tokenizer, room=200)
    first = chat.ask("Is it up?")
    assert first.ids == tuple(tokenizer("Is it up?")["input_ids"])
    chat.answered(Completion(first, (1,), (0.0,), " Yes. ", "stop"))
    expected = tokenizer(TALK_TEXT.format(eos=tokenizer.eos_token))["input_ids"]
    assert chat.ask("Sure?").ids == tuple(expected)


@pytest.mark.parametrize("prompt", ["The sky is", TALK])
@pytest.mark.parametrize("finished", [True, False])
def test_a_sampled_answer_is_scored_with_the_sampled_tokens(prompt, finished):
    tokenizer = prepared()
    start, sampled = encode_prompt(tokenizer, prompt), tokenizer(" blue, I think")["input_ids"]
    sampled += [tokenizer.eos_token_id] * finished
    asked = Prompt("", tuple(start), 0, messages=() if isinstance(prompt, str) else tuple(prompt))
    completion = to_completion(tokenizer, frozenset([tokenizer.eos_token_id]), asked, sampled, [0.0] * len(sampled))
    assert completion.text == " blue, I think"
    context, target = split_example(tokenizer, prompt, completion.text, finished=finished)
    assert context + target == start + sampled


# --- the setting ----------------------------------------------------------------------------------------------------------


def formatted(form, tokenizer=None, **settings):
    return with_chat_template(tokenizer or prepared(), SftConfig(prompt_format=form, **settings))


def test_question_answer_by_a_setting_is_saved_with_the_tokenizer(tmp_path):
    formatted("question_answer", prepared("llama3")).save_pretrained(tmp_path)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(tmp_path), tiny.model().config, "saved")
    assert formatted("auto", tokenizer) is tokenizer and prompt_form(tokenizer) == "question_answer"
    assert format_example(tokenizer, "Why?", "So.") == ("<s>Question: Why?\nAnswer:", " So.")
    assert format_prompt(formatted("plain", tokenizer), "Why?") == "<s>Why?"


def test_plain_text_is_saved_with_the_tokenizer(tmp_path):
    formatted("auto").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert prompt_form(tokenizer) == "plain"
    assert tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, tokenize=False) == "Is it up?"


def test_the_chat_template_of_a_model_is_used_unless_a_format_is_set():
    tokenizer = prepare_tokenizer(tiny.chat_tokenizer(), tiny.model().config, "chat")
    assert prompt_form(formatted("auto", tokenizer)) == "chat template"
    assert format_prompt(tokenizer, " Why? ") == "<|im_start|>user\n Why? <|im_end|>\n<|im_start|>assistant\n"
    assert encode_prompt(formatted("plain", tokenizer), "Why?") == tokenizer("Why?")["input_ids"]


def test_a_system_prompt_of_a_plain_model_gets_labels():
    tokenizer = formatted("auto", system_prompt="Be brief.")
    assert prompt_form(tokenizer) == "plain"
    assert format_example(tokenizer, "Why?", "So.") == ("Be brief.\n\nQuestion: Why?\nAnswer:", " So.")


@pytest.mark.parametrize(("began", "form"), [({}, "question_answer"), ({"prompt_format": "auto"}, "plain")])
def test_a_resumed_run_of_an_earlier_version_keeps_its_format(tmp_path, began, form):
    (tmp_path / "run.json").write_text(json.dumps({"settings": began}))
    resumed = {"output_dir": str(tmp_path), "resume": True}
    assert prompt_form(formatted("auto", **resumed)) == form
    chat = prepare_tokenizer(tiny.chat_tokenizer(), tiny.model().config, "chat")
    assert prompt_form(formatted("auto", chat, **resumed)) == "chat template"


def test_a_format_and_a_template_together_are_an_error():
    for config in (SftConfig, RewardModelConfig):
        with pytest.raises(ConfigError, match="prompt_format: plain and chat_template"):
            config(prompt_format="plain", chat_template="{{ messages }}")


# --- the summary ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def printed(capsys):
    def printed(tokenizer, rows, ids=(0,)):
        print_prompt_format(tokenizer, rows, list(ids))
        return capsys.readouterr().err

    return printed


def test_the_summary_shows_the_form_and_an_example(printed):
    pairs = [Preference("The sky is", " blue.", " red."), Preference("p", " a", " b", messages=tuple(TALK))]
    tokenizer = prepared("llama3")
    out = printed(tokenizer, pairs, encode_answer(tokenizer, "The sky is", " blue."))
    assert "Prompt format: plain text (1 of 2 prompts have several messages" in out
    assert "First example: '<s>The sky is blue.<|endoftext|>'" in out and "run together" not in out
    assert "Prompt format: question_answer. First" in printed(formatted("question_answer"), pairs)
    chat = prepare_tokenizer(tiny.chat_tokenizer(), tiny.model().config, "chat")
    long = printed(chat, pairs, encode_answer(chat, "Why? " * 200, "So."))
    assert "Prompt format: chat template. First example: '<|im_start|>user" in long and len(long) < 600
    assert long.endswith("assistant\\nSo.<|im_end|>'\n")
    assert printed(tokenizer, [SftRow(None, "A text.")]).startswith("Texts are trained on as they are.")


def test_answers_that_run_into_their_prompts_are_reported(printed):
    pairs = [
        Preference("Is it up?", "Ping it.", "No."),
        Preference("Where?", "Here.", "No."),
        Preference("a ", "b", "c"),
    ]
    tokenizer = prepared()
    assert "(as in 'Is it up?Ping it.'). Begin the answers with a space" in printed(tokenizer, pairs)
    assert "run together" in printed(tokenizer, [SftRow("Where?", "Here.")])
    assert "run together" not in printed(tokenizer, pairs[1:])
    assert "run together" not in printed(tokenizer, [Preference("空は何色ですか", "青", "緑")])
    assert "run together" not in printed(tokenizer, [PromptRow("Is it up?", {})])
    assert "run together" not in printed(formatted("question_answer"), pairs)
