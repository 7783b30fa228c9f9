"""A server with OpenAI's protocol on loopback that replies what each test wants."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DROPPED = object()
"""Instead of a reply: the connection is closed in the middle."""
Reply = Any


def completion(text: Any, finish_reason: str = "stop", usage: Any = (100, 10), **message: Any) -> dict[str, Any]:
    """The body of a successful response."""
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text} | message,
    }
    counted = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True)) if usage else None
    return {"object": "chat.completion", "choices": [choice], "usage": counted}


def verdict(score: Any, reason: str = "It fits.") -> dict[str, Any]:
    return completion(json.dumps({"reason": reason, "score": score}))


class FakeJudge:
    """``reply`` gets the body of each request; it returns the body of the response, (status, body), or ``DROPPED``.

    ``asked`` holds the bodies, ``headers`` the headers, ``most_at_once`` the most requests in progress.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Reply] = lambda body: verdict(7)) -> None:
        self.reply, self.response_headers = reply, {}
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_at_once = 0
        self.delay = 0.0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    fake.asked.append(body)
                    fake.headers.append({**self.headers, "path": self.path})
                    fake.running += 1
                    fake.most_at_once = max(fake.most_at_once, fake.running)
                    reply = fake.reply(body)
                time.sleep(fake.delay)
                with fake._lock:
                    fake.running -= 1
                if reply is DROPPED:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
                    return
                status, content = reply if isinstance(reply, tuple) else (200, reply)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for header in fake.response_headers.items():
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # The client left, as from a slow server.
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> FakeJudge:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()


def in_turn(*replies: Reply) -> Callable[[dict[str, Any]], Reply]:
    """Reply with each of these once, then with the last one."""
    left = list(replies)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]
