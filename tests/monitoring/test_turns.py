"""Conversations as people read them: labels, tool calls, shortened turns, hostile text."""

from __future__ import annotations

import pytest

from reinforcepp.monitoring.turns import LAST_CHARACTERS, turn_lines, turns

CALL = {"type": "function", "function": {"name": "ping", "arguments": {"host": "gw"}}}


def test_a_text_is_one_turn_without_a_label():
    assert [tuple(turn) for turn in turns("a\nb")] == [("plain", "", "a\nb")]
    assert turn_lines("a\n\n b") == ["a b"]


@pytest.mark.parametrize(
    ("message", "label", "text"),
    [
        ({"role": "system", "content": " s\n"}, "System", " s\n"),
        ({"role": "tool", "content": "{}", "name": "ping"}, "Tool (ping)", "{}"),
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, "Assistant", 'Call ping({"host": "gw"})'),
        ({"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}, "Assistant", "Reasoning: Hm.\nYes."),
        ({"role": "assistant", "content": None, "tool_calls": ["odd"]}, "Assistant", 'Call "odd"'),
        ({"role": "judge\x1b\n", "content": "x"}, "judge\ufffd", "x"),
    ],
)
def test_a_message_has_a_label_and_all_its_parts(message, label, text):
    (turn,) = turns([message])
    assert (turn.label, turn.text) == (label, text)


def test_only_known_roles_become_classes_of_the_page():
    assert [turn.role for turn in turns([{"role": '"><b>', "content": "x"}, {"role": "user", "content": "x"}])] == [
        "other",
        "user",
    ]


def test_lines_are_short_and_cannot_control_the_terminal():
    messages = [{"role": "user" if i % 2 else "system", "content": f"{i} \x1b[2J\n" + "long " * 500} for i in range(20)]
    lines = turn_lines(messages)
    assert len(lines) == 5 and max(map(len, lines)) <= LAST_CHARACTERS + len("System: ")
    assert lines[1] == "… 16 earlier turns …" and lines[-1].startswith("User: 19 \ufffd[2J long")
    assert not {"\n", "\x1b"} & set("".join(lines))
