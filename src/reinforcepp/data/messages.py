"""From a row's cells to training texts: plain text, lists of messages, and pairs that contain their prompt.

A text that is a whole dialogue (``Human: ... Assistant: ...``) counts as the list of its messages.

A conversation keeps its messages, for the chat template, and gets a text, by which people see it and rows are compared. With
a single user turn, that is its message. Otherwise:
``SYSTEM\\n\\nFIRST QUESTION\\nAnswer: FIRST ANSWER\\nQuestion: LAST QUESTION``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from reinforcepp.data.dialogues import Message, parse_dialogue, role_of, split_shared_prompt
from reinforcepp.data.limits import parse_json
from reinforcepp.data.readers import quoted
from reinforcepp.errors import shown
from reinforcepp.types import Messages

CONVERSION_NOTES = {
    "conversations": "{} with a system message or earlier turns",
    "truncated": "{} with an answer at the end of the prompt, removed",
    "dialogues": "{} parsed as Human/Assistant dialogues",
    "reasoning": "{} with reasoning, put between <think> tags before the answer",
    "formatted": "{} with a prompt that was already formatted as a dialogue, used without its labels",
}
"""Notes on the number of rows that were converted without the user asking for it."""

T = TypeVar("T")
_KNOWN = ("system", "user", "assistant", "tool")
_ASKING = ("user", "tool")
"""Roles of a prompt's last message."""
EXTRA_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Further fields of a message that chat templates read."""
_FUNCTION_CALL = "function_call"
"""Role of a message that holds a tool call, in ShareGPT's format."""
_SERIALIZED = re.compile(r"\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")


class UnusableCell(ValueError):
    """A cell that holds no text to train on: the problem with its value, and ``reason``, worded to follow a count."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


Content = str | list[Message]
"""A cell: text, or the messages of a conversation."""


class Pair(NamedTuple):
    """The texts of a row, the messages of its prompt, and the problem that makes it unusable, worded to follow a count."""

    prompt: str
    chosen: str = ""
    rejected: str = ""
    problem: str | None = None
    messages: Messages = ()


def parse_content(cell: Any, column: str) -> Content:
    """Return a cell as text or messages; None and a blank text are an empty text, a single message a conversation of one.

    Raises:
        UnusableCell: The cell holds anything else.
    """
    if isinstance(cell, list) and len(cell) == 1 and isinstance(cell[0], str):
        cell = cell[0]
    if cell is None:
        return ""
    if isinstance(cell, str):
        if not _SERIALIZED.match(cell.strip()):
            return cell if cell.strip() else ""
        try:
            cell = parse_json(cell)
        except ValueError as error:
            raise UnusableCell(
                f"with messages as a string in {column!r}",
                f"{column!r} holds a list of messages as a string that isn't JSON, expected a list or JSON",
            ) from error
    if isinstance(cell, Mapping):
        messages: Any = cell
        cell = [cell] if {"role", "from"} & cell.keys() else messages.get("messages", messages)
    if isinstance(cell, list) and all(isinstance(each, Mapping) for each in cell):
        return [_message(each, column) for each in cell]
    raise UnusableCell(
        f"with {_kind(cell)} in {column!r}",
        f"{column!r} holds {shown(cell, 40)}, expected text or a list of messages",
    )


def _kind(cell: Any) -> str:
    if isinstance(cell, bool):
        return "a boolean"
    if isinstance(cell, int | float):
        return "a number"
    if isinstance(cell, dict):
        return "an object"
    return "a list" if isinstance(cell, list) else f"a value of type {type(cell).__name__}"


def _message(message: Mapping[str, Any], column: str) -> Message:
    role = message.get("role") if message.get("role") is not None else message.get("from")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    known = role_of(role) if isinstance(role, str) else None
    if known not in _KNOWN:
        given, problem = shown(role, 40), f"a message in {column!r} has"
        if role is None:
            raise UnusableCell(f"with a message without a role in {column!r}", f"{problem} no role")
        raise UnusableCell(
            f"with the role {given} in {column!r}", f"{problem} the role {given}, not one of {quoted(_KNOWN)}"
        )
    extra = _extra_fields(message, column)
    if isinstance(role, str) and role.strip().lower() == _FUNCTION_CALL:
        content, extra["tool_calls"] = "", _tool_calls(content, column)
    if isinstance(content, list):
        parts = [_part(part, column) for part in content]
        content = "".join(text for kind, text in parts if kind == "text")
        if reasoning := "".join(text for kind, text in parts if kind == "reasoning"):
            extra["reasoning_content"] = reasoning
        if calls := [call for kind, text in parts if kind == "tool_call" for call in _tool_calls(text, column)]:
            extra["tool_calls"] = calls
    if content is not None and not isinstance(content, str):
        raise _not_text(column)
    return Message(known, content or "", extra)


def _extra_fields(message: Mapping[str, Any], column: str) -> dict[str, Any]:
    """Return what chat templates read apart from role and content; tool calls can be JSON text, as Parquet files hold them."""
    found = {name: message[name] for name in EXTRA_FIELDS if message.get(name)}
    calls = found.get("tool_calls")
    if isinstance(calls, str):
        try:
            found["tool_calls"] = parse_json(calls)
        except ValueError as error:
            problem = f"the tool_calls of a message in {column!r} are text that isn't JSON ({error})"
            raise UnusableCell(f"with tool_calls that aren't JSON in {column!r}", problem) from error
    return found


def _part(part: Any, column: str) -> tuple[str, str]:
    """Return kind and text of a content part, as OpenAI (``text``) and LLaMA-Factory (``value``) write it."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "reasoning", "tool_call"):
        text = part.get("text") if part.get("text") is not None else part.get("value")
        if isinstance(text, str):
            return kind, text
    media = next((each for each in ("image", "video", "audio") if isinstance(kind, str) and each in kind), None)
    if media:
        problem = f"a message in {column!r} holds {media} data, but only text is supported"
        raise UnusableCell(f"with {media} data in {column!r}", problem)
    raise _not_text(column)


