"""Clients and web pages that attack `reinforcepp serve-reward`."""

import http.client
import json
import logging
import socket
import threading
import time

import pytest

from reinforcepp.commands.reward_server import serve
from reinforcepp.config import ServeRewardConfig

HEAD = b"POST /get_reward HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def port(reward_folder):
    """The port of a server that runs until the tests end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = ServeRewardConfig(model=str(reward_folder), port=port)
    threading.Thread(target=serve, args=(config,), daemon=True).start()
    for _ in range(600):
        try:
            assert request(port, "/health", method="GET")[0] == 200
            return port
        except OSError:
            time.sleep(0.1)
    pytest.fail("it doesn't answer")


def request(port, path="/get_reward", body=b'{"query": []}', method="POST", timeout=10, **headers):
    """Return the status and the body of the response; 0 if the connection was closed without one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {name: value for name, value in sent.items() if value is not None}
    connection.request(method, path, body=body if method == "POST" else None, headers=sent)
    try:
        response = connection.getresponse()
    except (http.client.RemoteDisconnected, TimeoutError):
        return 0, b""
    return response.status, response.read()


def raw(port, data, timeout=2.0):
    """Return everything that the server answers to ``data`` within a time."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(data)
        try:
            while chunk := connection.recv(65536):
                received += chunk
        except OSError:
            pass
    return received


@pytest.mark.attack("M4", "200 refused requests with control characters")
def test_refusals_are_logged_in_few_clean_lines(outcome, port, caplog):
    with caplog.at_level(logging.DEBUG):
        for _ in range(100):
            request(port, "/\\x1b[2J%1b%0afake%9b")
            raw(port, b"\x1b[2J\r\n\r\n")
    of_servers = [record for record in caplog.records if record.name.startswith(("reinforcepp", "uvicorn"))]
    lines = [line for record in of_servers for line in record.getMessage().splitlines()]
    clean = all(line.isprintable() for line in lines)
    outcome(f"{len(lines)} lines in the log, {'without' if clean else 'with'} control characters")
    assert 0 < len(lines) <= 20 and clean  # at most 10 per minute


@pytest.mark.attack("M4", "300 half requests")
@pytest.mark.parametrize(
    "half", [b"POST /get_reward HTTP/1.1\r\n", HEAD + b"Content-Length: 9\r\n\r\n{"], ids=["headers", "body"]
)
def test_half_requests_hold_no_threads(outcome, port, half):
    before, held = threading.active_count(), []
    try:
        for _ in range(300):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=10))
            held[-1].sendall(half)
        began = time.monotonic()
        status, _ = request(port)
        seconds, threads = time.monotonic() - began, threading.active_count() - before
    finally:
        for connection in held:
            connection.close()
    outcome(f"{threads} threads; another client got {status} within {max(1, round(seconds))} s")
    assert threads < 8 and status == 200 and seconds < 5


@pytest.mark.attack("M4", "a body nested 100,000 deep")
@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"messages": ' + b"[" * 100_000], ids=["list", "messages"])
def test_nested_json_is_refused_with_a_reason(outcome, port, body):
    status, reply = request(port, body=body)
    outcome(f"HTTP {status}" if status else "no response")
    assert status == 400 and b"isn't valid JSON" in reply


@pytest.mark.attack("M4", "a Content-Length of 5000 digits")
def test_a_giant_length_is_refused_with_a_reason(outcome, port):
    answer = raw(port, HEAD + b"Connection: close\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n{}")
    outcome(answer.partition(b"\r\n")[0].decode() or "no response")
    assert answer.startswith(b"HTTP/1.1 400") and b'{"error": ' in answer


@pytest.mark.attack("M4", "a request of a web page")
@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Type": "text/plain"},
        {"Content_Type": "text/plain; application/json"},
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"Content_Type": None},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example:5000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost.evil.example"},
    ],
    ids=lambda headers: ": ".join(map(str, *headers.items())),
)
def test_web_pages_are_refused(outcome, port, headers):
    status, _ = request(port, **headers)
    outcome(f"HTTP {status}")
    assert status in (403, 415)


@pytest.mark.attack("M4", "GET /health, for the folders of this computer")
def test_health_shows_no_folders(outcome, port, reward_folder):
    status, reply = request(port, "/health", method="GET")
    shown = json.loads(reply)["model"]
    outcome("the full path" if "/" in shown else "the model's name")
    assert status == 200 and shown == reward_folder.name


@pytest.mark.attack("M4", "a request hidden in the body of another")
def test_a_body_is_not_read_as_the_next_request(outcome, port):
    hidden = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(hidden)
    answers = raw(port, head + hidden, timeout=0.3).count(b"HTTP/1.1 ")
    outcome(f"{answers} responses to 1 request")
    assert answers == 1


@pytest.mark.attack("M4", "a chat template of the client")
@pytest.mark.parametrize(
    "variables", [{"chat_template": "{{ messages|map(attribute='content')|join }}"}, {"tokenize": True}]
)
def test_a_client_does_not_replace_the_chat_template(outcome, port, variables):
    body = {"query": ["ab"], "prompts": ["a"], "chat_template_kwargs": [variables]}
    status, reply = request(port, body=json.dumps(body).encode())
    outcome(f"HTTP {status}: {reply.decode()[:40]}" if status else "no response")
    assert status == 400 and b"isn't a variable of the chat template" in reply


@pytest.mark.attack("M4", "100,000 queries in one request")
def test_the_queries_of_a_request_are_limited(outcome, port):
    status, _ = request(port, body=json.dumps({"query": [""] * 100_000}).encode(), timeout=2)
    outcome(f"HTTP {status}" if status else "no response within 2 s")
    assert status == 413
