"""The generate command: sources of prompts, outputs, and sampling settings."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from rewards.fake_judge import FakeJudge, verdict
from transformers import GenerationConfig

from reinforcepp.commands import cli, generate
from reinforcepp.data import read_prompts, read_texts
from reinforcepp.models.loading import load_config, load_policy, load_tokenizer
from reinforcepp.models.tokenization import encode_prompt
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.runtime.terminal import printable
from reinforcepp.types import Completion

PROMPT = "How do I see my routes?"


@pytest.fixture
def answer(model_folder, capsys):
    """``answer("--prompt", ...)`` is what the command wrote to standard output and to standard error."""

    def run(*flags: str) -> tuple[str, str]:
        sizes = ["--max_prompt_length", "64", "--max_new_tokens", "12", "--engine", "transformers"]
        assert cli.main(["generate", "--model", str(model_folder), *sizes, *flags]) == 0
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(model_folder, capsys, monkeypatch):
    """``refused("--prompt", ...)`` returns the one line that the command printed; no weights may be loaded."""
    monkeypatch.setattr("reinforcepp.commands.generate.load_policy", lambda *_: pytest.fail("weights were loaded"))

    def run(*flags: str) -> str:
        assert cli.main(["generate", "--model", str(model_folder), *flags]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return run


def stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def engine_says(monkeypatch, *texts: str) -> list:
    """The engine answers with ``texts`` in turn; returns the list into which it puts what it was asked."""
    asked = []

    def generate(self, prompts, sampling):
        asked.extend([prompts, sampling])
        each = [prompt for prompt in prompts for _ in range(sampling.num_samples)]
        return [Completion(prompt, (1,), (0.0,), texts[i % len(texts)], "stop") for i, prompt in enumerate(each)]

    def stream(self, prompt, sampling):
        (whole,) = generate(self, [prompt], sampling)
        for end in range(1, len(whole.text) + 1):
            yield replace(whole, text=whole.text[:end])

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    monkeypatch.setattr(TransformersEngine, "stream", stream)
    return asked


# --- where prompts come from ------------------------------------------------------------------------------------------


def test_one_prompt_gives_one_answer_and_nothing_else(answer):
    out, err = answer("--prompt", PROMPT)
    assert out.strip()
    assert PROMPT not in out
    assert err == ""


def test_a_file_of_prompts(answer, tmp_path, monkeypatch):
    engine_says(monkeypatch, "first", "second", "third")
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff  Wie heißt der Router?\r\n\r\n   \nWhy?\nWhere?".encode())
    out, _ = answer("--prompts_file", str(path))
    assert out == ">   Wie heißt der Router?\nfirst\n> Why?\nsecond\n> Where?\nthird\n"


def test_standard_input(answer, monkeypatch):
    engine_says(monkeypatch, "a", "b")
    stdin(monkeypatch, "Why?\n\nÜber was?\n".encode())
    assert answer().out == "> Why?\na\n> Über was?\nb\n"


def test_the_answer_is_the_same_however_the_prompt_comes(answer, tmp_path, monkeypatch):
    direct = answer("--prompt", PROMPT).out
    (tmp_path / "p.txt").write_text(PROMPT)
    stdin(monkeypatch, PROMPT.encode())
    assert direct == answer("--prompts_file", str(tmp_path / "p.txt")).out == answer().out


def test_a_long_prompt_is_truncated_with_a_warning(answer, monkeypatch):
    asked = engine_says(monkeypatch, "a")
    _, err = answer("--prompt", "why " * 200 + "now?")
    assert "1 of 1 prompts" in err
    assert "64 tokens" in err
    assert "lost their oldest turns or the beginning of their text" in err.replace("\n", " ")
    assert len(asked[0][0].ids) <= 64


def test_a_prompt_is_whole_if_the_context_has_room(model_folder, capsys, monkeypatch):
    asked, prompt = engine_says(monkeypatch, "a"), "why " * 100 + "now?"
    sizes = ["--max_new_tokens", "12", "--engine", "transformers"]
    assert cli.main(["generate", "--model", str(model_folder), *sizes, "--prompt", prompt]) == 0
    assert "lost their" not in capsys.readouterr().err
    assert prompt in load_tokenizer(str(model_folder)).decode(asked[0][0].ids)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", ["standard input", "no prompt", "--prompt"]),
        (b" \n\n", ["standard input", "no prompt"]),
        (b"fine\nna\xefve\n", ["standard input:2", "UTF-8", "iconv"]),
    ],
)
def test_unusable_standard_input(refused, monkeypatch, data, named):
    stdin(monkeypatch, data)
    message = refused()
    assert [word for word in named if word not in message] == []


def test_unusable_files_and_settings(refused, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"a\nb\ncaf\xe9\n")
    (tmp_path / "empty.txt").write_text("\n")
    assert "No such file" in refused("--prompts_file", str(tmp_path / "none.txt"))
    assert "directory" in refused("--prompts_file", str(tmp_path))
    assert "latin.txt:3" in refused("--prompts_file", str(tmp_path / "latin.txt"))
    assert "no prompt" in refused("--prompts_file", str(tmp_path / "empty.txt"))
    assert "prompt is empty" in refused("--prompt", " ")
    assert "512 tokens" in refused("--prompt", PROMPT, "--max_new_tokens", "512")


# --- where answers go -------------------------------------------------------------------------------------------------


def test_several_samples_are_printed_with_their_prompts(answer, monkeypatch):
    engine_says(monkeypatch, "one\nand more", "two")
    assert answer("--prompt", "Why?", "--num_samples", "2").out == "> Why?\none\nand more\n> Why?\ntwo\n"


def test_samples_differ(answer, tmp_path):
    answer("--prompt", PROMPT, "--num_samples", "3", "--output", str(tmp_path / "a.jsonl"), "--temperature", "1")
    answers = [json.loads(line)["completion"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(answers) == len(set(answers)) == 3


def test_json_lines(answer, tmp_path, monkeypatch):
    engine_says(monkeypatch, "Zeile\nzwei \u001b[2J ü", "b")
    (tmp_path / "p.txt").write_text("Why?\nWhere?\n")
    out, err = answer("--prompts_file", str(tmp_path / "p.txt"), "--output", str(tmp_path / "a.jsonl"))
    assert out == ""
    assert str(tmp_path / "a.jsonl") in err.replace("\n", "")
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records == [
        {"prompt": "Why?", "completion": "Zeile\nzwei \u001b[2J ü", "finish_reason": "stop"},
        {"prompt": "Where?", "completion": "b", "finish_reason": "stop"},
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "p.txt"]


CONVERSATION = [
    {"role": "system", "content": "Be  brief.\n"},
    {"role": "user", "content": "First?"},
    {"role": "assistant", "content": "Yes.\x1b[2J" + "long " * 50},
    {"role": "user", "content": " Second? "},
]


def test_a_data_file_keeps_its_conversations_from_prompt_to_output(answer, tmp_path, model_folder):
    given = [{"prompt": CONVERSATION, "chat_template_kwargs": {"mood": "x"}}, {"prompt": " Plain? "}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    tokenizer, output = load_tokenizer(str(model_folder)), tmp_path / "out.jsonl"
    sizes = ["--max_prompt_length", "400"]
    _, err = answer("--prompts_file", str(tmp_path / "in.jsonl"), "--output", str(output), *sizes)
    assert "in.jsonl: 2 prompts; 1 row with a system message or earlier turns" in err
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert records[0]["prompt"] == CONVERSATION and records[0]["chat_template_kwargs"] == {"mood": "x"}
    assert [record["completion"][0]["role"] for record in records[:1]] == ["assistant"]
    assert records[1]["prompt"] == " Plain? " and isinstance(records[1]["completion"], str)
    sampled = [encode_prompt(tokenizer, row["prompt"]) for row in given]
    for rows in (read_prompts(output).prompts, read_texts(output).rows):
        assert [encode_prompt(tokenizer, row.conversation) for row in rows] == sampled


def test_conversations_are_printed_turn_by_turn(answer, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": CONVERSATION}) + "\n")
    lines = answer("--prompts_file", str(tmp_path / "in.jsonl"), "--num_samples", "2", "--max_prompt_length", "400")[0]
    shown = lines.split("\n")
    assert shown[:2] == ["> System: Be brief.", "> User: First?"] and shown[3] == "> User: Second?"
    assert shown[2].startswith("> Assistant: Yes.\ufffd[2Jlong long") and shown[2].endswith("…") and len(shown[2]) < 100


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_an_output_that_would_not_be_read_again_is_refused(refused, name):
    assert f"output: {name} would hold JSON lines" in refused("--prompt", PROMPT, "--output", name)


def test_an_output_that_cannot_be_written_is_an_early_error(refused, tmp_path, monkeypatch):
    assert "none doesn't exist" in refused("--prompt", PROMPT, "--output", str(tmp_path / "none" / "a.jsonl"))
    assert "name of a file" in refused("--prompt", PROMPT, "--output", str(tmp_path))
    assert "name of a file" in refused("--prompt", PROMPT, "--output", "")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "no permission" in refused("--prompt", PROMPT, "--output", str(tmp_path / "a.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_a_model_can_not_steer_the_terminal(answer, monkeypatch):
    engine_says(monkeypatch, "a\x1b[2Jb\x07c\x9b1md\re\u202ef\x00g\ttab ü 漢 🙂\nnext")
    out, _ = answer("--prompt", PROMPT)
    assert out == "a\ufffd[2Jb\ufffdc\ufffd1md\ufffde\ufffdf\ufffdg\ttab ü 漢 🙂\nnext\n"


def test_a_closed_pipe_is_not_an_error(model_folder, monkeypatch, capsys):
    engine_says(monkeypatch, "a")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.main(["generate", "--model", str(model_folder), "--prompt", "Why?", "--engine", "transformers"]) == 0
    assert capsys.readouterr().err == ""


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_seed_decides_the_answer(answer):
    first = answer("--prompt", PROMPT, "--seed", "5").out
    assert answer("--prompt", PROMPT, "--seed", "5").out == first
    assert answer("--prompt", PROMPT, "--seed", "6").out != first


def test_every_end_token_of_the_generation_config_ends_a_response(model_folder, tmp_path, capsys, monkeypatch):
    folder, tokenizer = shutil.copytree(model_folder, tmp_path / "model"), load_tokenizer(str(model_folder))
    greedy = ["--temperature", "0", "--engine", "transformers", "--max_new_tokens", "12"]

    def generated() -> dict[str, str]:
        asked = ["--prompt", PROMPT, "--output", str(tmp_path / "a.jsonl"), *greedy]
        assert cli.main(["generate", "--model", str(folder), *asked]) == 0
        return json.loads((tmp_path / "a.jsonl").read_text())

    ids = tokenizer(PROMPT)["input_ids"]
    model = load_policy(str(folder))
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    sampled = ids[-12:]
    last = max(sampled.index(i) for i in sampled)  # the first place of a token that didn't occur before
    assert last > 0 and generated()["finish_reason"] == "length"
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, 301, sampled[last]]).save_pretrained(folder)
    expected = tokenizer.decode(sampled[:last])
    found = generated()
    assert (found["completion"], found["finish_reason"]) == (expected, "stop")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
    assert cli.main(["chat", str(folder), *greedy]) == 0
    out, err = capsys.readouterr()
    assert out == printable(expected.strip()) + "\n" and "truncated" not in err


def test_temperature_zero_takes_the_likeliest_token(answer, model_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = tokenizer(PROMPT)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 12 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
    for seed in "12":
        path = tmp_path / f"{seed}.jsonl"
        answer("--prompt", PROMPT, "--temperature", "0", "--seed", seed, "--output", str(path))
        assert json.loads(path.read_text())["completion"] == expected


def test_every_sampling_setting_reaches_the_engine(answer, monkeypatch):
    asked = engine_says(monkeypatch, "a")
    flags = "--temperature 0.3 --top_p 0.4 --top_k 7 --repetition_penalty 1.3 --num_samples 2 --seed 9"
    answer("--prompt", PROMPT, *flags.split())
    sampling = asked[1]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.3, 0.4, 7)
    assert (sampling.repetition_penalty, sampling.num_samples, sampling.seed) == (1.3, 2, 9)
    assert sampling.max_new_tokens == 12


# --- rewards and the best of several ------------------------------------------------------------------------------------


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_best_of_several_is_the_one_that_the_reward_model_scores_highest(answer, tmp_path, reward_folder):
    (tmp_path / "p.txt").write_text(f"{PROMPT}\nWhy?\n")
    flags = ["--prompts_file", str(tmp_path / "p.txt"), "--temperature", "1", "--reward_model", str(reward_folder)]
    answer(*flags, "--num_samples", "5", "--output", str(tmp_path / "all.jsonl"))
    answer(*flags, "--best_of", "5", "--output", str(tmp_path / "best.jsonl"))
    every, best = written(tmp_path / "all.jsonl"), written(tmp_path / "best.jsonl")
    groups = [every[:5], every[5:]]
    assert all(len({record["reward"] for record in group}) == 5 for group in groups)
    assert best == [max(group, key=lambda record: record["reward"]) for group in groups]
    assert [group.index(record) for group, record in zip(groups, best, strict=True)] != [0, 0]


def test_rewards_are_those_of_the_reward_model(answer, tmp_path, reward_folder):
    from reinforcepp.rewards.trained import load_reward_model

    answer("--prompt", PROMPT, "--reward_model", str(reward_folder), "--output", str(tmp_path / "a.jsonl"))
    (record,) = written(tmp_path / "a.jsonl")
    columns = {"prompts": [PROMPT], "completions": [record["completion"]], "finish_reason": [record["finish_reason"]]}
    assert record["reward"] == pytest.approx(load_reward_model(str(reward_folder))(**columns)[0])


def test_a_judge_scores_responses(answer, monkeypatch, tmp_path):
    monkeypatch.setenv("REINFORCEPP_CACHE", str(tmp_path))
    engine_says(monkeypatch, "worse", "the best", "also bad")
    with FakeJudge(lambda body: verdict(10 if "the best" in body["messages"][-1]["content"] else 1)) as fake:
        flags = ["--prompt", PROMPT, "--reward_model", f"judge:m?base_url={fake.base_url}", "--best_of", "3"]
        assert answer(*flags).out == "the best\n(reward +1.000)\n" and len(fake.asked) == 3


def test_as_text_the_score_stands_under_the_answer(answer, monkeypatch, reward_folder):
    monkeypatch.setattr("reinforcepp.commands.generate.load_reward_model", lambda _: lambda **_: [-0.5, 1.25, 1.25])
    engine_says(monkeypatch, "worse", "first of the best", "second")
    flags = ["--prompt", PROMPT, "--reward_model", str(reward_folder), "--best_of", "3"]
    assert answer(*flags).out == "first of the best\n(reward +1.250)\n"


def test_contradictions_about_the_best_of_several(refused, tmp_path, model_folder):
    assert "best_of needs a reward model" in refused("--prompt", PROMPT, "--best_of", "4")
    flags = ["--prompt", PROMPT, "--best_of", "4", "--reward_model"]
    assert "--num_samples and --best_of" in refused(*flags, "x", "--num_samples", "2")
    assert "reward model folder not found" in refused(*flags, str(tmp_path / "none"))
    assert "no score head" in refused(*flags, str(model_folder))
    assert "Did you mean 'rubric'" in refused(*flags, "judge:m?rubrik=safe")


def test_the_engine_gets_the_dtype_of_inference(answer, model_folder, monkeypatch):
    started, asked = [], []
    start = generate.start_engine

    def recorded(choice, model, *rest, **named):
        started.append(model.dtype)
        return start(choice, model, *rest, **named)

    def dtype_for(requested, *stored):
        asked.append((requested, *stored))
        return torch.bfloat16

    monkeypatch.setattr(generate, "start_engine", recorded)
    answer("--prompt", PROMPT, "--dtype", "bfloat16")
    answer("--prompt", PROMPT)
    monkeypatch.setattr(generate, "inference_dtype", dtype_for)
    answer("--prompt", PROMPT)
    assert started == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert asked == [("auto", load_config(str(model_folder)).dtype)]
