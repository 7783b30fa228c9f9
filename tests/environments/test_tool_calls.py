"""Calls in messages: the format is that of the chat template, and every family's calls are found, broken ones, too."""

from __future__ import annotations

import json

import pytest
import tiny
from real_tokenizers import folder_of
from transformers import AutoTokenizer

from reinforcepp.environments import examples
from reinforcepp.environments.tools.parsing import FORMATS, Call, call_parser, format_parser
from reinforcepp.environments.tools.schemas import load_tools
from reinforcepp.errors import ConfigError

TOOLS = load_tools([examples.calculator, examples.search_notes])
ADD = {"name": "calculator", "arguments": {"expression": "1 + 2"}}
FIND = {"name": "search_notes", "arguments": {"query": 'a {"b"} \n'}}
CALLS = [Call("calculator", {"expression": "1 + 2"}), Call("search_notes", {"query": 'a {"b"} \n'})]

WRITTEN_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
HERMES = (  # as Hermes 2 Pro and Qwen
    WRITTEN_TOOLS + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '<tool_call>\n' + (c['function'] | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (  # as Mistral 7B v0.3
    "{% if tools %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}{% for m in messages %}"
    "{% if m['tool_calls'] %}{{ '[TOOL_CALLS][' }}{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}{% endfor %}]"
    "{% elif m['role'] == 'tool' and m['tool_call_id'] | length != 9 %}{{ raise_exception('the id has 9 characters') }}"
    "{% else %}{{ '[' + m['role'] + ']' + m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
)
PYTHONIC = HERMES.replace("<tool_call>", "<call>")


def written(name: str, *calls: dict) -> str:
    """A message with calls in the format ``name``."""
    texts = [json.dumps(call) for call in calls]
    if name == "hermes":
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    if name == "llama":
        return "<|python_tag|>" + "; ".join(text.replace('"arguments"', '"parameters"') for text in texts)
    if name == "mistral":
        return f"[TOOL_CALLS][{', '.join(texts)}]"
    return "".join(f"[TOOL_CALLS]{call['name']}[ARGS]{json.dumps(call['arguments'])}" for call in calls)


def parsed(name: str, text: str) -> list[Call]:
    return format_parser(FORMATS[name.removesuffix(" 11")], TOOLS)(text)


# --- formats ----------------------------------------------------------------------------------------------------------

NAMES = ["hermes", "llama", "mistral", "mistral 11"]


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_found(name):
    assert parsed(name, written(name, ADD)) == CALLS[:1]
    assert parsed(name, written(name, ADD, FIND)) == CALLS
    assert parsed(name, "The sum is 3.") == []
    assert parsed(name, "") == []


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_that_the_text_of_a_completion_does_not_have(name):
    text = written(name, ADD, FIND) if name != "mistral 11" else written(name, ADD)
    bare = text.replace("<|python_tag|>", "").replace("[TOOL_CALLS]", "").replace("[ARGS]", "")
    assert parsed(name, bare) == CALLS[: 1 if name == "mistral 11" else 2]


@pytest.mark.parametrize("name", NAMES)
def test_text_around_calls_and_reasoning_before_them(name):
    thought = f"<think>\nI could write {written(name, FIND)}.\n</think>\n\n"
    assert parsed(name, f"{thought}I look it up. {written(name, ADD)}") == CALLS[:1]
    assert parsed(name, f"{thought}It is 3.") == []
    assert parsed(name, thought.partition("</think>")[0]) == []


@pytest.mark.parametrize("end", ["", " And then?", "\n<tool_response>\n3\n</tool_response>"])
@pytest.mark.parametrize("name", ["hermes", "llama"])
def test_text_after_a_call(name, end):
    assert parsed(name, written(name, ADD) + end) == CALLS[:1]


def test_a_call_without_its_end_is_found():
    assert parsed("hermes", written("hermes", ADD).removesuffix("\n</tool_call>")) == CALLS[:1]


@pytest.mark.parametrize("name", NAMES)
def test_broken_json_is_a_call_with_an_error(name):
    (call,) = parsed(name, written(name, ADD).replace('"1 + 2"', "1 + 2"))
    assert "isn't valid JSON (Expecting" in call.error


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("", "isn't valid JSON"),
        ("oops", "isn't valid JSON"),
        ('{"name": "calculator", "arguments": {"expression": NaN}}', "NaN isn't JSON"),
        (f'{{"name": "calculator", "arguments": {{"expression": {"9" * 5000}}}}}', "isn't valid JSON"),
        ("[" * 100_000, "isn't valid JSON"),
        ('{"name": "calculator"}', "no arguments"),
        ('{"name": 3, "arguments": {}}', "must be a JSON object with name and arguments"),
        ("3", "must be a JSON object with name and arguments"),
    ],
)
def test_a_call_that_is_not_one_has_an_error(body, error):
    (call,) = parsed("hermes", f"<tool_call>{body}</tool_call>")
    assert error in call.error


