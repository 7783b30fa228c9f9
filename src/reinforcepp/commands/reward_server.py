"""The command ``serve-reward``: a reward model behind HTTP, for ``rewards/remote.py`` and other clients of the protocol.

    POST /get_reward  {"query": [...], "prompts": [...], "finish_reason": [...]} -> {"rewards": [...], "scores": [...]}
    GET /health       {"status": "ok", "model": ...}

A ``query`` is the prompt followed by the completion, in plain text; the server applies the model's chat template. Without
``prompts``, each query must be formatted already. Errors are {"error": sentence} with a status of 4xx.
"""

from __future__ import annotations

import errno
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

import torch

from reinforcepp.config import ServeRewardConfig
from reinforcepp.config.reward_spec import TOKEN_VARIABLE
from reinforcepp.errors import ConfigError
from reinforcepp.models.tokenization import encode, eos_token_id
from reinforcepp.monitoring import echo
from reinforcepp.monitoring.signals import handle_signals
from reinforcepp.rewards.remote import authorization
from reinforcepp.rewards.trained import TrainedReward, check_reward_folder, load_reward_model

LARGEST_REQUEST = 64 * 2**20  # bytes
SECONDS_TO_SEND = 60.0


class BadRequest(Exception):
    """A request that can't be answered, with its HTTP status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def score_request(reward: TrainedReward, asked: Any) -> list[float]:
    """Return the scores of the queries in a request.

    Raises:
        BadRequest: If the request doesn't follow the protocol.
    """
    queries = _texts(asked, "query")
    if queries is None:
        raise BadRequest(400, "There is no list 'query' in the request.")
    prompts, reasons = _texts(asked, "prompts", len(queries)), _texts(asked, "finish_reason", len(queries))
    if not queries:
        return []
    if prompts is None:
        eos = str(reward.tokenizer.eos_token)
        rows = [[*encode(reward.tokenizer, q.removesuffix(eos)), eos_token_id(reward.tokenizer)] for q in queries]
        return reward.scaled(reward.score_rows(rows))
    for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        if not query.startswith(prompt):
            raise BadRequest(400, f"query {i} doesn't begin with prompt {i}, so the completion is unknown.")
    completions = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    return reward(prompts, completions, finish_reason=reasons)


def _texts(asked: Any, name: str, count: int | None = None) -> list[str] | None:
    values = asked.get(name) if isinstance(asked, dict) else None
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadRequest(400, f"{name!r} must be a list of texts.")
    if count is not None and len(values) != count:
        raise BadRequest(400, f"{name!r} holds {len(values)} texts for {count} queries.")
    return values


class RewardServer(ThreadingHTTPServer):
    """Listens from the start and answers once ``reward`` is set; requests are scored one after another."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, title: str) -> None:
        super().__init__((host, port), Handler)
        self.title = title
        self.wanted = authorization().get("Authorization")
        self.reward: TrainedReward | None = None
        self.scoring = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that closed its connection."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = SECONDS_TO_SEND
    server: RewardServer

    def do_GET(self) -> None:
        """Return the status of the server."""
        if self.path != "/health":
            return self._refuse(BadRequest(404, "There is only POST /get_reward and GET /health."))
        self._answer(200, {"status": "ok", "model": self.server.title})

    def do_POST(self) -> None:
        """Return the scores of the queries."""
        try:
            body = self._body()
            reward = self.server.reward
            assert reward is not None
            with self.server.scoring:
                scores = score_request(reward, body)
        except BadRequest as refusal:
            return self._refuse(refusal)
        except torch.OutOfMemoryError:
            return self._refuse(BadRequest(500, "Memory ran out: start the server with a smaller --batch_size."))
        self._answer(200, {"rewards": scores, "scores": scores})

    def _body(self) -> Any:
        """Read the body of a request after checking its path, token and length."""
        if self.path not in ("/", "/get_reward"):
            raise BadRequest(404, "There is only POST /get_reward and GET /health.")
        wanted = self.server.wanted
        if wanted and not hmac.compare_digest(self.headers.get("Authorization", "").encode(), wanted.encode()):
            raise BadRequest(401, "The token is missing or wrong.")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise BadRequest(411, "The request doesn't say how long it is.")
        if int(length) > LARGEST_REQUEST:
            raise BadRequest(413, f"The request is over {LARGEST_REQUEST // 2**20} MiB: send fewer texts at a time.")
        try:
            return json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise BadRequest(400, "The request isn't JSON.") from None

    def _refuse(self, refusal: BadRequest) -> None:
        self.close_connection = True  # The body of the request might be unread.
        self._answer(refusal.status, {"error": str(refusal)})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests."""


def serve(config: ServeRewardConfig) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Raises:
        ModelError: If the model can't be loaded.
        ConfigError: If the server can't listen on the address.
    """
    check_reward_folder(config.model)
    with _listening(config) as server:
        reward = load_reward_model(config.model)
        reward.batch_size = config.batch_size
        if config.reward_normalize:
            reward.normalize()
        if torch.cuda.is_available():
            reward.model.to("cuda")
        server.reward = reward
        if server.server_address[0] not in ("127.0.0.1", "::1") and server.wanted is None:
            echo(
                f"Every client that reaches this address can use the server. To require a token, set {TOKEN_VARIABLE}.",
                "yellow",
            )
        echo(f"{config.model} answers on http://{config.host}:{server.server_port}/get_reward; Ctrl-C ends it.")
        with _until_signal(server):
            server.serve_forever(poll_interval=0.1)
    echo("Stopped.")


def _listening(config: ServeRewardConfig) -> RewardServer:
    try:
        return RewardServer(config.host, config.port, config.model)
    except OSError as error:
        cure = "give another --host, an address of this machine."
        if error.errno == errno.EADDRINUSE:
            cure = "give another --port, or 0 for one that is free."
        if error.errno == errno.EACCES:
            cure = "give another --port, from 1024 up."
        raise ConfigError(
            f"{config.host} port {config.port} can't be listened on ({error.strerror}): {cure}"
        ) from error


@contextmanager
def _until_signal(server: RewardServer) -> Iterator[None]:
    """End ``serve_forever`` at the first signal in this block."""

    def stop(number: int, frame: FrameType | None) -> None:
        # shutdown waits for the loop of serve_forever, which runs in this very thread.
        threading.Thread(target=server.shutdown).start()

    with handle_signals(stop):
        yield
