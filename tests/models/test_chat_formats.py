"""Prompts and answers in the formats of chat models: BOS, end of turn, thoughts, and special tokens in the data."""

import logging

import pytest
import tiny
from transformers import GenerationConfig

from reinforcepp.config import ChatTemplateConfig
from reinforcepp.data import PromptRow, SftRow
from reinforcepp.errors import ConfigError
from reinforcepp.models import conversations, tokenization
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import eos_token_ids, prepare_tokenizer
from reinforcepp.models.prompt_format import QUESTION_ANSWER_TEMPLATE
from reinforcepp.models.saving import save_model
from reinforcepp.training.sft_trainer import to_example

FORMATS = {
    "chatml": tiny.CHATML,
    "thinking": tiny.THINKING,
    "prefilled": tiny.PREFILLED,
    "empty_thought": tiny.EMPTY_THOUGHT,
    "brackets": tiny.BRACKETS,
}


def prepared(tokenizer):
    return prepare_tokenizer(tokenizer, tiny.model(vocab_size=400).config, "tiny")


def whole_text(tokenizer, prompt, answer, **settings):
    return "".join(conversations.format_example(tokenizer, prompt, answer, **settings))


# --- BOS ----------------------------------------------------------------------------------------------------------------


def test_texts_of_a_base_model_begin_with_its_bos_exactly_once():
    tokenizer = prepared(tiny.chat_tokenizer(None, bos="<s>"))
    bos = tokenizer.bos_token_id
    (prompt,), _ = tokenization.encode_prompts(tokenizer, [PromptRow("Why?", {}, 0)], max_prompt_length=99)
    plain, answer = to_example(tokenizer, SftRow(None, "Why?")), to_example(tokenizer, SftRow("Why?", "So."))
    formatted = to_example(tokenizer, SftRow(None, "<s>Why?"))
    assert formatted.target == plain.target
    for ids in (prompt.ids, tokenization.encode_example(tokenizer, "Why?", "So."), plain.context, answer.context):
        assert ids[0] == bos and list(ids).count(bos) == 1
    assert [*plain.context, *plain.target] == [*tokenizer("Why?")["input_ids"], tokenizer.eos_token_id]
    assert answer.target.count(bos) == formatted.target.count(bos) == 0


@pytest.mark.parametrize("space", ["first", "each"])
@pytest.mark.parametrize("template", [None, tiny.BRACKETS])
def test_a_sentencepiece_tokenizer_puts_no_second_space_before_an_answer(space, template):
    tokenizer = prepared(tiny.sentencepiece_tokenizer(template, space=space))
    messages = [{"role": "user", "content": "Why so?"}, {"role": "assistant", "content": "So it is."}]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert tokenization.encode_example(tokenizer, "Why so?", "So it is.") == ids
    text = tokenizer.decode(tokenization.encode_example(tokenizer, "Why </s> so?", "So </s> it is."))
    assert "Why </s> so?" in text and "So </s> it is." in text and "  " not in text


def test_a_tokenizer_that_adds_no_bos_gets_none():
    tokenizer = prepared(tiny.tokenizer())
    assert tokenization.encode_prompt(tokenizer, "Why?") == tokenizer("Why?")["input_ids"]


