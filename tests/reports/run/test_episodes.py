"""Episodes in the run report: conversations turn by turn, failed episodes, damaged and hostile files."""

from __future__ import annotations

import json

import pytest
from made_runs import HOSTILE, episode, make_run
from reports.run.test_report import page_of, specs, text_of

from reinforcepp.monitoring.completion_log import (
    evaluation_file,
    read_completions,
    save_completions,
    step_file,
    turn_rows,
    turns_of,
)
from reinforcepp.monitoring.run_record import read_run
from reinforcepp.reports.run import samples
from reinforcepp.reports.run.episodes import read_failed, transcript
from reinforcepp.types import Completion, EpisodeTurn, Prompt

CALLED = {"id": "1", "function": {"name": "lookup", "arguments": {"key": "a & b"}}}
TURNS = (
    EpisodeTurn(({"role": "assistant", "content": "", "tool_calls": [CALLED]},), 0, 5, True, reward=-0.5),
    EpisodeTurn(({"role": "tool", "name": "lookup", "content": "<b>1</b>"}, {"role": "user", "content": "Go on."}), 5, 8, False),
    EpisodeTurn(({"role": "assistant", "content": "One."},), 8, 9, True, reward=2.0),
    EpisodeTurn(({"role": "user", "content": "Right."},), 9, 9, False),
)  # fmt: skip


def stored(turns) -> str:
    completion = Completion(Prompt("?", (1,), 0), tuple(range(9)), (0.0,) * 9, "One.", "stop", turns=tuple(turns))
    return json.dumps(turn_rows(completion))


def write_failed(folder, *rows) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "failed_episodes.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def failure(reason, **more):
    return {"error": reason, "prompt": "Guess.", "turns": json.loads(stored(TURNS[:2]))} | more


# --- turns ------------------------------------------------------------------------------------------------------------


def test_stored_turns_are_read_as_they_were():
    assert turns_of({"turns": stored(TURNS)}) == TURNS == turns_of({"turns": json.loads(stored(TURNS))})


@pytest.mark.parametrize(
    "damaged",
    [None, "", "{", "3", "[3]", '[{"messages": [3], "tokens": 1, "sampled": true, "reward": 1}]', "[" * 10**5, '[{"a": 1}]',
     '[{"messages": [], "tokens": 1e999, "sampled": true, "reward": 1}]'],
)  # fmt: skip
def test_damaged_turns_are_none(damaged):
    assert turns_of({"turns": damaged}) == ()


def test_each_turn_has_author_mark_tokens_and_reward():
    shown = transcript(TURNS, "trained", "masked")["head"]
    keys = ("author", "kind", "mark", "tokens", "reward")
    assert [tuple(turn[key] for key in keys) for turn in shown] == [
        ("Policy", "policy", "trained", "5 tokens", "reward -0.50"),
        ("Environment", "environment", "masked", "3 tokens", ""),
        ("Policy", "policy", "trained", "1 token", "reward +2.00"),
        ("Environment", "unread", "never seen by the policy", "", ""),
    ]
    assert shown[0]["messages"] == [("", 'Call lookup({"key": "a & b"})')]
    assert shown[1]["messages"] == [("Tool (lookup)", "<b>1</b>"), ("User", "Go on.")]
    assert transcript([EpisodeTurn(TURNS[1].messages[:1], 0, 1, False)])["head"][0]["author"] == "Tool (lookup)"


