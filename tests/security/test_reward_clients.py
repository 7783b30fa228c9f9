"""Reward servers that attack the training: slow, huge, compressed or malformed responses, and a proxy between them."""

import gzip
import json
import socket
import threading
import time
import tracemalloc
import zlib
from contextlib import contextmanager, suppress

import pytest

from reinforcepp.errors import RewardError
from reinforcepp.rewards.remote import RemoteReward

MIB = 2**20


@contextmanager
def answering(*parts, pause=0.0):
    """A server that answers each request with the parts, sent one after another; gives its address and the requests."""
    requests = []
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection):
        with connection, suppress(OSError):
            request = connection.recv(65536)
            while not request.endswith(b"}"):
                request += connection.recv(65536)
            requests.append(request)
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)

    def accept():
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/get_reward", requests
    finally:
        listener.close()


def response(body, *headers):
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def ask(url, **settings):
    """Return what the client did: the scores or the exception."""
    try:
        return RemoteReward(url, **({"attempts": 1, "timeout": 20} | settings))(["q"], ["a"])
    except Exception as error:
        return error


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.attack("M3", "a response at one byte per 0.2 s, with a timeout of 0.5 s")
@pytest.mark.parametrize("slow", ["headers", "body"])
def test_the_timeout_covers_the_whole_response(outcome, slow):
    whole = response(b'{"rewards": [1]}')
    start = whole.index(b"{") if slow == "body" else 1
    drops = [whole[i : i + 1] for i in range(start, start + 15)]
    with answering(whole[:start], *drops, whole[start + 15 :], pause=0.2) as (url, _):
        began = time.monotonic()
        result = ask(url, timeout=0.5)
        seconds = time.monotonic() - began
    outcome(f"{seconds:.1f} s, {type(result).__name__}")
    assert isinstance(result, RewardError) and "within 0.5 s" in str(result) and seconds < 2


@pytest.mark.attack("M3", "a response of 64 MiB, as it is or compressed")
@pytest.mark.parametrize("encoding", ["identity", "gzip", "deflate, gzip"])
def test_the_size_of_a_response_is_limited(outcome, encoding):
    body = b'{"rewards": [1]}'.ljust(64 * MIB)
    if "deflate" in encoding:
        body = zlib.compress(body, 1)
    if "gzip" in encoding:
        body = gzip.compress(body, 1)
    with answering(response(body, f"Content-Encoding: {encoding}")) as (url, requests):
        tracemalloc.start()
        result = ask(url)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    outcome(f"{peak / MIB:.0f} MiB for {len(body) / MIB:.1f} MiB, {type(result).__name__}")
    assert isinstance(result, RewardError) and peak < 8 * MIB
    assert b"accept-encoding: identity" in requests[0].lower()


@pytest.mark.attack("M3", "a response without end")
def test_a_response_without_end_is_refused(outcome):
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[chunk] * 1024) as (url, _):
        tracemalloc.start()
        result = ask(url)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    outcome(f"{peak / MIB:.0f} MiB, {type(result).__name__}")
    assert isinstance(result, RewardError) and "the reward server's response is over 1.0 MiB" in str(result)


@pytest.mark.attack("M3", "a malformed response")
@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"rewards": [1%s]}' % (b"0" * 400), b'{"rewards": ["1"]}', b'{"rewards": [{}]}'],
    ids=["nested 100,000 deep", "integer of 400 digits", "number as text", "object"],
)
def test_a_malformed_response_is_an_error_of_the_server(outcome, body):
    with answering(response(body)) as (url, _):
        result = ask(url)
    try:
        float(result[0])
        outcome(f"accepted {result[0]!r:.20}")
    except Exception as error:
        outcome(type(result if isinstance(result, Exception) else error).__name__)
    assert isinstance(result, RewardError) and url in str(result)


@pytest.mark.attack("M3", "a proxy in the environment, and a server on loopback with a token")
def test_a_proxy_gets_no_token_of_a_server_on_loopback(outcome, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("REINFORCEPP_REWARD_TOKEN", "hush")
    body = response(json.dumps({"rewards": [1]}).encode())
    with answering(body) as (url, requests), answering(body) as (proxy, seen):
        monkeypatch.setenv("HTTP_PROXY", proxy.removesuffix("/get_reward"))
        result = ask(url)
    outcome("the proxy received the token" if b"hush" in b"".join(seen) else "the proxy received nothing")
    assert result == [1] and not seen and b"Bearer hush" in requests[0]
