"""A hostile or broken vLLM server against the trainer's client."""

from __future__ import annotations

import gzip
import json
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from rollout.contract import prepared_tokenizer, prompts_of

from reinforcepp.rollout.vllm.client import ServerInfo, ServerRequirements, Timeouts, VllmClient
from reinforcepp.types import Sampling

REQUIREMENTS = ServerRequirements("model", 64, 40, frozenset({0}))
INFO = ServerInfo("served", "0.32.0", 64, torch.float32, "processed_logprobs", "", "")
TIMEOUTS = Timeouts(connect=1, health_interval=0.1, health=0.3, progress=0.6)
MIB = 1 << 20


class Attacker(ThreadingHTTPServer):
    """A server; ``answers`` maps paths to functions that write a response to a handler."""

    def __init__(self) -> None:
        self.answers, self.stopped = {"/health": reply(b"")}, threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.client = VllmClient(f"http://127.0.0.1:{self.server_port}", None, REQUIREMENTS, TIMEOUTS)
        self.client.info = INFO

    def handle_error(self, *_) -> None:
        """Ignore clients that disconnect early."""

    def outcome_of(self, work) -> str:
        """Return the type of the exception that ``work`` raises, or that it still runs after 6 seconds."""
        found = []

        def run() -> None:
            try:
                found.append(f"accepted {work()!r}"[:60])
            except BaseException as error:
                found.append(type(error).__name__)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(6)
        return found[0] if found else "still waiting after 6 s"


class Handler(BaseHTTPRequestHandler):
    server: Attacker

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.answers[self.path](self)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass


def reply(body: bytes, *headers: tuple[str, str], status: int = 200):
    def write(handler: Handler) -> None:
        handler.send_response(status)
        for header in (*headers, ("Content-Length", str(len(body)))):
            handler.send_header(*header)
        handler.end_headers()
        handler.wfile.write(body)

    return write


@pytest.fixture
def attacker():
    server = Attacker()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()


def tokens(ids, reason=None) -> bytes:
    choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-1.0] * len(ids)}, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def generate(attacker):
    tokenizer = prepared_tokenizer()
    (completion,) = attacker.client.generate(
        tokenizer, prompts_of(tokenizer)[:1], Sampling(4), max_concurrent=1, version="v"
    )[0]
    return completion.ids


@pytest.mark.attack("M3", "a vLLM server answers with 32 MiB as 32 KiB of gzip")
def test_a_compressed_response_is_refused(attacker, outcome):
    attacker.answers["/version"] = reply(gzip.compress(bytes(32 * MIB)), ("Content-Encoding", "gzip"))
    tracemalloc.start()
    result = attacker.outcome_of(lambda: attacker.client.get("/version"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    outcome(f"{result}, {peak / MIB:.0f} MiB of memory")
    assert result == "IncompatibleServer" and peak < 8 * MIB


@pytest.mark.attack("M3", "a vLLM server sends a response without end")
def test_an_endless_response_is_cut_off(attacker, outcome):
    sent = []

    def endless(handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while len(sent) < 256 and not attacker.stopped.is_set():
            handler.wfile.write(bytes(MIB))
            sent.append(1)

    attacker.answers["/version"] = endless
    result = attacker.outcome_of(lambda: attacker.client.get("/version"))
    outcome(f"{result} after {len(sent)} MiB")
    assert result in ("IncompatibleServer", "ServerUnavailable") and len(sent) < 64


@pytest.mark.attack("M3", "a vLLM server drips its health response, so that a hung request is never noticed")
def test_a_dripping_health_response_counts_as_failed(attacker, outcome):
    def drip(handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not attacker.stopped.wait(0.1):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    attacker.answers |= {"/health": drip, "/version": lambda handler: attacker.stopped.wait()}
    result = attacker.outcome_of(lambda: attacker.client.get("/version"))
    outcome(result)
    assert result == "ServerUnavailable"


@pytest.mark.attack("M3", "a vLLM server sends 10,000 tokens for a completion of 4")
def test_more_tokens_than_requested_are_refused(attacker, outcome):
    attacker.answers["/v1/completions"] = reply(tokens([5] * 16) * 625 + tokens([0], "stop"))
    attacker.answers["/weight_info"] = reply(b'{"weight_version": "v"}')
    result = attacker.outcome_of(lambda: f"{len(generate(attacker))} tokens")
    outcome(result)
    assert result == "ServerUnavailable"


@pytest.mark.attack("M3", "a vLLM server keeps a completion alive with events without tokens")
def test_events_without_tokens_are_no_progress(attacker, outcome):
    def empty_events(handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not attacker.stopped.wait(0.1):
            handler.wfile.write(tokens([]))
            handler.wfile.flush()

    attacker.answers["/v1/completions"] = empty_events
    result = attacker.outcome_of(lambda: generate(attacker))
    outcome(result)
    assert result == "ServerUnavailable"


@pytest.mark.attack(
    "M3", "a vLLM server sends a token that isn't in the vocabulary, or a log-probability that is no number"
)
@pytest.mark.parametrize("ids", [[-1], [40], [10**30], ["5"], [1.5], [True]], ids=str)
def test_a_token_out_of_range_is_refused(attacker, outcome, ids):
    attacker.answers["/v1/completions"] = reply(tokens(ids) + tokens([0], "stop"))
    attacker.answers["/weight_info"] = reply(b'{"weight_version": "v"}')
    result = attacker.outcome_of(lambda: generate(attacker))
    outcome(result)
    assert result == "ServerUnavailable"


@pytest.mark.attack("M3", "a vLLM server sends 100,000 nested lists")
def test_nested_json_is_an_error_with_a_message(attacker, outcome):
    attacker.answers["/version"] = reply(b"[" * 100_000)
    result = attacker.outcome_of(lambda: attacker.client.get("/version"))
    outcome(result)
    assert result == "IncompatibleServer"


@pytest.mark.attack("M1", "a vLLM server's error holds escape sequences for the terminal")
@pytest.mark.parametrize("status", [400, 500])
def test_escape_sequences_of_a_server_are_not_in_the_message(attacker, outcome, status):
    attacker.answers["/version"] = reply(b"\x1b]0;owned\x07\x1b[2J", status=status)
    with pytest.raises(Exception) as caught:
        attacker.client.get("/version")
    outcome("escape sequence in the message" if "\x1b" in str(caught.value) else "escaped in the message")
    assert "\x1b" not in str(caught.value)


@pytest.mark.attack("M1", "a vLLM server's error inside a stream holds escape sequences for the terminal")
def test_escape_sequences_of_a_stream_are_not_in_the_message(attacker, outcome):
    attacker.answers["/v1/completions"] = reply(b'data: {"error": "\\u001b[2J"}\n\n')
    with pytest.raises(Exception) as caught:
        generate(attacker)
    outcome("escape sequence in the message" if "\x1b" in str(caught.value) else "escaped in the message")
    assert "\x1b" not in str(caught.value)