def test_the_middle_of_a_long_conversation_is_collapsed():
    turns = turns_of({"turns": json.dumps(episode(6, "x"))})  # 12 turns: 20 to 24 tokens each of the policy, then 9
    shown = transcript(turns)
    assert [len(shown[part]) for part in ("head", "middle", "tail")] == [3, 6, 3]
    # In between: 7, 22, 7, 23, 7, 24 tokens, and 3 rewards of 0.25.
    assert shown["summary"] == "6 turns in between: 90 tokens, reward +0.75" and shown["most"] == 1000
    long = transcript(turns_of({"turns": json.dumps(episode(200, "x"))}))
    assert len(long["middle"]) == 40 and long["summary"].startswith("394 turns in between: ") and long["most"] == 260
    assert long["summary"].endswith("Open for the first and the last 20")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_samples_and_held_out_pairs_show_the_conversation(tmp_path):
    page = page_of(make_run(tmp_path / "run", turns=2))
    text = text_of(page)
    call = '<tool_call>{"name": "lookup", "arguments": {"key": 0}}</tool_call>'
    middle = "Tool (lookup) {} 7 tokens Entry 0. {}, {}. Policy {} 9 tokens · reward +1.00 The answer at {}, {}."
    end = "Environment never seen by the policy Correct. "
    trained = middle.format("masked", "step 12", 14, "trained", "step 12", 14)
    assert f"Policy trained 20 tokens {call} {trained} {end}" in text
    assert (
        f"Policy sampled 20 tokens {call} {middle.format('given', 'before', 3, 'sampled', 'before', 3)} {end}" in text
    )
    assert "Tokens of turns marked “trained” enter the loss." in text and "Answer 15 of step 12." not in text
    assert 'id="failed"' not in page


def test_truncated_completions_can_be_masked(tmp_path):
    text = text_of(page_of(make_run(tmp_path / "run", turns=1, settings={"mask_truncated_completions": True})))
    assert "· truncated Prompt 15? Policy masked 9 tokens" in text and "Prompt 0? Policy trained 9 tokens" in text