def test_one_broken_call_does_not_hide_the_others():
    broken = written("hermes", ADD).replace("}", "")
    calls = parsed("hermes", f"{written('hermes', ADD)}\n{broken}\n{written('hermes', FIND)}")
    assert [call.name for call in calls] == ["calculator", "", "search_notes"]
    assert [bool(call.error) for call in calls] == [False, True, False]


@pytest.mark.parametrize("text", ['Use {"name": "Ada", "age": 3}.', "The name {x}.", "calculator is a tool.", "[1, 2]"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_json_in_an_answer_is_not_a_call(name, text):
    assert parsed(name, text) == []


# --- chat templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "name"), [(HERMES, "hermes"), (MISTRAL, "mistral")])
def test_the_format_is_that_of_the_chat_template(template, name):
    parse = call_parser(tiny.chat_tokenizer(template), TOOLS)
    assert parse(written(name, ADD, FIND)) == CALLS


def test_a_tokenizer_with_its_own_response_template():
    tokenizer = tiny.chat_tokenizer(PYTHONIC)
    with pytest.raises(ConfigError, match=r"in a format that isn't known.*Set chat_template"):
        call_parser(tokenizer, TOOLS)
    calls = {"open": "<call>", "close": "</call>", "repeats": True, "content": "json"}
    fields = {"tool_calls": calls | {"transform": {"type": "function", "function": "{content}"}}, "content": {}}
    tokenizer.response_template = {"start_anchor": "assistant\n", "fields": fields}
    parse = call_parser(tokenizer, TOOLS)
    text = written("hermes", ADD, FIND).replace("tool_call>", "call>")
    assert parse(text) == CALLS
    (call,) = parse(text.replace("}", ""))
    assert "can't be read" in call.error


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "the tokenizer has no chat template"),
        (tiny.CHATML, "omits the tools, so the model doesn't see them"),
        (WRITTEN_TOOLS + tiny.CHATML, "omits calls of tools"),
        (HERMES.replace("(c['function'] | tojson)", "c['function']['name']"), "omits the arguments of calls"),
        (HERMES.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}"), "omits results"),
        (WRITTEN_TOOLS + tiny.BRACKETS, "can't format the conversation of the roles user, assistant, tool"),
    ],
)
def test_a_chat_template_without_tools_is_refused(template, problem):
    with pytest.raises(ConfigError, match=r"^tools: .*Set chat_template to one with tools") as error:
        call_parser(tiny.chat_tokenizer(template), TOOLS)
    assert problem in str(error.value)


# --- real tokenizers --------------------------------------------------------------------------------------------------


def real(name: str):
    from trl import chat_template_utils

    tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
    if name == "llama3_1":  # the copy at hand is that of Llama 3, without tools
        tokenizer.add_tokens(["<|python_tag|>"], special_tokens=True)
        tokenizer.chat_template = chat_template_utils.llama3_1_chat_template
    return tokenizer


@pytest.mark.full
@pytest.mark.parametrize(("tokenizer", "name"), [("qwen3", "hermes"), ("llama3_1", "llama")])
def test_real_tokenizers(tokenizer, name):
    parse = call_parser(real(tokenizer), TOOLS)
    assert parse(written(name, ADD, FIND)) == CALLS


@pytest.mark.full
def test_a_real_template_without_tools_is_refused():
    with pytest.raises(ConfigError, match="Set chat_template"):
        call_parser(AutoTokenizer.from_pretrained(folder_of("gemma3")), TOOLS)


def test_a_template_that_only_trl_knows():
    from trl import chat_template_utils

    tokenizer = tiny.chat_tokenizer(chat_template_utils.qwen3_5_nothink_chat_template)
    text = "<tool_call>\n<function=calculator>\n<parameter=expression>\n1 + 2\n</parameter>\n</function>\n</tool_call>"
    assert call_parser(tokenizer, TOOLS)(f"I add.\n\n{text}") == CALLS[:1]


@pytest.mark.full
@pytest.mark.parametrize(("tokenizer", "name"), [("qwen3", "hermes"), ("llama3_1", "llama")])
def test_calls_are_those_that_vllm_finds(tokenizer, name):
    parsers = pytest.importorskip("vllm.tool_parsers")
    parser = parsers.ToolParserManager.get_tool_parser({"hermes": "hermes", "llama": "llama3_json"}[name])
    for text in (written(name, ADD), written(name, ADD, FIND), "It is 3.", f"I add. {written(name, ADD)}"):
        found = parser(real(tokenizer)).extract_tool_calls(text, None).tool_calls
        ours = parsed(name, text)
        assert [(call.function.name, json.loads(call.function.arguments)) for call in found] == [
            (call.name, call.arguments) for call in ours
        ]
