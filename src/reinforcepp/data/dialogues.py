"""Parse texts that are whole dialogues, and split two texts where their shared prompt ends.

A dialogue is written with speaker labels (``Human:``, ``Assistant:``) or with the markers of a chat template. Training
applies the model's own chat template, so such a text is read as its messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import regex

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "developer": "system",
}
"""Roles by the lowercase names that other tools use."""


class Message(NamedTuple):
    """One turn of a conversation; ``extra`` are further fields that chat templates read, such as ``tool_calls``."""

    role: str
    content: str
    extra: Mapping[str, Any] = {}

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        return {"role": self.role, "content": self.content, **self.extra}


def role_of(name: str) -> str:
    """Return the role that a name in any case stands for."""
    name = name.strip().lower()
    return ROLES.get(name, name)


# --- dialogues --------------------------------------------------------------------------------------------------------

_SPEAKERS = (
    ("Human", "Assistant"),
    ("User", "Assistant"),
    ("USER", "ASSISTANT"),
    ("Question", "Answer"),
    ("Q", "A"),
    ("用户", "助手"),
    ("问题", "回答"),
    ("问", "答"),
    ("問", "答"),
    ("質問", "回答"),
    ("ユーザー", "アシスタント"),
)
"""Labels of the user and the assistant."""

_COLON = "\\s?[:\uff1a]"

_TEMPLATES = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<\|im_start\|>(?P<role>\w+)(?:\n|\Z)(?P<content>.*?)(?:<\|im_end\|>\s*|\Z)",
        r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>(?:\n+|\Z)(?P<content>.*?)(?:<\|eot_id\|>|\Z)",
        r"<start_of_turn>(?P<role>\w+)(?:\n|\Z)(?P<content>.*?)(?:<end_of_turn>\s*|\Z)",
        r"<\|(?P<role>system|user|assistant)\|>(?:\n|\Z)(?P<content>.*?)(?=<\|(?:system|user|assistant)\|>|\Z)",
    )
)
_LLAMA_2 = re.compile(r"\[INST\](?P<user>.*?)\[/INST\](?P<assistant>[^\[]*)", re.DOTALL)
_LLAMA_2_SYSTEM = re.compile(r"\s*<<SYS>>(?P<system>.*?)<</SYS>>(?P<user>.*)", re.DOTALL)
_ALPACA = re.compile(
    r"(?:Below is an instruction[^\n]*\n\n)?### Instruction:\n(?P<instruction>.*?)(?:\n+### Input:\n(?P<input>.*?))?"
    r"\n+### Response:(?P<response>.*)",
    re.DOTALL,
)
_BEGIN, _END = re.compile(r"(?:<s>|<bos>|<\|begin_of_text\|>)\s*"), re.compile(r"\s*</?s>\s*\Z")


def parse_dialogue(text: str) -> list[Message]:
    """Return a text that is a whole dialogue as its messages, and any other text as an empty list.

    An assistant turn that is empty at the end asks for an answer and isn't a message.
    """
    text = text.strip()
    readers: tuple[Callable[[str], list[Message]], ...] = (_templated, _llama_2, _alpaca, _labeled)
    messages = next((found for read in readers if (found := read(text))), [])
    if messages and messages[-1] == Message("assistant", ""):
        return messages[:-1]
    return messages


def _templated(text: str) -> list[Message]:
    text = _BEGIN.sub("", text, count=1) if _BEGIN.match(text) else text
    for pattern in _TEMPLATES:
        found, position = [], 0
        while match := pattern.match(text, position):
            if match.end() == position:
                break
            found.append(Message(role_of(match["role"]), _END.sub("", match["content"]).strip()))
            position = match.end()
        if found and position == len(text) and all(each.role in ("system", "user", "assistant") for each in found):
            return found
    return []


def _llama_2(text: str) -> list[Message]:
    text = _BEGIN.sub("", text)
    if not text.startswith("[INST]") or "".join(match.group() for match in _LLAMA_2.finditer(text)) != text:
        return []
    found: list[Message] = []
    for match in _LLAMA_2.finditer(text):
        user = match["user"]
        if not found and (with_system := _LLAMA_2_SYSTEM.fullmatch(user)):
            found.append(Message("system", with_system["system"].strip()))
            user = with_system["user"]
        found.append(Message("user", user.strip()))
        found.append(Message("assistant", _END.sub("", match["assistant"]).strip()))
    return found


def _alpaca(text: str) -> list[Message]:
    match = _ALPACA.fullmatch(text)
    if match is None:
        return []
    question = "\n".join(part.strip() for part in (match["instruction"], match["input"]) if part and part.strip())
    return [Message("user", question), Message("assistant", _END.sub("", match["response"]).strip())]


def _labeled(text: str) -> list[Message]:
    """Return the turns of labeled paragraphs or, if there are none, of labeled lines."""
    for user, assistant in _SPEAKERS:
        if not re.match(rf"{user}{_COLON}", text):
            continue
        for separator in (r"\n\s*\n\s*", r"\n\s*"):
            _, *parts = re.split(rf"(?:\A|{separator})({user}|{assistant}){_COLON}", text)
            speakers = parts[::2]
            # Turns alternate; anything else is a text about a dialogue.
            if len(speakers) > 1 and speakers == [(user, assistant)[i % 2] for i in range(len(speakers))]:
                roles = ("user", "assistant")
                return [Message(roles[i % 2], content.strip()) for i, content in enumerate(parts[1::2])]
    return []


# --- two texts that begin with their prompt -----------------------------------------------------------------------------

_WORD_BORDER = regex.compile(r"(?w)\b")
_UNSPACED_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_UNSPACED = regex.compile(rf"[{_UNSPACED_SCRIPTS}\u3000-\u303f\uff00-\uffef]")
_OPENING, _ATTACHED = regex.compile(r"[\p{Ps}\p{Pi}]"), regex.compile(r"[\p{M}\p{Pe}\p{Pf}ー]")
_CLOSING = r"[\"'\p{Pe}\p{Pf}]*"
# A period after fewer than three letters ends an abbreviation or follows a number.
_SENTENCE_END = regex.compile(
    rf"\n\s*|(?:[?!…؟]|(?<=[^\W\d]{{3}}[\"'\p{{Pe}}\p{{Pf}}]?)\.){_CLOSING}\s+"
    rf"|[?!…]{_CLOSING}(?=[{_UNSPACED_SCRIPTS}])|[\u3002\uff1f\uff01\uff61\u0964]{_CLOSING}\s*"
)


def split_shared_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return the prompt that both texts begin with, and the two answers.

    The prompt ends at the last line break or end of a sentence in the shared beginning, otherwise at its last word.
    A character of Chinese, Japanese, Thai and the like counts as a word. The prompt and an answer together are the text. A space
    between the two belongs to the answer, as in TRL, because tokens begin with spaces.
    """
    # A part of both texts must be left for the answers.
    end = max(0, min(_num_shared(chosen, rejected), len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1))
    sentences = [match.end() for match in _SENTENCE_END.finditer(chosen[:end])]
    has_sentence = bool(sentences) and bool(chosen[: sentences[-1]].strip())
    end = sentences[-1] if has_sentence else next(_word_ends(chosen, rejected, end), 0)
    end = len(chosen[:end].rstrip(" \t")) or end
    return chosen[:end], chosen[end:], rejected[end:]


def _num_shared(chosen: str, rejected: str) -> int:
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))


def _word_ends(chosen: str, rejected: str, end: int) -> Iterator[int]:
    """Yield the positions up to ``end`` at which a word ends in both texts, the last one first."""
    # Unicode's word breaks depend on up to two characters that follow.
    breaks = [{match.start() for match in _WORD_BORDER.finditer(text[: end + 3])} for text in (chosen, rejected)]
    for position in range(end, 0, -1):
        before, following = chosen[position - 1], (chosen[position], rejected[position])
        if before.isspace():
            yield position
        elif _OPENING.match(before) or any(map(_ATTACHED.match, following)):
            continue
        elif all(position in each for each in breaks) and any(map(_UNSPACED.match, (before, *following))):
            yield position