# --- end of turn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_ids_equal_those_of_apply_chat_template(name):
    tokenizer = tiny.chat_tokenizer(FORMATS[name], bos="<s>")
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    context, target = tokenization.split_example(tokenizer, "Why?", "So it is.")
    assert context + target == ids[: len(context) + len(target)]
    assert target[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert tokenization.encode_prompt(tokenizer, "Why?") == prompt


def test_an_answer_ends_with_the_end_of_its_turn_whatever_eos_is(tmp_path):
    tokenizer = tiny.chat_tokenizer(tiny.CHATML, eos="<|endoftext|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenization.encode_example(tokenizer, "Why?", "So.")[-2:] == [tokenizer.encode(".")[-1], end]
    assert to_example(tokenizer, SftRow("Why?", "So.")).target[-1] == end
    policy = tiny.model(vocab_size=400)
    policy.generation_config.eos_token_id = [3, 5]
    assert eos_token_ids(policy, tokenizer) == {3, 5, end, tokenizer.eos_token_id}
    save_model(policy, tokenizer, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == sorted({3, 5, end, tokenizer.eos_token_id})


# --- thoughts -----------------------------------------------------------------------------------------------------------


THOUGHT = "<think>\nr\n</think>\n\n42"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("answer", [THOUGHT, "<think>r</think>42", "<think>one</think><think>two</think>42"])
def test_no_template_removes_a_thought(name, answer):
    text = whole_text(tiny.chat_tokenizer(FORMATS[name], bos="<s>"), "Why?", answer)
    assert "".join(answer.split()) in "".join(text.split())


def test_a_prefilled_thought_is_part_of_the_context():
    tokenizer = tiny.chat_tokenizer(tiny.PREFILLED, bos="<s>")
    start = "<s><|User|>Why?<|Assistant|>"
    assert conversations.format_example(tokenizer, "Why?", "42") == (start, "42")
    for answer in (THOUGHT, "r\n</think>\n\n42"):  # with and without the tag that the template writes
        assert conversations.format_example(tokenizer, "Why?", answer) == (f"{start}<think>\n", "r\n</think>\n\n42")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("answer", ["<think>\nlet me", "let me"])
def test_a_truncated_answer_is_written_as_sampled(name, answer):
    tokenizer = tiny.chat_tokenizer(FORMATS[name], bos="<s>")
    context, target = conversations.format_example(tokenizer, "Why?", answer, finished=False)
    assert (context + target).endswith(answer) and "</think>" not in target
    assert (context + target).count("<think>") <= 1


def test_a_finished_thought_without_an_answer_gets_no_second_thought():
    tokenizer = tiny.chat_tokenizer(tiny.THINKING)
    assert conversations.format_completion(tokenizer, "Why?", "<think>\nlet me") == "<think>\nlet me"


def test_an_answer_that_begins_with_another_tag_is_written_by_the_template():
    tokenizer = tiny.chat_tokenizer(tiny.THINKING)
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<b>So.</b>"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "<think>" in whole
    assert whole == whole_text(tokenizer, "Why?", "<b>So.</b>") + "<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "prefill"),
    [
        (tiny.PREFILLED, "<think>\n"),
        (tiny.EMPTY_THOUGHT, "<think>\n"),
        (tiny.THINKING, ""),
        (tiny.CHATML, ""),
        (
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}",
            "",
        ),
    ],
)
def test_what_the_template_writes_of_an_answer(template, prefill):
    tokenizer = tiny.chat_tokenizer(template, bos="<s>")
    (prompt,), _ = tokenization.encode_prompts(tokenizer, [PromptRow("Why?", {}, 0)], max_prompt_length=99)
    assert prompt.prefill == prefill


@pytest.mark.parametrize(
    "template",
    ["{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "{{ messages[0]['content'] }}"],
)
def test_a_template_that_cant_format_an_answer_is_refused_before_training(template):
    tokenizer = tiny.chat_tokenizer(template)
    with pytest.raises(ConfigError, match="chat template"):
        with_chat_template(tokenizer, ChatTemplateConfig())


# --- special tokens in the data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "text", ["one <|im_end|> two", "<|im_end|>", "<s>", "a<|im_start|>system\nb", "x <|endoftext|>"]
)
def test_special_tokens_of_the_data_are_plain_text(name, text, caplog):
    tokenizer = tiny.chat_tokenizer(FORMATS[name], bos="<s>")
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)

    def structure(*texts):
        return [token for token in tokenization.encode_example(tokenizer, *texts) if token in special]

    expected = structure("Why?", "So.")
    with caplog.at_level(logging.WARNING):
        assert structure(text, "So.") == structure("Why?", text) == expected
    assert "special token of the tokenizer" in caplog.text
    assert text.strip() in tokenizer.decode(tokenization.encode_example(tokenizer, "Why?", text))
    assert text in tokenizer.decode(tokenization.encode_prompt(tokenizer, text))


def test_pairs_of_tags_stay_tokens():
    tokenizer = tiny.chat_tokenizer(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"))
    ids = tokenization.encode_example(tokenizer, "Why?", "<think>a</think> b <|im_end|> c")
    assert [ids.count(tokenizer.convert_tokens_to_ids(tag)) for tag in ("<think>", "</think>", "<|im_end|>")] == [
        1,
        1,
        2,
    ]


# --- the pad token of reward models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special", "vocab_size", "pad", "rows"),
    [
        (("<|endoftext|>", "<|im_end|>", "<|finetune_right_pad_id|>"), 320, "<|finetune_right_pad_id|>", 320),
        (("<|endoftext|>", "<|im_end|>"), 330, "<|pad|>", 330),
        (("<|endoftext|>", "<|im_end|>"), 320, "<|pad|>", 321),
    ],
    ids=["unused token", "spare row", "new row"],
)
def test_plain_transformers_scores_like_a_saved_reward_model(special, vocab_size, pad, rows, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from reinforcepp.models.padding import separate_pad_token
    from reinforcepp.models.reward_models import load_reward_weights, new_reward_model
    from reinforcepp.rewards.trained import TrainedReward

    tokenizer = tiny.chat_tokenizer(tiny.CHATML, special=special)
    tokenizer.pad_token = tokenizer.eos_token
    tiny.model("llama", vocab_size=vocab_size).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = new_reward_model(str(tmp_path / "base"), seed=1)
    separate_pad_token(model, tokenizer, resize=True)
    save_model(model, tokenizer, tmp_path / "reward")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert tokenizer.pad_token == pad and model.get_input_embeddings().weight.shape[0] == rows
    texts = ["Run ip route and read the default line.", "No."]
    ours = TrainedReward(load_reward_weights(tmp_path / "reward"), tokenizer)(["Why?"] * 2, texts)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    chats = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}] for text in texts]
    ids = [
        i[: len(i) - i[::-1].index(tokenizer.eos_token_id)] for i in tokenizer.apply_chat_template(chats)["input_ids"]
    ]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
    assert plain(**batch).logits.flatten().tolist() == pytest.approx(ours, abs=1e-4)


def test_an_adapter_without_a_free_token_keeps_eos_as_pad_and_says_so(caplog):
    from reinforcepp.models.padding import separate_pad_token

    tokenizer = tiny.tokenizer()
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, QUESTION_ANSWER_TEMPLATE
    separate_pad_token(tiny.model(), tokenizer, resize=False)
    assert tokenizer.pad_token == tokenizer.eos_token and "pads with EOS" in caplog.text
