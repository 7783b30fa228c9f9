"""The client of reward servers, against a server on loopback that answers what each test wants."""

import asyncio
import json
import logging
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from reinforcepp.config import ReinforceConfig
from reinforcepp.errors import ConfigError, RewardError, UnusableUpdate
from reinforcepp.monitoring.signals import StopRequested, stop_signals
from reinforcepp.rewards.endpoint import retry_after
from reinforcepp.rewards.remote import RemoteReward
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.types import Completion, Prompt

TEXTS = ["one", "two", "three", "four", "five"]


def completion(text, finish="stop", **columns):
    return Completion(Prompt("q: ", (1,), 0, columns), (5,), (-1.0,), text, finish)


class Fake:
    """``answers`` are given in turn, the last for good: (status, body), or None to break off in the middle."""

    def __init__(self):
        self.asked, self.headers, self.answers, self.answer_headers = [], [], [(200, None)], {}
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append(asked)
                fake.headers.append(dict(self.headers))
                answer = fake.answers.pop(0) if len(fake.answers) > 1 else fake.answers[0]
                if answer is None:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
                    return
                status, body = answer
                if body is None:
                    body = {"rewards": [len(query) - 3 for query in asked["query"]]}
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for header in fake.answer_headers.items():
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/get_reward"


@pytest.fixture
def fake():
    fake = Fake()
    threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def remote(fake, **settings):
    return RemoteReward(fake.url, **({"first_pause": 0.01} | settings))


def ask(fake, **settings):
    return remote(fake, **settings)(["q: "] * 5, TEXTS)


def test_the_request_follows_the_protocol(fake):
    rewards = load_rewards(fake.url, ReinforceConfig(reward_label_column="answer"))
    scores = rewards.score([completion("one", answer=1), completion("three", "length", other=2)])
    assert scores.total == [3, 5]
    assert fake.asked == [
        {
            "query": ["q: one", "q: three"],
            "prompts": ["q: ", "q: "],
            "labels": [1, None],
            "finish_reason": ["stop", "length"],
        }
    ]
    assert fake.headers[0]["Content-Type"] == "application/json" and "Authorization" not in fake.headers[0]
    assert rewards.names == [f"127.0.0.1-{fake.server.server_port}"] and rewards.fingerprint() == fake.url


def test_settings_reach_the_client(fake):
    settings = ReinforceConfig(reward_timeout=7, reward_attempts=2, reward_batch_size=3, reward_label_column="x")
    (client,) = load_rewards(fake.url, settings).functions
    endpoint = client.endpoint
    assert (endpoint.timeout, endpoint.attempts, client.batch_size, client.label_column) == (7, 2, 3, "x")


@pytest.mark.parametrize(("size", "sizes"), [(2, [2, 2, 1]), (5, [5]), (64, [5]), (1, [1] * 5)])
def test_completions_are_sent_in_batches_and_stay_in_order(fake, size, sizes):
    assert ask(fake, batch_size=size) == [3, 3, 5, 4, 4]
    assert [len(asked["query"]) for asked in fake.asked] == sizes
    assert [text for asked in fake.asked for text in asked["query"]] == [f"q: {text}" for text in TEXTS]


@pytest.mark.parametrize(
    "body", [{"rewards": [1, 2, None, 4, 5.5]}, {"scores": [1, 2, None, 4, 5.5]}, [1, 2, None, 4, 5.5]]
)
def test_all_response_formats_are_understood(fake, body):
    fake.answers = [(200, body)]
    assert ask(fake) == [1, 2, None, 4, 5.5]


@pytest.mark.parametrize("failure", [(500, b"x"), (503, b""), (429, b""), (408, b""), (599, b""), None])
def test_a_transient_failure_is_retried(fake, failure, caplog):
    fake.answers = [failure, failure, (200, None)]
    with caplog.at_level(logging.WARNING):
        assert ask(fake, attempts=3) == [3, 3, 5, 4, 4]
    assert len(fake.asked) == 3 and fake.asked[0] == fake.asked[2]
    assert [f"failure {i} of 3" in caplog.messages[i - 1] for i in (1, 2)] == [True, True] and len(caplog.messages) == 2


def test_the_run_stops_after_the_allowed_failures_in_a_row(fake):
    fake.answers = [(500, b"no memory\x1b[2J")]
    with pytest.raises(
        RewardError, match=r"failed 3 times in a row.*answered 500 Internal Server Error 'no memory\\x1b"
    ) as caught:
        ask(fake, attempts=3)
    assert len(fake.asked) == 3 and fake.url in str(caught.value)


def test_a_success_resets_the_failure_count(fake):
    fail = (500, b"")
    fake.answers = [fail, fail, (200, None), fail, fail, (200, None), (200, None)]
    assert ask(fake, attempts=3, batch_size=2) == [3, 3, 5, 4, 4]


def test_pauses_double_with_jitter(fake, monkeypatch):
    pauses = []

    async def sleep(seconds, *result, wait=asyncio.sleep):
        if threading.get_ident() == own:
            pauses.append(seconds)
        else:  # a server of another test
            await wait(seconds, *result)

    fake.answers = [(500, b"")]
    with ThreadPoolExecutor(1) as thread:  # without an event loop, which another test can have left in this thread
        own = thread.submit(threading.get_ident).result()
        monkeypatch.setattr("asyncio.sleep", sleep)
        with pytest.raises(RewardError):
            thread.submit(ask, fake, attempts=8, first_pause=1.0).result()
    assert len(pauses) == 7
    for i, pause in enumerate(pauses):
        assert min(2**i, 30) <= pause <= min(2**i + 1, 30)
    assert len({round(pause % 1, 6) for pause in pauses[:5]}) == 5


