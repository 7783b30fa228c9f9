"""The limits of the HTTP server, with an application that answers when a test lets it."""

import asyncio
import http.client
import logging
import os
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from reinforcepp.commands import http_server
from reinforcepp.commands.http_server import Refusals, Server

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


class App:
    """Answers ``/`` when ``free`` is set, after reading the body, and any other path at once with status 400."""

    def __init__(self):
        self.free, self.entered = threading.Event(), threading.Event()
        self.free.set()

    async def __call__(self, scope, receive, send):
        status = 200 if scope["path"] == "/" else 400
        while status == 200 and (await receive()).get("more_body"):
            pass
        self.entered.set()
        while status == 200 and not self.free.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def serving(app, listener=None):
    listener = listener or socket.create_server(("127.0.0.1", 0))
    server = Server(app, listener)
    thread = threading.Thread(target=server.run_until_signal, daemon=True)
    thread.start()
    try:
        yield server, listener.getsockname()
    finally:
        app.free.set()
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


def connect(address, data=b""):
    connection = socket.create_connection(address, timeout=5)
    connection.sendall(data)
    return connection


def status(connection):
    """Return the status of the next response; None if the server closed the connection."""
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
        response.read()
    except ConnectionError:
        return None
    return response.status


@pytest.mark.parametrize("half", [b"", REQUEST[:-2], POST + b"Content-Length: 99\r\n\r\n{"])
def test_a_request_that_does_not_arrive_in_time_loses_its_connection(monkeypatch, caplog, half):
    monkeypatch.setattr(http_server, "REQUEST_TIMEOUT_SECONDS", 0.3)
    with serving(App()) as (_, address), connect(address, half) as slow:
        began = time.monotonic()
        threading.Timer(0.2, slow.send, (b"x" * bool(half),)).start()  # does not extend the time
        assert status(slow) is None and 0.2 < time.monotonic() - began < 2
        assert "no complete request arrived within 0.3 s" in caplog.text
        with connect(address, REQUEST) as other:
            assert status(other) == 200


def test_the_body_of_a_response_does_not_wait_for_an_acknowledgment():
    with serving(App()) as (server, address), connect(address, REQUEST) as client:
        assert status(client) == 200
        (connection,) = server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_request_in_progress_has_no_time_limit(monkeypatch):
    monkeypatch.setattr(http_server, "REQUEST_TIMEOUT_SECONDS", 0.1)
    app = App()
    app.free.clear()
    with serving(app) as (_, address), connect(address, REQUEST) as client:
        time.sleep(0.3)
        app.free.set()
        assert status(client) == 200


def test_new_connections_replace_the_oldest_without_a_request(monkeypatch, caplog):
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 3)
    app = App()
    app.free.clear()
    with serving(app) as (_, address), connect(address, REQUEST) as busy:
        assert app.entered.wait(5)
        halves = [connect(address, POST), connect(address, POST + b"Content-Length: 9\r\n\r\n{")]
        time.sleep(0.05)
        late = connect(address, REQUEST)
        assert status(halves[0]) is None and "more than 3 connections" in caplog.text
        app.free.set()
        assert status(busy) == status(late) == 200
        halves[1].sendall(b"12345678")
        assert status(halves[1]) == 200


def test_connections_that_are_made_at_once_replace_each_other(monkeypatch):
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 3)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    waiting = [connect(listener.getsockname()) for _ in range(40)]
    with serving(App(), listener) as (server, address), connect(address, REQUEST) as client:
        assert status(client) == 200 and len(server.server_state.connections) == 3
    assert all(status(each) is None for each in waiting)


def test_one_address_cannot_replace_the_connections_of_others(monkeypatch):
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 3)
    with serving(App()) as (_, address):
        half = socket.create_connection(address, timeout=5, source_address=("127.0.0.2", 0))
        half.sendall(REQUEST[:-2])
        others = [connect(address, REQUEST) for _ in range(5)]
        assert [status(each) for each in others][-1] == 200
        half.sendall(REQUEST[-2:])
        assert status(half) == 200


