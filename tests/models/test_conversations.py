"""Conversations reach the model as its chat template renders them, in training and in use."""

import pytest
import tiny
import torch

from reinforcepp import ModelError, encode_answer, encode_prompt
from reinforcepp.commands.reward_server import score_request
from reinforcepp.data import PromptRow, SftRow
from reinforcepp.models.prompt_format import QUESTION_ANSWER_TEMPLATE
from reinforcepp.models.tokenization import Answers, encode_examples, encode_prompts, split_example
from reinforcepp.rewards.functions import score_with
from reinforcepp.rewards.trained import TrainedReward, score_pairs
from reinforcepp.training.sft_trainer import to_example
from reinforcepp.types import Completion, Preference

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if quiet %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
IGNORES_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)


def message(role, content):
    return {"role": role, "content": content}


SYSTEM, FIRST, REPLY, LAST = (
    message("system", "Be brief."),
    message("user", "  Why is the Wi-Fi slow?\n"),
    message("assistant", "\n\n  Measure first. "),
    message("user", "请解释一下默认路由。\n\n"),
)
CONVERSATIONS = [
    [FIRST],
    [SYSTEM, LAST],
    [SYSTEM, FIRST, REPLY, LAST],
    [FIRST, message("assistant", "Call."), message("tool", "{1}"), LAST],
]
ANSWERS = ["Run ip route.", "\n\n  indented\n", " 默认路由 \n\n", "x"]


def tokenizer_with(template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def templated(tokenizer, messages, **variables):
    return tokenizer.apply_chat_template(messages, return_dict=True, **variables)["input_ids"]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("prompt", CONVERSATIONS)
def test_ids_are_those_of_the_template_everywhere(prompt, answer):
    tokenizer = tokenizer_with(CHATML)
    start = templated(tokenizer, prompt, add_generation_prompt=True)
    whole = templated(tokenizer, [*prompt, message("assistant", answer)])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    whole = whole[: len(whole) - whole[::-1].index(end)]
    ((rollout,), _) = encode_prompts(tokenizer, [PromptRow("a", {}, messages=tuple(prompt))], max_prompt_length=9999)
    assert list(rollout.ids) == encode_prompt(tokenizer, prompt) == start
    assert rollout.conversation == tuple(prompt)
    assert encode_answer(tokenizer, prompt, answer) == whole
    assert encode_examples(tokenizer, [Answers(prompt, (answer,))]) == [[whole]]
    example = to_example(tokenizer, SftRow("a", answer, messages=tuple(prompt)))
    assert example.context + example.target == whole
    assert example.context == whole[: len(example.context)] and len(example.context) >= len(start) - 1


def test_a_token_across_the_border_belongs_to_the_answer():
    tokenizer = tokenizer_with(CHATML)
    start = encode_prompt(tokenizer, "Why?")
    context, target = split_example(tokenizer, "Why?", "\n\nSo.")
    assert context + target == encode_answer(tokenizer, "Why?", "\n\nSo.")
    assert context == start[: len(context)]


@pytest.mark.parametrize("template", [NO_SYSTEM, IGNORES_SYSTEM])
def test_a_system_message_that_the_template_cannot_write_is_put_before_the_first_question(template):
    tokenizer = tokenizer_with(template)
    folded = [message("user", f"{SYSTEM['content']}\n\n{FIRST['content']}"), REPLY, LAST]
    assert encode_prompt(tokenizer, [SYSTEM, FIRST, REPLY, LAST]) == encode_prompt(tokenizer, folded)
    assert encode_answer(tokenizer, [SYSTEM, FIRST], "So.") == encode_answer(tokenizer, folded[:1], "So.")


def test_a_conversation_that_the_template_rejects_is_an_error():
    with pytest.raises(ModelError, match=r"user, user \(roles must alternate\)"):
        encode_prompt(tokenizer_with(ALTERNATES), [FIRST, LAST])


def test_variables_of_a_row_reach_the_template():
    tokenizer = tokenizer_with(CHATML)
    quiet = templated(tokenizer, [FIRST], add_generation_prompt=True, quiet=True)
    assert encode_prompt(tokenizer, [FIRST], quiet=True) == quiet != encode_prompt(tokenizer, [FIRST])
    row = PromptRow("a", {}, messages=(FIRST,), chat_template_kwargs={"quiet": True})
    ((prompt,), _) = encode_prompts(tokenizer, [row], max_prompt_length=9999)
    assert list(prompt.ids) == quiet
    assert encode_answer(tokenizer, [FIRST], "So.", quiet=True) == encode_answer(tokenizer, [FIRST], "So.")


def test_truncation_drops_the_oldest_turns_and_keeps_the_system_message():
    tokenizer = tokenizer_with(CHATML)
    last_turn = encode_prompt(tokenizer, [SYSTEM, LAST])
    row = PromptRow("a", {}, messages=(SYSTEM, FIRST, REPLY, LAST))
    for limit in (len(last_turn), len(last_turn) + 3):
        ((prompt,), long) = encode_prompts(tokenizer, [row], max_prompt_length=limit)
        assert list(prompt.ids) == last_turn and long == [0]
    ((prompt,), _) = encode_prompts(tokenizer, [row], max_prompt_length=len(last_turn) - 2)
    text = tokenizer.decode(prompt.ids)
    assert "Be brief." in text and len(prompt.ids) <= len(last_turn) - 2 and LAST["content"].strip()[-3:] in text


class Recorder(TrainedReward):
    """Keeps the token ids that it would score."""

    def score_outputs(self, rows, report=None):
        self.rows = list(rows)
        return torch.zeros(len(rows), 1)


@pytest.mark.parametrize("form", ["answer", "conversation"])
@pytest.mark.parametrize("messages", [(), (SYSTEM, LAST)])
def test_a_reward_model_scores_rollouts_with_the_variables_of_its_training(form, messages):
    tokenizer = tokenizer_with("{% if quiet %}Quiet! {% endif %}" + CHATML)
    reward, variables = Recorder(torch.nn.Module(), tokenizer), {"quiet": True}
    reward.form = form
    score_pairs(reward, [Preference("Why?", "No.", "So.", messages=messages, chat_template_kwargs=variables)])
    _, trained = reward.rows
    assert tokenizer.decode(trained).startswith("Quiet! ")
    row = PromptRow("Why?", {"chat_template_kwargs": '{"quiet": true}'}, 0, 1.0, messages, variables)
    ((prompt,), _) = encode_prompts(tokenizer, [row], max_prompt_length=9999)
    score_with([reward], [Completion(prompt, (1,), (0.0,), "So.", "stop")])
    assert reward.rows == [trained]
    score_with([reward], [Completion(prompt, (1,), (0.0,), "So", "length")])
    assert tokenizer.decode(reward.rows[0]).startswith("Quiet! ")
    request = {"query": ["Why?So."], "prompts": ["Why?"], "chat_template_kwargs": [variables]}
    score_request(reward, request | ({"messages": [list(messages)]} if messages else {}))
    assert reward.rows == [trained]


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (QUESTION_ANSWER_TEMPLATE, "omits tool calls and results of tools"),
        (CHATML, "omits tool calls of"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls | tojson if m.tool_calls }}"), None),
    ],
)
def test_a_template_that_omits_tools_is_reported_once(template, lost, caplog):
    tokenizer = tokenizer_with(template)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [FIRST, {**message("assistant", ""), "tool_calls": [call]}, message("tool", "3")]
    encode_prompt(tokenizer, [FIRST])
    assert not caplog.records
    for _ in range(2):
        encode_prompt(tokenizer, messages)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == (lost is not None) and all(str(lost) in text for text in texts)
