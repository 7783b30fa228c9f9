"""Parse texts that are whole dialogues, and split two texts where their shared prompt ends.

A dialogue is written with speaker labels (``Human:``, ``Assistant:``) or with the markers of a chat template. Training
applies the model's own chat template, so such a text is read as its messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import regex

from reinforcepp.config.reward_rules import WORD_BREAK, without_flags

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
_ALPACA = re.compile(r"(?:Below is an instruction[^\n]*\n\n)?### Instruction:\n")
_ALPACA_INPUT, _ALPACA_RESPONSE = "\n### Input:\n", "\n### Response:"
_BEGIN, _ENDS = re.compile(r"(?:<s>|<bos>|<\|begin_of_text\|>)\s*"), ("</s>", "<s>")


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
            found.append(Message(role_of(match["role"]), _without_end(match["content"])))
            position = match.end()
        if found and position == len(text) and all(each.role in ("system", "user", "assistant") for each in found):
            return found
    return []


def _llama_2(text: str) -> list[Message]:
    text = _BEGIN.sub("", text)
    found: list[Message] = []
    position = 0
    while position < len(text):
        if (match := _LLAMA_2.match(text, position)) is None:
            return []
        user, position = match["user"], match.end()
        if not found and (with_system := _LLAMA_2_SYSTEM.fullmatch(user)):
            found.append(Message("system", with_system["system"].strip()))
            user = with_system["user"]
        found.append(Message("user", user.strip()))
        found.append(Message("assistant", _without_end(match["assistant"])))
    return found


def _alpaca(text: str) -> list[Message]:
    if (begin := _ALPACA.match(text)) is None:
        return []
    text = text[begin.end() :]
    instruction, _, after = text.partition(_ALPACA_INPUT)
    parts = [instruction, *after.partition(_ALPACA_RESPONSE)[::2]]
    if _ALPACA_RESPONSE in instruction or _ALPACA_RESPONSE not in after:
        parts = list(text.partition(_ALPACA_RESPONSE)[::2])
        if _ALPACA_RESPONSE not in text:
            return []
    question = "\n".join(part.strip() for part in parts[:-1] if part.strip())
    return [Message("user", question), Message("assistant", _without_end(parts[-1]))]


def _labeled(text: str) -> list[Message]:
    """Return the turns of labeled paragraphs or, if there are none, of labeled lines."""
    for user, assistant in _SPEAKERS:
        if not re.match(rf"{user}{_COLON}", text):
            continue
        labels = list(re.finditer(rf"({user}|{assistant}){_COLON}", text))
        for newlines in (2, 1):
            turns = [
                label for label in labels if not label.start() or _newlines_before(text, label.start()) >= newlines
            ]
            speakers = [turn[1] for turn in turns]
            # Turns alternate; anything else is a text about a dialogue.
            if len(speakers) > 1 and speakers == [(user, assistant)[i % 2] for i in range(len(speakers))]:
                roles, ends = ("user", "assistant"), [*(turn.start() for turn in turns[1:]), len(text)]
                return [
                    Message(roles[i % 2], text[turn.end() : end].strip())
                    for i, (turn, end) in enumerate(zip(turns, ends, strict=True))
                ]
    return []


def _newlines_before(text: str, position: int) -> int:
    """Return the number of line breaks in the whitespace that ends at ``position``."""
    newlines = 0
    while position and text[position - 1].isspace():
        position -= 1
        newlines += text[position] == "\n"
    return newlines


def _without_end(text: str) -> str:
    """Return an answer without the token that ends it."""
    text = text.strip()
    end = next((each for each in _ENDS if text.endswith(each)), "")
    return text.removesuffix(end).strip()


# --- two texts that begin with their prompt -----------------------------------------------------------------------------

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
    breaks = [
        {match.start() for match in WORD_BREAK.finditer(without_flags(text[: end + 3]))} for text in (chosen, rejected)
    ]
    for position in range(end, 0, -1):
        before, following = chosen[position - 1], (chosen[position], rejected[position])
        if before.isspace():
            yield position
        elif _OPENING.match(before) or any(map(_ATTACHED.match, following)):
            continue
        elif all(position in each for each in breaks) and any(map(_UNSPACED.match, (before, *following))):
            yield position
