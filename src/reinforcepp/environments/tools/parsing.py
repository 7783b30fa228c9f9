"""Find the calls of tools in a message of the policy, by the format in which the chat template writes calls.

transformers' parser splits a message into reasoning, content and calls. For the three formats below, the JSON of each call is
then read separately, so that one broken call doesn't hide the others, as it does in vLLM's parsers, and the policy sees what is
wrong with it. Special tokens such as ``[TOOL_CALLS]`` can be missing, because they aren't part of a completion's text.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reinforcepp.environments.tools.schemas import Tool, schemas
from reinforcepp.errors import ConfigError, ModelError, first_line, shown
from reinforcepp.models.conversations import PROBE_ANSWER, PROBE_PROMPT, format_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIX = "Set chat_template to one with tools, such as that of Qwen3, or use another model."
PROBE_TOOL, PROBE_VALUE = "probe_tool", "probe_value"
PROBE_SCHEMA = {
    "type": "function",
    "function": {
        "name": PROBE_TOOL,
        "description": "Probe.",
        "parameters": {
            "type": "object",
            "properties": {"probe_argument": {"type": "string", "description": "Probe."}},
            "required": ["probe_argument"],
        },
    },
}
PROBE_CALL = {
    "id": "probecall",
    "type": "function",
    "function": {"name": PROBE_TOOL, "arguments": {"probe_argument": PROBE_VALUE}},
}
THOUGHT = {"open": "<think>", "close": "</think>", "content": "text"}
CALL_START = r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"[^"]*"\s*,\s*"(?:parameters|arguments)"'


@dataclass(frozen=True)
class Call:
    """A call in a message; ``error`` says why it can't be read."""

    name: str
    arguments: Any
    error: str = ""


Parser = Callable[[str], list[Call]]


@dataclass(frozen=True)
class CallFormat:
    """How models of a family write calls.

    Attributes:
        written: matches the call of :data:`PROBE_CALL` in a conversation that the chat template wrote.
        opening: regular expression at the start of calls; ``{names}`` stands for the names of the tools.
        closing: regular expression at their end; None: they end with the message.
    """

    written: str
    opening: str
    closing: str | None


FORMATS = {
    "hermes": CallFormat(rf'<tool_call>\s*\{{"name": ?"{PROBE_TOOL}"', "<tool_call>", "</tool_call>"),
    "llama": CallFormat(rf'\{{"name": ?"{PROBE_TOOL}", ?"parameters"', rf"<\|python_tag\|>|(?={CALL_START})", None),
    "mistral": CallFormat(
        rf"\[TOOL_CALLS\].*{PROBE_TOOL}",
        rf"\[TOOL_CALLS\]|\A\s*(?=\[\s*{CALL_START}|(?:{{names}})(?:\[ARGS\])?\s*\{{)",
        r"(?=\[TOOL_CALLS\])",
    ),
}
"""``<tool_call>{json}</tool_call>`` of Hermes and Qwen; ``{json}; {json}`` of Llama 3; ``[TOOL_CALLS][{json}]`` and
``[TOOL_CALLS]name[ARGS]{json}`` of Mistral."""


def call_parser(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool]) -> Parser:
    """Return a function that finds the calls in a message, by the format of the tokenizer's chat template.

    Raises:
        ConfigError: the chat template omits tools, calls or results, or writes calls in an unknown format.
    """
    written = checked_template(tokenizer, tools)
    for call_format in FORMATS.values():
        if re.search(call_format.written, written, re.DOTALL):
            return format_parser(call_format, tools)
    template = _response_template(tokenizer)
    if template is None:
        raise ConfigError(
            "tools: the chat template writes calls in a format that isn't known: neither that of Hermes and Qwen, Llama 3 or "
            f"Mistral, nor one of transformers or TRL. {FIX}"
        )
    return lambda text: _template_calls(text, template, tools)