def _tool_calls(content: Any, column: str) -> list[dict[str, Any]]:
    """Return the tool calls that ShareGPT and LLaMA-Factory write as JSON text."""
    try:
        calls = parse_json(content) if isinstance(content, str) else content
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        problem = f"a function call in {column!r} isn't a JSON object with a name"
        raise UnusableCell(f"with an invalid function call in {column!r}", problem)
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _not_text(column: str) -> UnusableCell:
    return UnusableCell(
        f"with a message that isn't text in {column!r}", f"the content of a message in {column!r} isn't text"
    )


def prompt_from(prompt: Content, conversions: Counter[str], before: Sequence[Message] = ()) -> Pair:
    """Return a prompt by itself: for a conversation, everything up to the last message of a user or a tool.

    ``before`` are a system message and earlier turns from columns of their own.
    """
    prompt = _formatted_prompt(prompt, conversions)
    if isinstance(prompt, list):
        kept = _up_to_user(prompt)
        conversions["truncated"] += bool(kept) and len(kept) < len(prompt)
        prompt = kept
    return _with_earlier(prompt, before, conversions)


def pair_from(
    prompt: Content | None,
    chosen: Content,
    rejected: Content,
    conversions: Counter[str],
    before: Sequence[Message] = (),
) -> Pair:
    """Return a row's texts; without a prompt, or with whole conversations as answers, their shared beginning is it."""
    if prompt is not None:
        prompt = _formatted_prompt(prompt, conversions)
    if isinstance(chosen, str) and isinstance(rejected, str):
        dialogues = _dialogues(prompt, chosen, rejected)
        conversions["dialogues"] += dialogues is not None
        if dialogues is not None:
            chosen, rejected = dialogues
        elif prompt is None:
            text, chosen, rejected = split_shared_prompt(chosen, rejected)
            return _with_earlier(text, before, conversions)._replace(chosen=chosen, rejected=rejected)
    if _is_conversation(chosen) != _is_conversation(rejected):
        return Pair("", problem="with a whole conversation as only one of the answers")
    if isinstance(chosen, list) and isinstance(rejected, list) and _is_conversation(chosen):
        common = _up_to_user(_shared_prefix(chosen, rejected))
        if not common:
            return Pair("", problem="with answers to different prompts")
        if prompt and not _agree(prompt, common):
            return Pair("", problem="with a prompt that differs from the prompt in its answers")
        prompt, chosen, rejected = common, chosen[len(common) :], rejected[len(common) :]
    if isinstance(prompt, list) and prompt and prompt[-1].role not in _ASKING:
        return Pair("", problem="with a prompt that doesn't end with a user message")
    answers = [message for answer in (chosen, rejected) if isinstance(answer, list) for message in answer]
    if any(message.extra.get("tool_calls") for message in answers):
        return Pair("", problem="with a tool call in an answer")
    chosen_text, rejected_text = _answer_text(chosen), _answer_text(rejected)
    conversions["reasoning"] += any(message.extra.get("reasoning_content") for message in answers)
    if chosen_text is None or rejected_text is None:
        return Pair("", problem="with a user message inside an answer")
    pair = _with_earlier(prompt or "", before, conversions)
    return pair._replace(chosen=chosen_text, rejected=rejected_text)