def test_a_run_without_turns_has_no_trace_of_them(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    assert 'class="episode"' not in page and "masked" not in text_of(page) and "Failed episodes" not in page


def test_equal_conversations_are_shown_once_and_others_apart(tmp_path):
    """All completions end with the same message; those of one step differ in an earlier one or in a reward alone."""
    folder = make_run(tmp_path / "run", steps=3, logged=3, turns=2)
    for step in (1, 2, 3):
        path = folder / "completions" / step_file(step)
        rows = read_completions(path)
        for i, row in enumerate(rows):
            turns = episode(2, "end")
            turns[1]["messages"][0]["content"] = f"Entry {i % 2}"
            turns[2]["reward"] = step
            row |= {"completion": "The answer at end", "turns": json.dumps(turns)}
        save_completions(path, {name: [row[name] for row in rows] for name in rows[0]})
    best = samples.choose_samples(read_run(folder), 6).groups[-1].samples
    assert [(sample.seen, sample.turns[1].messages[0]["content"]) for sample in best] == [
        (24, "Entry 1"),
        (24, "Entry 0"),
    ]


def test_held_out_responses_are_the_same_if_all_turns_are(tmp_path):
    folder = make_run(tmp_path / "run", heldout=2, turns=2)
    for when, entries in (("before", "ab"), ("after", "ac")):
        path = evaluation_file(folder, when)
        rows = read_completions(path)
        for row, entry in zip(rows, entries, strict=True):
            row |= {"completion": "The answer at end", "turns": json.dumps(episode(2, "end", entry))}
        save_completions(path, {name: [row[name] for row in rows] for name in rows[0]})
    pairs = {pair.prompt: pair.same for pair in samples.choose_pairs(read_run(folder)).pairs}
    assert pairs == {"Held-out 0? ": True, "Held-out 1? ": False}


def test_damaged_turns_show_the_last_message(tmp_path):
    folder = make_run(tmp_path / "run", turns=2)
    path = folder / "completions" / step_file(12)
    rows = read_completions(path)
    save_completions(path, {name: [row[name] for row in rows] for name in rows[0]} | {"turns": ["{"] * len(rows)})
    assert "Answer 15 of step 12." in text_of(page_of(folder))


def test_hostile_conversations_are_escaped(tmp_path):
    turns = episode(3, HOSTILE, HOSTILE)
    turns[1]["messages"] += [
        {"role": HOSTILE, "name": HOSTILE, "content": "\ud800", "tool_calls": [HOSTILE, {"function": 3}]}
    ]
    turns[2]["messages"] = [{"content": [HOSTILE], "tool_calls": HOSTILE}]
    folder = make_run(tmp_path / "run", turns=3, text=HOSTILE, settings={"data": HOSTILE})
    write_failed(folder, failure(HOSTILE, prompt=HOSTILE, turns=turns), failure("\ud800", prompt={"\ud800": 3}))
    page = page_of(folder)
    assert "<img" not in page and '<a href="javascript' not in page and not set(page) & set("\x1b\u202e")
    assert page.count("<script") == page.count("</script>")
    assert "<tool_call>" not in page and "Tool (lookup</script>" in text_of(page)
    page.encode()


def test_the_page_of_long_episodes_stays_small(tmp_path):
    folder = make_run(tmp_path / "run", steps=2, logged=2, heldout=12, turns=16, text="<&" * 2000)
    write_failed(folder, *[failure(f"{i}" * 900, turns=episode(60, "<&" * 3000)) for i in range(2)])
    page = page_of(folder, 50)
    assert len(page.encode()) < 5_000_000 and page.count('class="episode"') > 12


# --- failed episodes --------------------------------------------------------------------------------------------------


def test_failed_episodes_are_counted_by_their_reasons(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [failure("no board")] * 3 + [failure("too slow"), failure("no row", turns=[])]
    write_failed(folder, *rows, "{damaged", "[]", '{"prompt": 3}', "")
    failed = read_failed(folder)
    assert (failed.number, failed.damaged) == (5, 3)
    assert failed.reasons == [("no board", 3), ("too slow", 1), ("no row", 1)]
    assert [reason for reason, *_ in failed.shown] == ["no board", "too slow", "no row"]
    page = page_of(folder)
    text = text_of(page)
    assert "5 episodes of training and evaluation failed and got no reward." in text
    assert "Skipped 3 lines of failed_episodes.jsonl because of damage." in text
    assert "reason episodes no board 3 too slow 1 no row 1" in text
    assert 'no board Guess. Policy sampled 5 tokens · reward -0.50 Call lookup({"key": "a & b"})' in text
    assert "no row Guess. The episode failed before its first turn." in text
    assert page.index('id="samples"') < page.index('id="failed"') < page.index('id="diagnostics"')


def test_one_reason_has_several_examples_and_many_reasons_are_counted(tmp_path):
    write_failed(tmp_path, *[failure("no board", prompt=f"Guess {i}.") for i in range(9)])
    assert [prompt for _, prompt, _ in read_failed(tmp_path).shown] == ["Guess 0.", "Guess 1.", "Guess 2."]
    folder = make_run(tmp_path / "run")
    write_failed(folder, *[failure(f"reason {i}") for i in range(250)], failure("reason 240"))
    failed = read_failed(folder)
    assert failed.number == 251 and failed.reasons[0] == ("reason 240", 2)
    assert "240 more reasons." in text_of(page_of(folder))


def test_without_a_readable_file_there_is_no_section(tmp_path):
    assert read_failed(tmp_path) is None
    write_failed(tmp_path)
    assert read_failed(tmp_path) is None
    (tmp_path / "failed_episodes.jsonl").write_bytes(b"\xff\xfe\x00\n" * 2)
    assert read_failed(tmp_path).damaged == 2


# --- curves -----------------------------------------------------------------------------------------------------------


def test_metrics_of_episodes_and_tools_are_curves(tmp_path):
    folder = make_run(tmp_path / "run")
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for i, step in enumerate(log):
        step |= {"episodes/mean_turns": 2 + i, "episodes/mean_environment_tokens": 9 + i, "episodes/failed": 0.0}
        step |= {"tools/call_frequency": 0.0, "tools/failure_frequency": 0.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in log))
    drawn = specs(page_of(folder))
    assert {"Turns", "Environment tokens", "Tool calls"} <= drawn.keys()
    assert not {"Failed episodes", "Failed tool calls"} & drawn.keys()
    log[3] |= {"episodes/failed": 2.0, "tools/failure_frequency": 0.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in log))
    assert {"Failed episodes", "Failed tool calls"} <= specs(page_of(folder)).keys()