def checked_template(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool]) -> str:
    """Return a conversation with a call and its result as the chat template writes it.

    Raises:
        ConfigError: the chat template omits the tools, their calls or their results.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(f"tools: the tokenizer has no chat template. {FIX}")
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": PROBE_PROMPT},
        {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]},
        {"role": "tool", "name": PROBE_TOOL, "tool_call_id": PROBE_CALL["id"], "content": PROBE_ANSWER},
    ]
    try:
        prompt = format_prompt(tokenizer, PROBE_PROMPT, tools=[*schemas(tools), PROBE_SCHEMA])
        if PROBE_TOOL not in prompt:
            raise ConfigError(f"tools: the chat template omits the tools, so the model doesn't see them. {FIX}")
        written = format_prompt(tokenizer, messages)
    except ModelError as error:
        raise ConfigError(f"tools: {error} {FIX}") from error
    parts = {"calls of tools": PROBE_TOOL, "the arguments of calls": PROBE_VALUE, "results of tools": PROBE_ANSWER}
    omitted = [name for name, part in parts.items() if part not in written]
    if omitted:
        raise ConfigError(f"tools: the chat template omits {omitted[0]}. {FIX}")
    return written


def format_parser(call_format: CallFormat, tools: Sequence[Tool]) -> Parser:
    """Return a function that finds the calls in a message of the format."""
    from transformers.utils.chat_parsing import parse_response
    from transformers.utils.chat_parsing.response_templates import load_response_template

    opening = call_format.opening.replace("{names}", "|".join(re.escape(tool.name) for tool in tools))
    calls = {"open_pattern": opening, "repeats": True, "content": "text"}
    if call_format.closing is not None:
        calls["close_pattern"] = call_format.closing
    fields = {"reasoning_content": THOUGHT, "tool_calls": calls, "content": {"content": "text"}}
    template = load_response_template({"fields": fields, "start_anchor": "\0"})

    def parse(text: str) -> list[Call]:
        found = parse_response(text, template, prefix="")
        return [call for body in found.get("tool_calls", ()) for call in _calls_in(body)]

    return parse


# --- reading calls ----------------------------------------------------------------------------------------------------

NAME_FIRST = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
SEPARATOR = re.compile(r"[\s;,]*")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} isn't JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)


def _calls_in(body: str) -> Iterator[Call]:
    """Yield the calls in the text between the marks of a call; text after the last one is ignored."""
    if name := NAME_FIRST.match(body):
        arguments, error = _decoded(body, name.end())[::2]
        yield Call(name[1], arguments, error)
        return
    position = SEPARATOR.match(body).end()  # type: ignore[union-attr]  # it matches an empty text
    first = True
    while first or body[position : position + 1] in ("{", "["):
        value, position, error = _decoded(body, position)
        if error:
            yield Call("", None, error)
            return
        yield from (_call(each) for each in (value if isinstance(value, list) else [value]))
        position = SEPARATOR.match(body, position).end()  # type: ignore[union-attr]
        first = False


def _decoded(body: str, position: int) -> tuple[Any, int, str]:
    """Return the JSON value at ``position``, the position after it, and the problem if it can't be read."""
    try:
        return *DECODER.raw_decode(body, position), ""
    except json.JSONDecodeError as error:
        return None, position, f"the call isn't valid JSON ({error.msg}, character {error.pos - position + 1})"
    except (ValueError, RecursionError) as error:  # a huge number, NaN, or brackets in brackets
        return None, position, f"the call isn't valid JSON ({first_line(error)})"


def _call(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", None, f"a call must be a JSON object with name and arguments, not {shown(value)}")
    for key in ("arguments", "parameters"):
        if key in value:
            return Call(value["name"], value[key])
    return Call(value["name"], None, "the call has no arguments")


# --- other formats ----------------------------------------------------------------------------------------------------


def _response_template(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any] | None:
    """Return how transformers parses messages of the model: by the tokenizer's own template, or one that TRL knows."""
    from trl.chat_template_utils import add_response_schema

    own: Mapping[str, Any] | None = getattr(tokenizer, "response_template", None)
    if own is not None:
        return own
    probe = copy.copy(tokenizer)
    try:
        add_response_schema(probe)
    except ValueError:  # TRL doesn't know the chat template
        return None
    known: Mapping[str, Any] | None = getattr(probe, "response_template", None)
    return known


def _template_calls(text: str, template: Mapping[str, Any], tools: Sequence[Tool]) -> list[Call]:
    from transformers.utils.chat_parsing import parse_response

    try:
        calls = parse_response(text, dict(template), prefix="", tools=schemas(tools)).get("tool_calls", ())
        return [Call(str(call["function"]["name"]), call["function"].get("arguments", {})) for call in calls]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return [Call("", None, f"the call can't be read ({first_line(error)})")]