def test_a_missing_server_and_a_slow_one(fake):
    gone = Fake()
    gone.server.server_close()
    with pytest.raises(RewardError, match=r"failed 2 times in a row.*can't be reached"):
        ask(gone, attempts=2)
    silent = Fake()  # it accepts connections and never responds
    with pytest.raises(RewardError, match=r"failed once, and reward_attempts is 1.*no complete response within 0\.2 s"):
        ask(silent, attempts=1, timeout=0.2)
    silent.server.server_close()


def runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("within_a_loop", [False, True], ids=["program", "notebook"])
def test_a_signal_ends_the_wait_for_a_silent_server(number, within_a_loop):
    silent, began = Fake(), time.monotonic()

    async def within() -> None:
        ask(silent, attempts=5, timeout=30)

    with stop_signals() as stop, stop.anywhere(), pytest.raises(StopRequested):
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        # Another test can have left an event loop that runs in this thread. Then both cases are that of a notebook.
        asyncio.run(within()) if within_a_loop and not runs_a_loop() else ask(silent, attempts=5, timeout=30)
    assert time.monotonic() - began < 20
    silent.server.server_close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, b""), "answered 404 Not Found.*get_reward"),
        ((401, b""), "answered 401 Unauthorized.*REINFORCEPP_REWARD_TOKEN"),
        ((403, b""), "answered 403.*REINFORCEPP_REWARD_TOKEN"),
        ((400, {"error": "bad prompt"}), "answered 400 Bad Request '.*bad prompt"),
        ((302, b""), "answered 302"),
        ((200, b"<html>"), "isn't JSON: '<html>'"),
        ((200, {"reward": [1] * 5}), 'no list .rewards.: .*"reward"'),
        ((200, 3), "no list 'rewards'"),
        ((200, {"rewards": [1.0]}), "1 scores for 5 completions"),
        ((200, {"rewards": [1.0] * 6}), "6 scores for 5 completions"),
    ],
)
def test_a_permanent_failure_stops_at_once(fake, answer, message):
    fake.answers = [answer]
    with pytest.raises(RewardError, match=message):
        ask(fake)
    assert len(fake.asked) == 1


def test_a_score_that_is_not_a_number_raises(fake):
    fake.answers = [(200, b'{"rewards": [NaN]}')]
    with pytest.raises(UnusableUpdate, match="returned nan"):
        load_rewards(fake.url).score([completion("a")])
    for body, reason in (
        (b'{"rewards": ["0.5"]}', "a str as score 0"),
        (b'{"rewards": [[1]]}', "a list as score 0"),
        (b'{"rewards": [1%s]}' % (b"0" * 400), "an integer that is too large"),
    ):
        fake.answers = [(200, body)]
        with pytest.raises(RewardError, match=reason):
            load_rewards(fake.url).score([completion("a")])


def test_labels_that_json_lacks_are_sent_as_text(fake):
    import datetime

    load_rewards(fake.url).score([completion("a", label=datetime.date(2026, 1, 2))])
    assert fake.asked[0]["labels"] == ["2026-01-02"]


def test_the_token_is_sent_and_never_logged(fake, monkeypatch, caplog):
    monkeypatch.setenv("REINFORCEPP_REWARD_TOKEN", "hush-123")
    fake.answers = [(500, b""), (401, b"")]
    with caplog.at_level(logging.DEBUG), pytest.raises(RewardError) as caught:
        ask(fake)
    assert [headers["Authorization"] for headers in fake.headers] == ["Bearer hush-123"] * 2
    assert "hush" not in f"{caught.value}{caplog.text}{remote(fake).name}"


@pytest.mark.parametrize("token", ["hush\n", "hu sh", "hüsh"])
def test_an_invalid_token_raises_without_showing_it(fake, monkeypatch, token):
    monkeypatch.setenv("REINFORCEPP_REWARD_TOKEN", token)
    with pytest.raises(ConfigError, match="REINFORCEPP_REWARD_TOKEN: the token has invalid characters") as caught:
        remote(fake)
    assert token not in str(caught.value)


def test_variables_of_the_chat_template_are_sent_if_rows_have_them(fake):
    plain = completion("a")
    quiet = replace(plain, prompt=replace(plain.prompt, chat_template_kwargs={"quiet": True}))
    load_rewards(fake.url, ReinforceConfig()).score([plain])
    load_rewards(fake.url, ReinforceConfig()).score([plain, quiet])
    assert [asked.get("chat_template_kwargs") for asked in fake.asked] == [None, [{}, {"quiet": True}]]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7), ("0.5", 0.5), ("-3", 0), ("nan", 0), ("soon", 0), ("", 0), ("Fri, 31 Dec 1999 23:59:59 GMT", 0)],
)
def test_retry_after_is_a_number_or_a_date(header, seconds):
    assert retry_after(header) == seconds
    assert 58 < retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60


def test_the_pause_is_at_least_as_long_as_the_server_asks_for(fake):
    fake.answers, fake.answer_headers = [(429, b"later"), (200, None)], {"Retry-After": "0.3"}
    began = time.monotonic()
    assert ask(fake) == [3, 3, 5, 4, 4] and time.monotonic() - began >= 0.3
    fake.answers, fake.answer_headers = [(429, b"later")], {"Retry-After": "86400"}
    with pytest.raises(RewardError, match=r"answered 429 .*and asks for a pause of 86400 s"):
        ask(fake)
    fake.answers, fake.answer_headers = [(429, {"error": {"code": "insufficient_quota"}})], {}
    with pytest.raises(RewardError, match=r"answered 429 .*insufficient_quota"):
        ask(fake)
    assert len(fake.asked) == 4
