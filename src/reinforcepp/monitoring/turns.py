"""Conversations turn by turn, for pages and for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reinforcepp.runtime.terminal import printable
from reinforcepp.types import Conversation, EpisodeTurn

LABELS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
EARLIER_CHARACTERS, LAST_CHARACTERS = 70, 160
"""Of an earlier turn and of the last turn on the terminal."""
MAX_EARLIER = 3
"""Earlier turns that are shown on the terminal; of more, the system message and the newest ones."""


class Turn(NamedTuple):
    """A message as people read it; the role of a prompt that is a text is ``plain``, without a label."""

    role: str
    label: str
    text: str

    @property
    def start(self) -> str:
        """The beginning of the text, on one line."""
        return one_line(self.text, LAST_CHARACTERS)


def turns(prompt: Conversation) -> list[Turn]:
    """Return the turns of a prompt."""
    return [Turn("plain", "", prompt)] if isinstance(prompt, str) else list(map(_turn, prompt))


def episode_text(episode: Sequence[EpisodeTurn]) -> str:
    """Return an episode as text for tables, a paragraph per message: ``Assistant (12 tokens, reward +0.50): TEXT``."""
    paragraphs = []
    for turn in episode:
        tokens = turn.stop - turn.start
        facts = [
            f"{tokens} {'tokens' if tokens > 1 else 'token'}{'' if turn.sampled else ', masked'}"
            if tokens
            else "never seen by the policy"
        ]
        facts += [f"reward {turn.reward:+.2f}"] if turn.reward is not None else []
        for message in turns(turn.messages):
            paragraphs.append(f"{message.label} ({', '.join(facts)}): {message.text}")
    return "\n".join(paragraphs)


def _turn(message: Mapping[str, Any]) -> Turn:
    role = str(message.get("role"))
    label = LABELS.get(role) or one_line(role, EARLIER_CHARACTERS)
    if name := message.get("name"):
        label = f"{label} ({one_line(str(name), EARLIER_CHARACTERS)})"
    thought, content = message.get("reasoning_content"), message.get("content")
    parts = [f"Reasoning: {thought}"] if thought else []
    parts += [str(content)] if content else []
    calls = message.get("tool_calls") or ()
    parts += map(_call, calls if isinstance(calls, list | tuple) else [calls])
    return Turn(role if role in LABELS else "other", label, "\n".join(parts))


def _call(call: Any) -> str:
    """Return a tool call as ``Call NAME(ARGUMENTS)``."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        return f"Call {json.dumps(call, ensure_ascii=False, default=str)}"
    arguments = function.get("arguments", "")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
    return f"Call {function['name']}({text})"


def one_line(text: str, most: int) -> str:
    """Return up to ``most`` characters of a text on one line, without control characters."""
    text = " ".join(printable(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def turn_lines(prompt: Conversation, most: int = LAST_CHARACTERS) -> list[str]:
    """Return a prompt as short lines for the terminal: ``User: Is the gateway up?``.

    The last turn has up to ``most`` characters, earlier ones fewer. Of many earlier turns, the oldest are only counted. A
    prompt that is a text is one line without a label.
    """
    *earlier, last = turns(prompt)
    lines = [f"{turn.label}: {one_line(turn.text, EARLIER_CHARACTERS)}" for turn in earlier]
    if len(lines) > MAX_EARLIER:
        first = lines[:1] if earlier[0].role == "system" else []
        newest = lines[len(first) - MAX_EARLIER :]
        lines = [*first, f"… {len(lines) - len(first) - len(newest)} earlier turns …", *newest]
    label = f"{last.label}: " if last.label else ""
    return [*lines, label + one_line(last.text, most)]
