"""The serve-reward command on loopback: responses, errors, and a training whose server is killed."""

import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest
import tiny
from warm import warm_python

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.commands import cli, reward_server
from reinforcepp.commands.reward_server import BadRequest, RewardServer, score_request
from reinforcepp.errors import ModelError, RewardError
from reinforcepp.models.conversations import format_completion, format_prompt
from reinforcepp.models.loading import load_tokenizer
from reinforcepp.models.tokenization import encode_example
from reinforcepp.monitoring import read_metrics
from reinforcepp.rewards.remote import RemoteReward
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.rewards.trained import load_reward_model
from reinforcepp.types import Completion, Prompt
from scripts import SOURCE

PROMPTS, ANSWERS = ["Is the gateway up?", "What is my address?"], [" Ping it.", " ip addr tells it."]
QUERIES = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def reward(reward_folder):
    return load_reward_model(str(reward_folder))


@contextmanager
def serving(reward, port=0):
    server = RewardServer("127.0.0.1", port, "rm")
    server.reward = reward
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def asked(server, method="POST", path="/get_reward", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, body=data, headers=headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


# --- responses --------------------------------------------------------------------------------------------------------


def test_a_served_model_scores_as_the_same_model_at_home(reward, reward_folder):
    completions = [
        Completion(Prompt(prompt, (1,), i), (5,), (-1.0,), answer, finish)
        for finish in ("stop", "length")
        for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
    ]
    with serving(reward) as server:
        away = load_rewards(f"http://127.0.0.1:{server.port}/get_reward").score(completions).total
    home = load_rewards(str(reward_folder)).score(completions).total
    assert away == pytest.approx(home, abs=1e-6) and len(set(home)) == 4


def test_health_and_both_names_of_scores(reward):
    with serving(reward) as server:
        assert asked(server, "GET", "/health") == (200, {"status": "ok", "model": "rm"})
        status, said = asked(server, body={"query": QUERIES, "prompts": PROMPTS})
    assert status == 200 and said["rewards"] == said["scores"] == score_request(
        reward, {"query": QUERIES, "prompts": PROMPTS}
    )


def test_without_prompts_a_query_is_taken_as_framed(reward):
    tokenizer = reward.tokenizer
    framed = [
        format_prompt(tokenizer, p) + format_completion(tokenizer, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    rows = [encode_example(tokenizer, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    expected = pytest.approx(reward.score_rows(rows), abs=0.05)  # prompt and answer are tokenised together here
    assert score_request(reward, {"query": framed}) == expected
    assert score_request(reward, {"query": [text + tokenizer.eos_token for text in framed]}) == expected
    assert score_request(reward, {"query": []}) == []


def test_normalised_scores_are_served_normalised(reward_folder):
    raw, normal = load_reward_model(str(reward_folder)), load_reward_model(str(reward_folder))
    normal.normalize()
    for request in ({"query": QUERIES, "prompts": PROMPTS}, {"query": QUERIES}):
        expected = [(s - raw.card.score_mean) / raw.card.score_std for s in score_request(raw, request)]
        assert score_request(normal, request) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([], "'query' is missing"),
        ({"queries": []}, "'query' is missing"),
        ({"query": "x"}, "'query' isn't a list of texts"),
        ({"query": ["x", 3]}, "'query' isn't a list of texts"),
        ({"query": ["x"], "prompts": ["x"], "chat_template_kwargs": [1]}, "isn't a list of 1 objects"),
        ({"query": ["xy"], "prompts": ["y"]}, "query 0: it doesn't begin with prompt 0"),
        ({"query": ["xy"], "prompts": []}, "'prompts' has 0 texts for 1 queries"),
        ({"query": ["xy"], "prompts": ["x"], "finish_reason": ["stop"] * 2}, "'finish_reason' has 2"),
    ],
)
def test_an_invalid_request_is_an_error_with_its_reason(reward, request_, message):
    with pytest.raises(BadRequest, match=message) as caught:
        score_request(reward, request_)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ({"body": b"{"}, 400, "isn't valid JSON"),
        ({"body": b"\xff"}, 400, "isn't valid JSON"),
        ({"body": {"query": 3}}, 400, "list of texts"),
        ({"path": "/score", "body": {}}, 404, "POST /get_reward"),
        ({"method": "GET", "path": "/"}, 404, "GET /health"),
        ({"body": b"", "Content-Length": "999999999"}, 413, "over 64 MiB"),
        ({"body": b"", "Content-Length": "-1"}, 400, "isn't valid HTTP"),
        ({"body": b"{}", "Content-Type": "text/plain"}, 415, "application/json"),
        ({"body": {"query": ["x"] * 4097}}, 413, "more than 4096"),
    ],
)
def test_refusals_over_http(reward, given, status, message):
    with serving(reward) as server:
        code, reply = asked(server, **given)
        assert code == status and message in reply["error"]
        assert asked(server, body={"query": []})[0] == 200, "the server must continue"


def test_a_connection_stays_open_after_a_refused_request(reward):
    with serving(reward) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        for path, status in (("/get_reward", 200), ("/score", 404), ("/get_reward", 200)):
            connection.request("POST", path, body=b'{"query": []}', headers={"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == status and response.read()
        connection.close()


def test_requests_without_the_token_are_refused(reward, monkeypatch):
    monkeypatch.setenv("REINFORCEPP_REWARD_TOKEN", "hush")
    body = {"query": QUERIES}
    with serving(reward) as server:
        for headers in ({}, {"Authorization": "Bearer hus"}, {"Authorization": "hush"}):
            status, reply = asked(server, body=body, **headers)
            assert status == 401 and reply.keys() == {"error"}
            assert "token is missing or wrong" in reply["error"] and "hush" not in reply["error"]
        assert asked(server, body=body, Authorization="Bearer hush")[0] == 200
        assert asked(server, "GET", "/health")[0] == 200


def test_concurrent_requests_all_get_scores(reward):
    results = []
    with serving(reward) as server:
        request = {"query": QUERIES, "prompts": PROMPTS}
        threads = [threading.Thread(target=lambda: results.append(asked(server, body=request))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 8 and all(result == results[0] for result in results) and results[0][0] == 200


class Slow:
    """A reward that scores when it is let, and counts."""

    def __init__(self):
        self.entered, self.free, self.calls = threading.Event(), threading.Event(), []

    def __call__(self, prompts, completions, **columns):
        self.calls.append(completions)
        self.entered.set()
        assert self.free.wait(10)
        return [math.nan] * len(prompts)


def test_health_is_answered_while_a_request_is_scored(reward):
    slow, results = Slow(), []
    with serving(slow) as server:
        thread = threading.Thread(
            target=lambda: results.append(asked(server, body={"query": QUERIES, "prompts": PROMPTS}))
        )
        thread.start()
        assert slow.entered.wait(5) and asked(server, "GET", "/health")[0] == 200
        slow.free.set()
        thread.join()
    assert results[0][0] == 200 and all(map(math.isnan, results[0][1]["rewards"]))


def test_a_request_whose_client_has_left_is_not_scored(reward):
    slow = Slow()
    with serving(slow) as server:
        first, second = (http.client.HTTPConnection("127.0.0.1", server.port, timeout=10) for _ in range(2))
        for connection, answer in ((first, "a"), (second, "b")):
            body = json.dumps({"query": [answer], "prompts": [""]})
            connection.request("POST", "/get_reward", body, {"Content-Type": "application/json"})
            assert slow.entered.wait(5)
        second.close()
        time.sleep(0.1)
        slow.free.set()
        assert first.getresponse().status == 200 and asked(server, body={"query": []})[0] == 200
    assert slow.calls == [["a"]]


@pytest.mark.parametrize(("name", "status"), [("MAX_REQUEST_BYTES", 413), ("MAX_BUFFERED_BYTES", 503)])
def test_the_bytes_that_arrive_are_limited(reward, monkeypatch, name, status):
    monkeypatch.setattr(reward_server, name, 1000)
    with serving(reward) as server:
        for _ in range(3):
            chunks = iter([b'{"query": []', b" " * 2000, b"}"])
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            connection.request("POST", "/", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
            assert connection.getresponse().status == status
        assert asked(server, body={"query": []})[0] == 200 and server._buffered == 0


def test_the_token_is_checked_before_the_body_arrives(reward, monkeypatch):
    monkeypatch.setenv("REINFORCEPP_REWARD_TOKEN", "hush")
    with serving(reward) as server, socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: rewards.example\r\nContent-Length: 9999999\r\n\r\n{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")


def test_a_reward_that_fails_is_reported_and_logged(caplog):
    def broken(prompts, completions, **columns):
        raise IndexError("no such token")

    def rejects(prompts, completions, **columns):
        raise ModelError("the roles don't alternate")

    for reward, status, message in ((broken, 500, "Read its log"), (rejects, 400, "don't alternate")):
        with serving(reward) as server:
            code, reply = asked(server, body={"query": [""], "prompts": [""]})
            assert code == status and message in reply["error"]
    assert caplog.text.count("IndexError: no such token") == 1


def test_an_ipv6_address(reward):
    server = RewardServer("::1", 0, "rm")
    server.reward = reward
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    url = f"http://[::1]:{server.port}/get_reward"
    assert RemoteReward(url)(PROMPTS, ANSWERS) == pytest.approx(reward(PROMPTS, ANSWERS))
    server.stop()
    thread.join()


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_port_in_use_and_a_foreign_host_are_errors_before_the_model_loads(reward_folder, monkeypatch, capsys):
    monkeypatch.setattr(
        "reinforcepp.commands.reward_server.load_reward_model", lambda name: pytest.fail("it was loaded")
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve-reward", str(reward_folder), "--port", str(port)]) == 2
        assert re.fullmatch(
            rf"error: 127\.0\.0\.1 port {port}: can't listen .*--port, or 0.*\n",
            capsys.readouterr().err,
        )
    assert cli.main(["serve-reward", str(reward_folder), "--host", "192.0.2.1", "--port", "0"]) == 2
    assert "another --host" in capsys.readouterr().err
    assert cli.main(["serve-reward", "nowhere"]) == 2
    assert "nowhere: reward model folder not found" in capsys.readouterr().err
    assert cli.main(["serve-reward", "--port", "70000"]) == 2
    assert "port must be at least 0 and at most 65535, not 70000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "token", "warned"), [("127.0.0.1", "", False), ("0.0.0.0", "", True), ("0.0.0.0", "hush", False)]
)
def test_settings_reach_the_server_and_an_open_address_is_warned_of(
    reward_folder, monkeypatch, capsys, host, token, warned
):
    served = []
    monkeypatch.setenv("REINFORCEPP_REWARD_TOKEN", token)
    monkeypatch.setattr(RewardServer, "run", lambda server: served.append(server.reward))
    flags = ["--host", host, "--port", "0", "--batch_size", "3", "--reward_normalize"]
    assert cli.main(["serve-reward", str(reward_folder), *flags]) == 0
    err = capsys.readouterr().err
    assert ("can use the server" in err) == warned and "hush" not in err
    (reward,) = served
    assert reward.limit.rows == 3 and reward.scaled([reward.card.score_mean]) == [0]


@contextmanager
def started(reward_folder):
    """``reinforcepp serve-reward`` as a process; gives it and its address."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [warm_python(), "-m", "reinforcepp", "serve-reward", str(reward_folder), "--port", "0"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        printed = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/get_reward", printed)):
            line = process.stderr.readline()
            assert line, f"it ended: {printed}"
            printed += line
        yield process, found[0]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def training(model_folder, folder, rewards, **settings):
    args = ReinforceConfig(
        output_dir=str(folder),
        max_new_tokens=6,
        max_prompt_length=40,
        batch_size=4,
        max_steps=4,
        rollout="transformers",
        learning_rate=1e-3,
        reward_attempts=2,
        **settings,
    )
    trainer = ReinforceTrainer(str(model_folder), rewards, args, [{"prompt": f"Why is host {i} up?"} for i in range(9)])
    trainer.rewards.functions[0].endpoint.first_pause = 0.01
    return trainer


def without_times(folder):
    return [{k: v for k, v in m.items() if not k.startswith(("time/", "step_time"))} for m in read_metrics(folder)]


def test_a_training_whose_server_is_killed_stops_and_goes_on_when_it_is_back(
    model_folder, reward_folder, reward, tmp_path
):
    calls = []

    def nothing(prompts, completions):
        calls.append(1)
        if len(calls) == 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
        return [0.0] * len(prompts)

    with started(reward_folder) as (process, url):
        run = training(model_folder, tmp_path / "run", [url, nothing])
        with pytest.raises(RewardError, match=r"the reward server failed 2 times in a row.*can't be reached") as stop:
            run.train()
    assert "Saved the run after step 2 of 4" in str(stop.value)
    assert len(read_metrics(tmp_path / "run")) == 2, "no step may be made without scores"
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
    port = int(url.rpartition(":")[2].partition("/")[0])
    with serving(reward, port):
        training(model_folder, tmp_path / "run", [url, nothing], resume=True).train()
        training(model_folder, tmp_path / "whole", [url, nothing]).train()
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    assert f"rewards/127.0.0.1-{port}/mean" in read_metrics(tmp_path / "run")[0]


def test_a_server_that_comes_back_in_time_costs_nothing(model_folder, reward, tmp_path):
    with serving(reward) as server:
        port = server.port
        whole = tiny.train(training(model_folder, tmp_path / "whole", f"http://127.0.0.1:{port}/get_reward"))
    run = training(model_folder, tmp_path / "run", f"http://127.0.0.1:{port}/get_reward")
    (client,) = run.rewards.functions
    back, failures = [], []

    def comes_back(state):
        failures.append(state)
        back.append(serving(reward, port))
        back[-1].__enter__()

    client.endpoint._log_retry = comes_back
    try:
        assert [m["reward"] for m in tiny.train(run)] == [m["reward"] for m in whole]
    finally:
        back[0].__exit__(None, None, None)
    assert len(failures) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_cleanly(reward_folder, number):
    with started(reward_folder) as (process, url):
        connection = http.client.HTTPConnection(url.split("/")[2], timeout=10)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read())["model"] == reward_folder.name
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
        rest = process.stderr.read()
    assert rest.endswith("Stopped.\n") and "Traceback" not in rest


# --- another tokenizer ------------------------------------------------------------------------------------------------


def test_a_reward_model_may_have_another_tokenizer_than_the_policy(tmp_path, reward_folder):
    """The policy's ids mean nothing to it: it is given the text, and makes ids of its own."""
    folder = tiny.save(tmp_path / "policy", "llama", vocab_size=290)
    own, others = load_tokenizer(str(folder)), load_tokenizer(str(reward_folder))
    assert own("restart the server")["input_ids"] != others("restart the server")["input_ids"]
    assert len(own) != len(others)
    run = ReinforceTrainer(
        str(folder),
        str(reward_folder),
        ReinforceConfig(
            str(tmp_path / "run"), max_new_tokens=8, max_prompt_length=60, max_steps=1, rollout="transformers"
        ),
        [{"prompt": prompt} for prompt in PROMPTS],
    )
    seen = []
    score_rows = run.rewards.trained[0].score_rows
    run.rewards.trained[0].score_rows = lambda rows: seen.extend(rows) or score_rows(rows)
    completions = run.engine.generate(run.prompts, run.rollouts.sampling(0))
    scores = run.rewards.score(completions)
    rows = [encode_example(others, c.prompt.text, c.text, finished=c.finish_reason == "stop") for c in completions]
    assert seen == rows and all(max(row) < len(others) for row in rows)
    assert scores.total == pytest.approx(load_reward_model(str(reward_folder)).score_rows(rows), abs=1e-6)
    mean = tiny.train(run)[0]["rewards/reward_model/mean"]
    assert mean == pytest.approx(sum(scores.total) / len(scores.total), abs=1e-5)
