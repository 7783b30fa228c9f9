"""A judge in a whole training: a failure stops the run with a checkpoint, and the cache makes a resumed run exact."""

from __future__ import annotations

import json
import re
import zlib

import pytest
import tiny
from rewards.fake_judge import FakeJudge, completion

from reinforcepp.commands import cli
from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.completion_log import read_completions

KEY = "a-secret-of-18-letters"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("REINFORCEPP_CACHE", str(tmp_path / "home"))
    monkeypatch.setenv("REINFORCEPP_JUDGE_KEY", KEY)
    with FakeJudge(scored) as fake:
        yield fake


def scored(body):
    answer = re.search(r"to score:\n(.*)\n\[", body["messages"][-1]["content"], re.DOTALL)[1]
    score = 1 + zlib.crc32(answer.encode()) % 10
    return completion(json.dumps({"reason": f"It has {len(answer)} letters.", "score": score}))


def train(base, pairs_csv, folder, reward, *flags):
    given = ["--model", base, "--data", str(pairs_csv), "--rollout", "transformers", "--max_prompt_length", "64"]
    given += ["--max_new_tokens", "8", "--eval_prompts", "0", "--output_dir", str(folder), "--batch_size", "4"]
    return cli.main(["train", *given, "--max_steps", "3", "--rewards", reward, "0.1*rule:length?max=9", *flags])


def log(folder):
    skipped = ("time/", "step_time", "judges/")
    return [{k: v for k, v in m.items() if not k.startswith(skipped)} for m in read_metrics(folder)]


@pytest.mark.full
def test_a_failing_judge_stops_the_run_which_resumes_exactly(base, pairs_csv, tmp_path, fake, capsys):
    whole = f"judge:m?base_url={fake.base_url}&cache={tmp_path}/whole.sqlite&input_price=1&output_price=2"
    assert train(base, pairs_csv, tmp_path / "whole", whole) == 0
    metrics = read_metrics(tmp_path / "whole")
    requests, hits = ([m[f"judges/judge_helpful/{name}"] for m in metrics] for name in ("requests", "cache_hits"))
    assert sum(requests) == len(fake.asked) and [sum(pair) for pair in zip(requests, hits, strict=True)] == [4, 3, 4]
    assert metrics[0]["judges/judge_helpful/dollars"] == pytest.approx(requests[0] * 120e-6)
    assert all("rewards/judge_helpful/mean" in m for m in metrics)
    rows = read_completions(tmp_path / "whole" / "completions")
    assert all(row["extra/judge_helpful_reason"] == f"It has {len(row['completion'])} letters." for row in rows)

    reward, asked = whole.replace("whole.sqlite", "v.sqlite"), len(fake.asked)
    known = int(requests[0]) + 2
    fake.reply = lambda body: scored(body) if len(fake.asked) <= asked + known else completion("I'd rather not.")
    capsys.readouterr()
    assert train(base, pairs_csv, tmp_path / "run", reward) == 2
    error = capsys.readouterr().err
    assert "replies in a row had no verdict, and no score is made up" in error and "Traceback" not in error
    assert "Saved the run after step 1 of 3. Resume it with --resume." in error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    fake.reply, before = scored, len(fake.asked)
    assert train(base, pairs_csv, tmp_path / "run", reward + "&max_requests=90", "--resume") == 0
    assert len(fake.asked) - before == sum(requests) - known, "two answers of step 2 are in the cache"
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert read_completions(tmp_path / "run" / "completions") == rows
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert train(base, pairs_csv, tmp_path / "run", reward + "&scale=0-9", "--resume") == 2
    assert "rewards was [" in capsys.readouterr().err

    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in fake.headers)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if KEY.encode() in path.read_bytes()]
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["rewards"][0].startswith(f"judge:m?base_url={fake.base_url}&cache=")


def test_a_spent_budget_stops_the_run_and_more_of_it_resumes_it(base, pairs_csv, tmp_path, fake, capsys):
    reward = f"judge:m?base_url={fake.base_url}&cache={tmp_path}/v.sqlite&max_requests=5"
    assert train(base, pairs_csv, tmp_path / "run", reward) == 2
    error = capsys.readouterr().err
    assert "the budget is used up: " in error and "records 5 of 5 requests. Raise max_requests" in error
    assert "Saved the run after step 1 of 3" in error and len(fake.asked) == 5
    assert re.search(r"training 1/3, reward \S+  kl \S+  \d requests, \d from the cache", error)
    assert train(base, pairs_csv, tmp_path / "run", reward.replace("=5", "=12"), "--resume") == 0
    assert 9 < len(fake.asked) <= 12
