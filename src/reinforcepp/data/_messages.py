"""From a row's cells to the texts that are trained on: plain text, lists of messages, and pairs with their prompt inside.

This package frames a prompt as one question, so a conversation becomes one text: the message of its only user turn, or
else, in the words of the plain frame, ``SYSTEM\\n\\nFIRST QUESTION\\nAnswer: FIRST ANSWER\\nQuestion: LAST QUESTION``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from reinforcepp.data._text import quoted
from reinforcepp.errors import DataError

TOLD = {
    "folded": "{} whose prompt has a system message or earlier turns, written into one text",
    "cut": "{} whose prompt ends with an answer, left off",
    "dialogues": "{} read as conversations of Human and Assistant",
}
"""What is said about the number of rows to which something was done that nobody asked for."""

T = TypeVar("T")
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_KNOWN = ("system", "user", "assistant")
_WRITTEN_OUT = re.compile(r"\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Content = str | list[Message]
"""What a cell holds: text, or the messages of a conversation."""


class Pair(NamedTuple):
    """A row's texts, and what is wrong with them, if anything, in words that fit after a count."""

    prompt: str
    chosen: str = ""
    rejected: str = ""
    fault: str | None = None


def content_of(cell: Any, column: str, where: str) -> Content:
    """A cell as text or messages; None is an empty text, a single message a conversation of one.

    Raises:
        DataError: It holds something else.
    """
    if cell is None:
        return ""
    if isinstance(cell, str):
        if _WRITTEN_OUT.match(cell.strip()):
            raise DataError(
                f"{where}: {column!r} holds a list of messages written out as text; give it as a list, in a JSONL or "
                "Parquet file."
            )
        return cell.strip()
    if isinstance(cell, Mapping) and {"role", "from"} & cell.keys():
        cell = [cell]
    if isinstance(cell, list) and all(isinstance(each, Mapping) for each in cell):
        return [_message(each, column, where) for each in cell]
    shown = repr(cell)
    raise DataError(
        f"{where}: {column!r} holds {shown if len(shown) <= 40 else f'{shown[:37]}...'}, where text or a list of messages "
        "is expected; correct it or name another column."
    )


def _message(message: Mapping[str, Any], column: str, where: str) -> Message:
    role = message.get("role") if message.get("role") is not None else message.get("from")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    known = _ROLES.get(role, role) if isinstance(role, str) else None
    if known not in _KNOWN:
        problem = f"has the role {role!r}, not one of {quoted(_KNOWN)}" if role is not None else "has no role"
        raise DataError(f"{where}: a message in {column!r} {problem}; correct it or remove the row.")
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise DataError(
            f"{where}: the content of a message in {column!r} isn't text; only text can be trained on, so remove the row."
        )
    return Message(known, (content or "").strip())


def prompt_of(prompt: Content, seen: Counter[str]) -> Pair:
    """A prompt by itself: of a conversation, everything up to the last user message."""
    if isinstance(prompt, str):
        return Pair(prompt)
    kept = _up_to_user(prompt)
    seen["cut"] += bool(kept) and len(kept) < len(prompt)
    return _fold(kept, seen)


def pair_of(prompt: Content | None, chosen: Content, rejected: Content, seen: Counter[str]) -> Pair:
    """A row's texts; with None as prompt, or whole conversations as answers, the prompt is what both begin with."""
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        one, other = _dialogue(chosen), _dialogue(rejected)
        if not (one and other):
            return _split(chosen, rejected)
        seen["dialogues"] += 1
        chosen, rejected = one, other
    if _is_whole(chosen) != _is_whole(rejected):
        return Pair("", fault="with a whole conversation beside an answer alone")
    if isinstance(chosen, list) and isinstance(rejected, list) and _is_whole(chosen):
        common = _up_to_user(_prefix(chosen, rejected))
        if not common:
            return Pair("", fault="with answers to different prompts")
        if prompt and not _agree(prompt, common):
            return Pair("", fault="with a prompt that isn't the one of its answers")
        prompt, chosen, rejected = common, chosen[len(common) :], rejected[len(common) :]
    if isinstance(prompt, list) and prompt and prompt[-1].role != "user":
        return Pair("", fault="with a prompt that doesn't end with a user message")
    better, worse = _answer(chosen), _answer(rejected)
    if better is None or worse is None:
        return Pair("", fault="with answers that go on after another message of the user")
    framed = _fold(prompt, seen) if isinstance(prompt, list) else Pair(prompt or "")
    return framed._replace(chosen=better, rejected=worse)


def conversation_text(messages: Sequence[Mapping[str, str]]) -> str:
    """The text as which a prompt of these messages is trained on; each has ``role`` and ``content``."""
    return _text([Message(message["role"], message["content"]) for message in messages])


def holds_conversation(*cells: Any) -> bool:
    """Whether each cell is a list of messages that doesn't begin with an answer."""
    starts = [cell[0] if isinstance(cell, list) and cell else None for cell in cells]
    roles = [start.get("role") or start.get("from") if isinstance(start, Mapping) else None for start in starts]
    return all(_ROLES.get(role, role) in ("system", "user") if isinstance(role, str) else False for role in roles)


def _is_whole(content: Content) -> bool:
    return isinstance(content, list) and bool(content) and content[0].role != "assistant"


def _up_to_user(messages: Sequence[Message]) -> list[Message]:
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    return list(messages[: last + 1])


def _prefix(one: Sequence[T], other: Sequence[T]) -> Sequence[T]:
    """What both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (mine, yours) in pairs if mine != yours), min(len(one), len(other)))]


def _agree(prompt: Content, common: Sequence[Message]) -> bool:
    """Whether a prompt column says what the answers begin with, or one question of it."""
    if isinstance(prompt, list):
        return _up_to_user(prompt) == common
    return " ".join(prompt.split()) in {
        " ".join(text.split()) for text in (_text(common), *(m.content for m in common))
    }


def _answer(content: Content) -> str | None:
    if isinstance(content, str):
        return content
    if any(message.role != "assistant" for message in content):
        return None
    return "\n".join(message.content for message in content)


def _fold(messages: Sequence[Message], seen: Counter[str]) -> Pair:
    """A conversation as one text."""
    if any(message.role == "system" for message in messages[1:]):
        return Pair("", fault="with a system message that isn't the first message")
    if any(not message.content for message in messages if message.role == "user"):
        return Pair("")
    seen["folded"] += len(messages) > 1
    return Pair(_text(messages))


def _text(messages: Sequence[Message]) -> str:
    system = messages[0].content if messages and messages[0].role == "system" else ""
    names = {"user": "Question", "assistant": "Answer"}
    turns = "\n".join(f"{names[each.role]}: {each.content}" for each in messages if each.role in names)
    asked = turns.removeprefix("Question: ")
    return f"{system}\n\n{asked}" if system else asked


def _split(chosen: str, rejected: str) -> Pair:
    """Two texts that begin alike: what they share is the prompt, in whole words."""
    place = len(_prefix(chosen, rejected))
    while place and not chosen[place - 1].isspace():
        place -= 1
    return Pair(chosen[:place].strip(), chosen[place:].strip(), rejected[place:].strip())


def _dialogue(text: str) -> list[Message]:
    """A text of ``Human:`` and ``Assistant:`` paragraphs as messages; none if it is something else."""
    _, *parts = _SPEAKER.split(text.strip())
    if not text.strip().startswith("Human:") or "Assistant" not in parts[::2]:
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[name], said.strip()) for name, said in zip(parts[::2], parts[1::2], strict=True)]