@pytest.mark.parametrize(("limit", "value"), [("MAX_CONNECTIONS", 1), ("REQUEST_TIMEOUT_SECONDS", 0.5)])
def test_a_client_that_reads_no_responses_cannot_keep_its_connection(monkeypatch, caplog, limit, value):
    monkeypatch.setattr(http_server, limit, value)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with serving(App(), listener) as (server, address), socket.socket() as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        greedy.connect(address)
        greedy.sendall(4000 * REQUEST)
        wait_for(lambda: any(each.flow.write_paused for each in server.server_state.connections))
        if limit == "MAX_CONNECTIONS":
            with connect(address, REQUEST) as other:
                assert status(other) == 200
        else:
            wait_for(lambda: not server.server_state.connections)
            assert "the client didn't read the responses within 0.5 s" in caplog.text


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_stopping_finishes_the_response_in_progress(capsys):
    app = App()
    app.free.clear()
    with serving(app) as (server, address), connect(address, REQUEST) as client:
        assert app.entered.wait(5)
        halves = [connect(address, POST), connect(address, POST + b"Content-Length: 9\r\n\r\n{")]
        time.sleep(0.05)
        server._stop_or_exit(15, None)
        assert [status(half) for half in halves] == [None, None]
        app.free.set()
        assert status(client) == 200
    assert "Finishing the responses in progress" in capsys.readouterr().err


def test_a_second_signal_exits_at_once(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(App(), listener)
        server._stop_or_exit(2, None)
        assert server.should_exit and not codes and not capsys.readouterr().err
        server._stop_or_exit(15, None)
    assert codes == [143]


@pytest.mark.parametrize(
    "data",
    [
        b"\x1b[2J\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        POST + b"Host: evil.example\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 1, 2\r\n\r\n",
        POST + b"X: " + b"x" * 100_000,
        POST + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    ],
)
def test_what_is_not_http_is_refused(data, caplog):
    with serving(App()) as (_, address):
        with connect(address, data) as client:
            assert status(client) == 400
        with connect(address, REQUEST) as client:
            assert status(client) == 200
    (line,) = caplog.messages
    assert line.endswith("127.0.0.1: sent no valid HTTP")


def test_the_body_of_a_refused_request_is_discarded(caplog):
    refused = POST.replace(b"/", b"/no", 1)
    hidden = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(App()) as (_, address):
        with connect(address, refused + b"Content-Length: %d\r\n\r\n" % len(hidden)) as client:
            assert status(client) == 400
            client.sendall(hidden + REQUEST[:-2] + b"Connection: close\r\n\r\n")
            assert b"".join(iter(lambda: client.recv(65536), b"")).count(b"HTTP/1.1 200") == 1
        with connect(address, refused + b"Transfer-Encoding: chunked\r\n\r\n") as client:
            assert status(client) == 400
            client.sendall(b"nonsense\r\n")
            assert status(client) is None
    assert "Fatal error" not in caplog.text and len(caplog.messages) == 3


def test_requests_for_another_protocol_are_answered_without_a_log(caplog):
    with (
        serving(App()) as (_, address),
        connect(address, REQUEST[:-2] + b"Connection: upgrade\r\nUpgrade: x\r\n\r\n") as c,
    ):
        assert status(c) == 200
    assert not caplog.messages


def test_ten_refusals_per_minute_are_logged(monkeypatch, caplog):
    refusals, now = Refusals(), [0.0]
    monkeypatch.setattr(http_server.time, "monotonic", lambda: now[0])
    for now[0] in (1, 61):
        for i in range(30):
            refusals.log(("192.0.2.1", 1), f"problem {i}")
    assert len(caplog.messages) == 20
    assert caplog.messages[9] == "Client 192.0.2.1: problem 9 The next refusals of this minute aren't logged."
    assert all(record.levelno == logging.WARNING for record in caplog.records)
