"""The chat command: its prompts, its output, and the file of preferences."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from rewards.fake_judge import FakeJudge, completion, in_turn, verdict
from warm import warm_python

from reinforcepp.commands import cli
from reinforcepp.commands.chat.conversation import Conversation
from reinforcepp.commands.chat.preferences import PreferenceFile
from reinforcepp.data import ColumnNames, conversation_text, read_preferences, read_table
from reinforcepp.errors import ConfigError, DataError, ModelError
from reinforcepp.models.conversations import format_prompt
from reinforcepp.models.loading import load_tokenizer, prepare_tokenizer
from reinforcepp.models.tokenization import encode_prompt
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.types import Completion, Prompt
from scripts import SOURCE


@pytest.fixture
def tokenizer():
    return prepare_tokenizer(tiny.tokenizer(), tiny.model().config, "tiny")


@pytest.fixture
def chat(model_folder, tmp_path, capsys, monkeypatch):
    """``chat(lines, *flags)``: what was written to standard output and standard error, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def talk(lines: str, *flags: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        given = ["--engine", "transformers", "--max_new_tokens", "12", *flags]
        assert cli.main(["chat", str(model_folder), *given]) == code
        return capsys.readouterr()

    return talk


@pytest.fixture
def model_says(monkeypatch):
    """``model_says("a", "b")``: these are the answers, in turn; the list that it returns fills with prompts and seeds."""

    def say(*texts: str, reason: str = "stop") -> list[tuple[Prompt, int]]:
        asked: list[tuple[Prompt, int]] = []

        def stream(self, prompt, sampling):
            text = texts[len(asked) % len(texts)]
            asked.append((prompt, sampling.seed))
            for end in range(1, len(text) + 1):
                yield Completion(prompt, (1,), (0.0,), text[:end], "length" if end < len(text) else reason)
            if not text:
                yield Completion(prompt, (1,), (0.0,), "", reason)

        monkeypatch.setattr(TransformersEngine, "stream", stream)
        return asked

    return say


def pairs(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def asking(text: str) -> Prompt:
    return Prompt(text, (1,), 1, messages=(user(text),))


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# --- a conversation ---------------------------------------------------------------------------------------------------


def test_turns_follow_one_another_in_the_model_s_template(chat, model_says, model_folder):
    from transformers import AutoTokenizer

    asked = model_says("One.", "Two.")
    out, err = chat("First?\n\n  Second? \n/quit\nNever asked\n")
    assert (out, err) == ("One.\nTwo.\n", "")
    decode = AutoTokenizer.from_pretrained(model_folder).decode
    assert [decode(prompt.ids) for prompt, _ in asked] == [
        "First?",
        "Question: First?\nAnswer: One.<|endoftext|>Question: Second?\nAnswer:",
    ]


def test_an_answer_is_shown_while_it_grows(chat, monkeypatch, model_says, capsys):
    seen = []

    def stream(self, prompt, sampling):
        for text in ("Gr", "Grow", "Growing"):
            seen.append(capsys.readouterr().out)
            yield Completion(prompt, (1,), (0.0,), text, "stop")

    monkeypatch.setattr(TransformersEngine, "stream", stream)
    assert chat("Hi?\n")[0] == "ing\n"
    assert seen == ["", "Gr", "ow"]


def test_regenerate_answers_the_same_question_with_other_random_numbers(chat):
    flags = ("--temperature", "1", "--seed", "5")
    first, again = (chat("Why?\n/regenerate\n/regenerate\n", *flags) for _ in range(2))
    assert first == again
    assert len(set(first[0].splitlines())) > 1
    assert "response 2" in first[1] and "response 3" in first[1]
    assert chat("Why?\n/regenerate\n/regenerate\n", "--temperature", "1", "--seed", "6")[0] != first[0]


def test_a_question_after_regenerate_follows_the_last_answer(chat, model_says):
    asked = model_says("Old.", "New.", "Then.")
    chat("A?\n/regenerate\nB?\n")
    assert asked[0][0].ids == asked[1][0].ids and asked[0][0].key != asked[1][0].key
    assert list(asked[2][0].messages) == [user("A?"), assistant("New."), user("B?")]


def test_system_and_reset(chat, model_says):
    asked = model_says("x")
    said = chat("/system Be brief.\nA?\n/reset\nB?\n/system\nC?\n", "--system", "Never used")
    assert [list(prompt.messages) for prompt, _ in asked] == [
        [{"role": "system", "content": "Be brief."}, user("A?")],
        [{"role": "system", "content": "Be brief."}, user("B?")],
        [user("B?"), assistant("x"), user("C?")],
    ]
    assert "Cleared" in said.err and "Removed the system message" in said.err
    asked = model_says("x")
    chat("A?\n", "--system", "Told by a flag")
    assert asked[0][0].messages[0]["content"] == "Told by a flag"


def test_unknown_commands_are_errors_and_a_double_slash_is_a_message(chat, model_says):
    asked = model_says("x")
    _, err = chat("/regen\n/prefer\n/prefer x\n/regenerate\n//etc/hosts?\n/help\n")
    assert "/regen not found. Did you mean '/regenerate'?" in err
    assert "two responses" in err and "'x' isn't" in err and "no question was asked" in err
    assert [prompt.text for prompt, _ in asked] == ["/etc/hosts?"]
    listed = [
        word for word in ("/regenerate", "/prefer [N]", "/system", "/reset", "/quit", "Ctrl-D") if word not in err
    ]
    assert listed == []


def test_at_temperature_zero_there_is_no_other_answer(chat):
    assert "every response is the same" in chat("A?\n/regenerate\n", "--temperature", "0").err


def test_a_model_can_not_steer_the_terminal(chat, model_says):
    model_says("a\x1b[2Jb\x07\u202ec")
    assert chat("A?\n").out == "a\ufffd[2Jb\ufffd\ufffdc\n"


def test_a_truncated_response_is_marked(chat, model_says):
    model_says("x", reason="length")
    assert "(truncated after 12 tokens)" in chat("A?\n").err


def test_the_score_of_the_reward_model_follows_the_response(chat, model_says, reward_folder):
    from reinforcepp.rewards.trained import load_reward_model

    model_says("Run ip route.", "Reboot.")
    _, err = chat("How?\n/regenerate\nAnd then?\n", "--reward_model", str(reward_folder))
    score = load_reward_model(str(reward_folder))
    one, two = score(["How?", "How?"], ["Run ip route.", "Reboot."])
    (three,) = score([[user("How?"), assistant("Reboot."), user("And then?")]], ["Run ip route."])
    assert err.splitlines() == [f"(reward {one:+.3f})", f"(response 2, reward {two:+.3f})", f"(reward {three:+.3f})"]


def test_a_judge_scores_responses_and_its_failures_do_not_end_the_chat(chat, model_says, monkeypatch, tmp_path):
    monkeypatch.setenv("REINFORCEPP_CACHE", str(tmp_path / "home"))
    model_says("Good.", "Bad.", "Odd.")
    with FakeJudge(in_turn(verdict(10), (401, b""), completion(None, refusal="No."))) as fake:
        name = f"judge:m?base_url={fake.base_url}&no_verdict=skip"
        out, err = chat("How?\nAnd?\nSo?\n", "--reward_model", name)
    assert out == "Good.\nBad.\nOdd.\n"
    assert "(reward +1.000)" in err and "Set REINFORCEPP_JUDGE_KEY to the server's key." in err and "(no score)" in err
    chat("", "--reward_model", "judge:m?rubric=wrong", code=2)


# --- the context ------------------------------------------------------------------------------------------------------


def said(conversation: Conversation, question: str, answer: str = "ok") -> Prompt:
    prompt = conversation.ask(question)
    conversation.answered(Completion(prompt, (1,), (0.0,), answer, "stop"))
    return prompt


def test_a_full_context_skips_the_oldest_turns(tokenizer):
    conversation = Conversation(tokenizer, 10_000, "Be brief.")
    whole = [said(conversation, f"Question number {i}?") for i in range(4)]
    room = len(whole[2].ids)
    conversation = Conversation(tokenizer, room, "Be brief.")
    prompts = [said(conversation, f"Question number {i}?") for i in range(6)]
    assert all(len(prompt.ids) <= room for prompt in prompts)
    assert [len(prompt.messages) for prompt in prompts] == [2, 4, 6, 6, 6, 6]
    assert conversation.skipped_turns == 3
    assert list(prompts[5].messages) == [
        {"role": "system", "content": "Be brief."},
        *(user("Question number 3?"), assistant("ok"), user("Question number 4?"), assistant("ok")),
        user("Question number 5?"),
    ]


def test_skipped_turns_are_printed_and_a_too_long_question_changes_nothing(chat, model_says):
    asked = model_says("ok")
    lines = "".join(f"Is this question {i}?\n" for i in range(3))
    _, err = chat(lines + "why " * 200 + "\nShort?\n", "--max_length", "60")
    assert err.count("Skipped the oldest 1 turn") >= 1
    assert "question is too long" in err and "but only 48 fit" in err
    assert list(asked[-1][0].messages[-3:]) == [user("Is this question 2?"), assistant("ok"), user("Short?")]


def test_limits_that_leave_no_room_are_refused(chat):
    assert "leaves no room" in chat("", "--max_new_tokens", "512", code=2).err
    assert "exceeds the model's context of 512" in chat("", "--max_length", "513", code=2).err
    assert "max_length 12 leaves no room" in chat("", "--max_length", "12", code=2).err


# --- system messages in templates -------------------------------------------------------------------------------------

SYSTEM = [{"role": "system", "content": "S"}, user("A"), assistant("B"), user("C")]


def test_a_system_message_has_its_place_or_stands_before_the_first_question(tokenizer):
    assert format_prompt(tokenizer, SYSTEM) == "S\n\nQuestion: A\nAnswer: B<|endoftext|>Question: C\nAnswer:"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert format_prompt(tokenizer, SYSTEM) == "[system]S[user]A[assistant]B[user]C"
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tokenizer.chat_template
    )
    assert format_prompt(tokenizer, SYSTEM) == "[user]S\n\nA[assistant]B[user]C"
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(ModelError, match="only one turn"):
        format_prompt(tokenizer, SYSTEM)


# --- preferences ------------------------------------------------------------------------------------------------------


def test_prefer_appends_the_last_answer_as_better_than_the_one_before(chat, model_says, tmp_path):
    model_says("bad", "good")
    _, err = chat("A?\n/regenerate\n/prefer\n")
    record = {"prompt": [user("A?")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    assert pairs(tmp_path / "preferences.jsonl") == [record]
    assert "preferences.jsonl: response 2 is better than response 1" in err.replace("\n", " ")


def test_the_next_question_follows_the_preferred_answer(chat, model_says, tmp_path):
    asked = model_says("one", "two", "three", "four")
    chat("A?\n/regenerate\n/prefer 1\n/regenerate\n/prefer 1\nB?\n", "--preferences", "p.jsonl")
    saved = [
        (record["chosen"][0]["content"], record["rejected"][0]["content"]) for record in pairs(tmp_path / "p.jsonl")
    ]
    assert saved == [("one", "two"), ("one", "three")]
    assert list(asked[-1][0].messages) == [user("A?"), assistant("one"), user("B?")]


def test_invalid_preferences_are_errors(chat, model_says, tmp_path):
    model_says("same", " same ", "", "other")
    _, err = chat(
        "A?\n/prefer\n/regenerate\n/prefer\n/regenerate\n/prefer\n/regenerate\n/prefer 4\n/prefer 5\n/prefer 0\n"
    )
    assert "two responses" in err and "are the same" in err and "is empty" in err
    assert "response 5 not found" in err and "response 0 not found" in err
    assert not (tmp_path / "preferences.jsonl").exists()


def test_the_same_two_answers_are_compared_once(chat, model_says, tmp_path):
    model_says("a", "b")
    _, err = chat("A?\n/regenerate\n/prefer 1\n/prefer 2\n")
    assert "already compared" in err
    assert len(pairs(tmp_path / "preferences.jsonl")) == 1


def test_answers_under_different_system_messages_are_not_compared(chat, model_says, tmp_path):
    model_says("a", "b")
    _, err = chat("A?\n/system Be rude.\n/regenerate\n/prefer\n")
    assert "different prompts" in err and not (tmp_path / "preferences.jsonl").exists()


def test_training_encodes_the_prompts_that_were_sampled_from(chat, model_says, tmp_path, model_folder):
    asked = model_says('good, "quoted"\nline', "bad", "better", "worse")
    lines = "A?\n/regenerate\n/prefer 1\nÜber  B?\n/regenerate\n/prefer 1\n"
    chat(lines, "--preferences", "p.jsonl", "--system", "Be\n brief. ")
    pairs = read_preferences(tmp_path / "p.jsonl").pairs
    tokenizer = load_tokenizer(str(model_folder))
    encoded = [encode_prompt(tokenizer, pair.conversation, **pair.chat_template_kwargs) for pair in pairs]
    assert encoded == [list(asked[0][0].ids), list(asked[2][0].ids)]
    assert pairs[1].messages[0] == {"role": "system", "content": "Be\n brief. "} and len(pairs[1].messages) == 4


def test_variables_of_the_template_are_saved(tmp_path):
    prompt = Prompt("A?", (1,), 1, messages=(user("A?"),), chat_template_kwargs={"enable_thinking": False})
    PreferenceFile(str(tmp_path / "p.jsonl")).append(prompt, "yes", "no")
    PreferenceFile(str(tmp_path / "p.jsonl")).append(prompt, "no", "yes")
    assert read_preferences(tmp_path / "p.jsonl").pairs[0].chat_template_kwargs == {"enable_thinking": False}


def test_a_csv_takes_no_conversation(chat, model_says, tmp_path, model_folder):
    asked = model_says("good", "bad", "better", "worse")
    lines = "A?\n/regenerate\n/prefer 1\nB?\n/regenerate\n/prefer 1\n/reset\nC?\n/regenerate\n/prefer 1\n"
    _, err = chat(lines, "--preferences", "p.csv")
    assert "p.csv can't hold the earlier turns" in err and err.count("Saved to") == 2
    pairs = read_preferences(tmp_path / "p.csv").pairs
    encoded = [encode_prompt(load_tokenizer(str(model_folder)), pair.conversation) for pair in pairs]
    assert encoded == [list(asked[0][0].ids), list(asked[4][0].ids)]
    assert "can't hold the system message" in chat("", "--preferences", "p.csv", "--system", "S", code=2).err


def test_the_file_reads_as_the_texts_that_were_trained_on(chat, model_says, tmp_path):
    asked = model_says('good, "quoted"\nline', "bad", "better", "worse")
    chat("A?\n/regenerate\n/prefer 1\nÜber B?\n/regenerate\n/prefer 1\n", "--system", "S")
    read = read_preferences(tmp_path / "preferences.jsonl")
    assert read.skipped == ()
    assert [pair.prompt for pair in read.pairs] == [asked[0][0].text, asked[2][0].text]
    assert read.pairs[1].prompt == 'S\n\nA?\nAnswer: good, "quoted"\nline\nQuestion: Über B?'
    assert [(pair.chosen, pair.rejected) for pair in read.pairs] == [
        ('good, "quoted"\nline', "bad"),
        ("better", "worse"),
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_lint_and_reward_take_the_file(chat, model_says, tmp_path, name, capsys, model_folder):
    answers = [word for i in range(4) for word in (f"Run command number {i} as root.", f"No idea, sorry {i}.")]
    model_says(*answers)
    questions = ("How do I see routes?", "Which port is open?", "Where is DNS set?", "What is my address?")
    lines = "".join(f"{question}\n/regenerate\n/prefer 1\n/reset\n" for question in questions)
    chat(lines, "--preferences", name)
    assert cli.main(["lint", name, "--fail_on", "error"]) == 0
    flags = ["--model", str(model_folder), "--data", name, "--output_dir", "rm", "--num_train_epochs", "1"]
    assert cli.main(["reward", *flags, "--heldout_fraction", "0.25"]) == 0
    card = json.loads((tmp_path / "rm" / "reward_model.json").read_text())
    assert card["train_pairs"] + card["heldout_pairs"] == 4


def test_a_csv_gets_one_header_and_its_own_order_of_columns(tmp_path):
    path = tmp_path / "p.csv"
    for number in range(3):
        PreferenceFile(str(path)).append(asking(f"A{number}\0"), "yes\r", "no")
    rows = list(csv.reader(io.StringIO(path.read_text(), newline="")))
    assert [row[0] for row in rows] == ["prompt", "A0\ufffd", "A1\ufffd", "A2\ufffd"]
    path.write_text("note,rejected,prompt,chosen\nx,b,P,a")  # without a line feed at its end
    PreferenceFile(str(path)).append(asking("Q"), "good", "bad")
    assert list(csv.reader(path.open()))[2] == ["", "bad", "Q", "good"]
    assert len(read_table(path, ColumnNames(), pairs=True).rows) == 2


def test_a_jsonl_is_appended_to(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "P", "chosen": "a", "rejected": "b"}')
    PreferenceFile(str(path)).append(asking("Q\u2028\x1b"), "good", "bad")
    assert [pair.chosen for pair in read_preferences(path).pairs] == ["a", "good"]


def test_a_file_that_can_not_take_pairs_is_refused_before_anything_is_loaded(chat, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "reinforcepp.commands.chat.command.load_config", lambda *_: pytest.fail("the model was looked at")
    )
    (tmp_path / "other.csv").write_text("question,response_chosen,response_rejected\na,b,c\n")
    (tmp_path / "damaged.jsonl").write_text('{"prompt": "a", \n')
    assert "ends in .jsonl or .csv" in chat("", "--preferences", "p.txt", code=2).err
    assert "none doesn't exist" in chat("", "--preferences", "none/p.csv", code=2).err
    assert "question, response_chosen" in chat("", "--preferences", "other.csv", code=2).err
    assert "damaged.jsonl" in chat("", "--preferences", "damaged.jsonl", code=2).err


def test_a_full_disk_leaves_whole_lines_and_the_conversation(chat, model_says, tmp_path, monkeypatch):
    path = tmp_path / "preferences.jsonl"
    before = '{"prompt": "P", "chosen": "a", "rejected": "b"}\n'
    path.write_text(before)
    write = os.write

    def half(handle: int, data: bytes) -> int:
        if len(data) < 60:
            raise OSError(28, "No space left on device")
        return write(handle, data[:50])

    monkeypatch.setattr(os, "write", half)
    model_says("a", "b")
    out, err = chat("A?\n/regenerate\n/prefer\nB?\n")
    assert "No space left on device). Nothing was added" in err.replace("\n", " ")
    assert path.read_text() == before
    assert out.count("\n") == 3, "the conversation continued"


def test_the_class_checks_preferences_itself(tokenizer):
    conversation = Conversation(tokenizer, 1000)
    with pytest.raises(DataError):
        conversation.prefer(None, lambda *_: pytest.fail("saved"))
    prompt = said(conversation, "A?", "x")
    conversation.answered(Completion(prompt, (1,), (0.0,), "y", "stop"))
    assert conversation.prefer(1, lambda *_: None) == (1, 2)
    assert conversation_text([user("A?")]) == prompt.text
    with pytest.raises(ConfigError):
        PreferenceFile("")


# --- the real thing ---------------------------------------------------------------------------------------------------


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}


def test_through_a_pipe(tmp_path):
    command = [warm_python(), "-m", "reinforcepp", "chat", "--engine", "transformers", "--max_new_tokens", "8"]
    lines = "Wie hei\xdft der Router?\n".encode("latin-1") + b"/regenerate\n"
    settings = environment(tmp_path) | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        command, input=lines, capture_output=True, cwd=tmp_path, env=settings, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().count("\n") >= 2 and b"> " not in done.stdout
    assert b"response 2" in done.stderr and b"Traceback" not in done.stderr


def test_on_a_terminal_ctrl_c_stops_the_answer_alone_and_ctrl_d_leaves(tmp_path):
    command = [sys.executable, "-m", "reinforcepp", "chat", "--engine", "transformers", "--max_new_tokens", "480"]
    command += ["--repetition_penalty", "1000", "--temperature", "1.5"]  # so that answers are long
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has its background jobs, as a test may be, ignore it
        os.execve(sys.executable, command, environment(tmp_path))
    seen = ""

    def wait_for(text: str, start: int, again: bytes = b"") -> int:
        nonlocal seen
        end = time.monotonic() + 150
        while text not in seen[start:]:
            assert time.monotonic() < end, seen
            if select.select([terminal], [], [], 5)[0]:
                seen += os.read(terminal, 4096).decode(errors="replace")
            else:
                os.write(terminal, again)
        return seen.index(text, start) + len(text)

    try:
        place = wait_for("> ", 0)
        assert "type /help" in seen and "press Ctrl-D" in seen
        os.write(terminal, b"How?\n")
        place = wait_for("How?", place)
        place = wait_for(" ", place + 4)  # the answer has begun
        os.write(terminal, b"\x03")
        place = wait_for("(stopped)", place)
        place = wait_for("> ", place)
        os.write(terminal, b"\x03")
        # Python doesn't notice a signal that comes when the prompt is shown and it doesn't wait for input yet
        place = wait_for("type /quit.", place, again=b"\x03")
        place = wait_for("> ", place)
        os.write(terminal, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)