def _formatted_prompt(prompt: Content, conversions: Counter[str]) -> Content:
    """Return the messages of a prompt that is written as a dialogue, any other prompt unchanged."""
    if isinstance(prompt, str) and (messages := parse_dialogue(prompt)) and messages[-1].role == "user":
        conversions["formatted"] += 1
        return messages
    return prompt


def _dialogues(prompt: Content | None, chosen: str, rejected: str) -> tuple[list[Message], list[Message]] | None:
    """Return two dialogues that continue the prompt, if the answers are such texts."""
    one, other = parse_dialogue(chosen), parse_dialogue(rejected)
    if not (one and other):
        return None
    # Next to a prompt, an answer that is a dialogue can be what the prompt asked for.
    common = _up_to_user(_shared_prefix(one, other))
    return (one, other) if prompt is None or (common and _agree(prompt, common)) else None


def _with_earlier(prompt: Content, before: Sequence[Message], conversions: Counter[str]) -> Pair:
    """Return the prompt after the messages of other columns; a conversation that begins with them has them already."""
    if not before or not prompt:
        return _conversation(prompt, conversions) if isinstance(prompt, list) else Pair(prompt)
    messages = [Message("user", prompt)] if isinstance(prompt, str) else prompt
    if messages[: len(before)] != list(before):
        system = next((each for each in before if each.role == "system"), None)
        if system is not None and messages[0] == system:
            messages = messages[1:]
        messages = [*before, *messages]
    return _conversation(messages, conversions)


def conversation_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the prompt text for messages with ``role`` and ``content``."""
    return _text([Message(message["role"], message["content"] or "", message) for message in messages])


def are_conversations(*cells: Any) -> bool:
    """Return whether each cell is a list of messages that begins with a system or user message."""
    starts = [cell[0] if isinstance(cell, list) and cell else None for cell in cells]
    roles = [start.get("role") or start.get("from") if isinstance(start, Mapping) else None for start in starts]
    return all(isinstance(role, str) and role_of(role) in ("system", "user") for role in roles)


def _is_conversation(content: Content) -> bool:
    """Return whether an answer is a whole conversation; some begin with a greeting of the assistant."""
    if isinstance(content, str) or not content:
        return False
    return content[0].role != "assistant" or any(message.role == "user" for message in content)


def _up_to_user(messages: Sequence[Message]) -> list[Message]:
    last = max((i for i, message in enumerate(messages) if message.role in _ASKING), default=-1)
    return list(messages[: last + 1])


def _shared_prefix(one: Sequence[T], other: Sequence[T]) -> Sequence[T]:
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _agree(prompt: Content, common: Sequence[Message]) -> bool:
    """Return whether a prompt column equals the shared beginning of the answers, or one message of it."""
    if isinstance(prompt, list):
        return _up_to_user(prompt) == common
    return " ".join(prompt.split()) in {
        " ".join(text.split()) for text in (_text(common), *(m.content for m in common))
    }


def _answer_text(content: Content) -> str | None:
    if isinstance(content, str):
        return content
    if any(message.role != "assistant" for message in content):
        return None
    return "\n".join(f"{_thought(message)}{message.content}" for message in content)


def _thought(message: Message) -> str:
    """Return the reasoning of an answer as models write it, or an empty text."""
    reasoning = message.extra.get("reasoning_content")
    return f"<think>\n{str(reasoning).strip()}\n</think>\n\n" if reasoning else ""


def _conversation(messages: Sequence[Message], conversions: Counter[str]) -> Pair:
    """Return a conversation as a prompt."""
    if any(message.role == "system" for message in messages[1:]):
        return Pair("", problem="with a system message that isn't the first message")
    if any(not message.content.strip() for message in messages if message.role == "user"):
        return Pair("")
    conversions["conversations"] += len(messages) > 1
    return Pair(_text(messages), messages=tuple(message.as_dict() for message in messages))


def _text(messages: Sequence[Message]) -> str:
    system = messages[0].content.strip() if messages and messages[0].role == "system" else ""
    labels = {"user": "Question", "assistant": "Answer", "tool": "Tool"}
    turns = "\n".join(f"{labels[each.role]}: {_with_calls(each)}" for each in messages if each.role in labels)
    question = turns.removeprefix("Question: ")
    return f"{system}\n\n{question}" if system else question


def _with_calls(message: Message) -> str:
    """Return the text of a message and its tool calls, without which two conversations could look alike."""
    calls = [json.dumps(call, ensure_ascii=False, sort_keys=True) for call in message.extra.get("tool_calls") or ()]
    return "\n".join([*([message.content.strip()] if message.content.strip() or not calls else []), *calls])
