"""From a row's cells to training texts: plain text, lists of messages, and pairs that contain their prompt.

This package formats a prompt as one question, so a conversation becomes one text. With a single user turn, that is its
message. Otherwise: ``SYSTEM\\n\\nFIRST QUESTION\\nAnswer: FIRST ANSWER\\nQuestion: LAST QUESTION``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from reinforcepp.data.readers import quoted
from reinforcepp.errors import DataError

CONVERSION_NOTES = {
    "flattened": "{} with a system message or earlier turns, flattened into one prompt",
    "truncated": "{} with an answer at the end of the prompt, removed",
    "dialogues": "{} parsed as Human/Assistant dialogues",
}
"""Notes on the number of rows that were converted without the user asking for it."""

T = TypeVar("T")
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_KNOWN = ("system", "user", "assistant")
_SERIALIZED = re.compile(r"\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Content = str | list[Message]
"""A cell: text, or the messages of a conversation."""


class Pair(NamedTuple):
    """The texts of a row, and the problem that makes them unusable, worded to follow a count."""

    prompt: str
    chosen: str = ""
    rejected: str = ""
    problem: str | None = None


def parse_content(cell: Any, column: str, where: str) -> Content:
    """Return a cell as text or messages; None is an empty text, a single message a conversation of one.

    Raises:
        DataError: The cell holds anything else.
    """
    if cell is None:
        return ""
    if isinstance(cell, str):
        if _SERIALIZED.match(cell.strip()):
            raise DataError(
                f"{where}: {column!r} holds a list of messages as a string. Write it as a list, in a JSONL or Parquet file."
            )
        return cell.strip()
    if isinstance(cell, Mapping) and {"role", "from"} & cell.keys():
        cell = [cell]
    if isinstance(cell, list) and all(isinstance(each, Mapping) for each in cell):
        return [_message(each, column, where) for each in cell]
    shown = repr(cell)
    raise DataError(
        f"{where}: {column!r} holds {shown if len(shown) <= 40 else f'{shown[:37]}...'}, expected text or a list of "
        "messages. Correct the cell or name another column."
    )


def _message(message: Mapping[str, Any], column: str, where: str) -> Message:
    role = message.get("role") if message.get("role") is not None else message.get("from")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    known = _ROLES.get(role, role) if isinstance(role, str) else None
    if known not in _KNOWN:
        problem = f"has the role {role!r}, not one of {quoted(_KNOWN)}" if role is not None else "has no role"
        raise DataError(f"{where}: a message in {column!r} {problem}. Correct it or remove the row.")
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise DataError(
            f"{where}: the content of a message in {column!r} isn't text. Remove the row: only text can be trained on."
        )
    return Message(known, (content or "").strip())


def prompt_from(prompt: Content, conversions: Counter[str]) -> Pair:
    """Return a prompt by itself: for a conversation, everything up to the last user message."""
    if isinstance(prompt, str):
        return Pair(prompt)
    kept = _up_to_user(prompt)
    conversions["truncated"] += bool(kept) and len(kept) < len(prompt)
    return _flatten(kept, conversions)


def pair_from(prompt: Content | None, chosen: Content, rejected: Content, conversions: Counter[str]) -> Pair:
    """Return a row's texts; without a prompt, or with whole conversations as answers, their shared beginning is it."""
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        one, other = _dialogue(chosen), _dialogue(rejected)
        if not (one and other):
            return _split_texts(chosen, rejected)
        conversions["dialogues"] += 1
        chosen, rejected = one, other
    if _is_conversation(chosen) != _is_conversation(rejected):
        return Pair("", problem="with a whole conversation as only one of the answers")
    if isinstance(chosen, list) and isinstance(rejected, list) and _is_conversation(chosen):
        common = _up_to_user(_shared_prefix(chosen, rejected))
        if not common:
            return Pair("", problem="with answers to different prompts")
        if prompt and not _agree(prompt, common):
            return Pair("", problem="with a prompt that differs from the prompt in its answers")
        prompt, chosen, rejected = common, chosen[len(common) :], rejected[len(common) :]
    if isinstance(prompt, list) and prompt and prompt[-1].role != "user":
        return Pair("", problem="with a prompt that doesn't end with a user message")
    chosen_text, rejected_text = _answer_text(chosen), _answer_text(rejected)
    if chosen_text is None or rejected_text is None:
        return Pair("", problem="with a user message inside an answer")
    pair = _flatten(prompt, conversions) if isinstance(prompt, list) else Pair(prompt or "")
    return pair._replace(chosen=chosen_text, rejected=rejected_text)


def conversation_text(messages: Sequence[Mapping[str, str]]) -> str:
    """Return the prompt text for messages with ``role`` and ``content``."""
    return _text([Message(message["role"], message["content"]) for message in messages])


def are_conversations(*cells: Any) -> bool:
    """Return whether each cell is a list of messages that begins with a system or user message."""
    starts = [cell[0] if isinstance(cell, list) and cell else None for cell in cells]
    roles = [start.get("role") or start.get("from") if isinstance(start, Mapping) else None for start in starts]
    return all(_ROLES.get(role, role) in ("system", "user") if isinstance(role, str) else False for role in roles)


def _is_conversation(content: Content) -> bool:
    return isinstance(content, list) and bool(content) and content[0].role != "assistant"


def _up_to_user(messages: Sequence[Message]) -> list[Message]:
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
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
    return "\n".join(message.content for message in content)


def _flatten(messages: Sequence[Message], conversions: Counter[str]) -> Pair:
    """Return a conversation as one prompt."""
    if any(message.role == "system" for message in messages[1:]):
        return Pair("", problem="with a system message that isn't the first message")
    if any(not message.content for message in messages if message.role == "user"):
        return Pair("")
    conversions["flattened"] += len(messages) > 1
    return Pair(_text(messages))


def _text(messages: Sequence[Message]) -> str:
    system = messages[0].content if messages and messages[0].role == "system" else ""
    labels = {"user": "Question", "assistant": "Answer"}
    turns = "\n".join(f"{labels[each.role]}: {each.content}" for each in messages if each.role in labels)
    question = turns.removeprefix("Question: ")
    return f"{system}\n\n{question}" if system else question


def _split_texts(chosen: str, rejected: str) -> Pair:
    """Split two texts: their shared beginning, in whole words, is the prompt."""
    end = len(_shared_prefix(chosen, rejected))
    while end and not chosen[end - 1].isspace():
        end -= 1
    return Pair(chosen[:end].strip(), chosen[end:].strip(), rejected[end:].strip())


def _dialogue(text: str) -> list[Message]:
    """Return a text of ``Human:`` and ``Assistant:`` paragraphs as messages; an empty list for any other text."""
    _, *parts = _SPEAKER.split(text.strip())
    if not text.strip().startswith("Human:") or "Assistant" not in parts[::2]:
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True)]
